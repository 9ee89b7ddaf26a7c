//! State units and their versioned, tagged state
