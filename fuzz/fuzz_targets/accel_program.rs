//! Programs of the accelerator, from any bytes: refused, or run. One that is stopped every few instructions ends as one that
//! is not, with the same memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wherry_accel::memory::{AddressSpace, Arena};
use wherry_accel::program::{Machine, Progress};

const BASE: u64 = 0x1000;
const FUEL: u64 = 5000;

fn memory() -> Arena {
    Arena::new(&[(BASE, 0x1000)]).expect("memory")
}

fn content(memory: &Arena) -> Vec<u8> {
    let mut bytes = vec![0; 0x1000];
    memory.read(BASE, &mut bytes).expect("it is there");
    bytes
}

fuzz_target!(|bytes: &[u8]| {
    let Some((pause, bytes)) = bytes.split_first() else {
        return;
    };
    let text: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let arguments = [BASE, BASE + 0x800, 77];
    let Ok(mut whole) = Machine::load(text.clone(), arguments, FUEL) else {
        return;
    };
    let (there, here) = (memory(), memory());
    let end = whole.run(&there, u64::MAX);
    let mut stopped = Machine::load(text, arguments, FUEL).expect("it was loaded before");
    let pause = u64::from(*pause) % 32 + 1;
    let again = loop {
        match stopped.run(&here, pause) {
            Progress::More => {}
            end => break end,
        }
    };
    assert_eq!(end, again);
    assert_eq!(whole, stopped);
    assert!(content(&there) == content(&here), "memory differs");
});
