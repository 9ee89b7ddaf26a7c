//! What makes workers work: a test's clock, or threads. [`bells`] listens to the bells of a device.

mod bells;
mod simulation;
mod threads;

pub use bells::{Bells, Listener};
pub use simulation::Simulation;
pub use threads::Workers;
