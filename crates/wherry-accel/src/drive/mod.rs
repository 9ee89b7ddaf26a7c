//! What makes workers work: a test's clock, or threads. [`bells`] listens to the bells of a device; [`real`] is both for a function.

mod bells;
mod real;
mod simulation;
mod threads;

pub use bells::{Bells, Listener};
pub use real::{Drive, Driven, RealTime};
pub use simulation::Simulation;
pub use threads::Workers;
