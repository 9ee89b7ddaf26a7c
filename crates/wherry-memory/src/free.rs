//! Free pages: what a guest does not use need not be carried, and whoever gives memory back has to wait meanwhile.
//!
//! The order that loses nothing: every dirty source is started first. Then [`ask`](FreePages::ask): what the guest names
//! after that was of no use to it at some time after the start, so whatever it writes there from then on is reported by a
//! source, as long as nobody has re-armed that granule meanwhile. So free granules are left out of what is re-armed, too,
//! and only of the first round: what a later one sends was collected, and re-armed, since. A granule that was left out and
//! was written at any time since the start is found by the next `collect`, and sent.

use std::ops::Range;

use crate::{Block, PageSet};

/// Knows which pages the guest does not use, and gives memory back: a balloon.
///
/// All methods may be called from any thread.
pub trait FreePages: Send + Sync {
    /// RAM is read by a journey: gives no memory back until [`release`](Self::release). None is being given back any more
    /// when this returns.
    fn hold(&self);

    /// Gives memory back again.
    fn release(&self);

    /// Asks the guest which pages it does not use. It answers when it gets to it, or never. Forgets what it answered
    /// before.
    fn ask(&self);

    /// Removes from `set` the granules in `range` of `block` that the guest has named since it was asked; how many. The
    /// range is one of [`PageSet::subtract_range`].
    fn leave_out(&self, block: &Block, range: Range<u64>, set: &mut PageSet) -> u64;

    /// Nobody wants to know any more: the guest may use those pages again. Without an [`ask`](Self::ask) it does nothing.
    fn enough(&self);
}
