//! What makes workers work: a test's clock, or threads.

mod simulation;
mod threads;

pub use simulation::Simulation;
pub use threads::Workers;
