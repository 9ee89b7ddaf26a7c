//! The epoch of each VM that this process runs: it grows with each change of owner and is a fencing token for whoever
//! asks. A VM that was started here and never moved has epoch 0.

use std::collections::BTreeMap;
use std::sync::Mutex;

use crate::journey::lock;

static EPOCHS: Mutex<BTreeMap<Vec<u8>, u64>> = Mutex::new(BTreeMap::new());

/// The epoch of a VM.
pub fn of(vm: &[u8]) -> u64 {
    lock(&EPOCHS).get(vm).copied().unwrap_or(0)
}

/// The VM runs here with that epoch from now on.
pub(crate) fn set(vm: &[u8], epoch: u64) {
    lock(&EPOCHS).insert(vm.to_vec(), epoch);
}
