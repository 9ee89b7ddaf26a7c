//! What the first vCPU sets up before the data set is laid out, and works with later.

use core::cell::UnsafeCell;

/// A load of vCPU 0, between its set-up and its work.
pub struct Handed<T>(UnsafeCell<Option<T>>);

// SAFETY: vCPU 0 alone calls `put` and `take`.
unsafe impl<T> Sync for Handed<T> {}

impl<T> Handed<T> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self(UnsafeCell::new(None))
    }

    /// Keeps the load until vCPU 0 works. Called by vCPU 0.
    pub fn put(&self, load: T) {
        // SAFETY: vCPU 0 alone comes here and to `take`, and holds no reference in between.
        unsafe { *self.0.get() = Some(load) };
    }

    /// What [`Handed::put`] was given. Called by vCPU 0.
    pub fn take(&self) -> Option<T> {
        // SAFETY: as for `put`.
        unsafe { (*self.0.get()).take() }
    }
}
