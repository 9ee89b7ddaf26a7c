//! The guest library and the probe guest
