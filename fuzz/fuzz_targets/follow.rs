//! Runs of pages that follow a switch, in messages that go on where the last one ended: refused without leaving the
//! block, or the set is what the runs say, and written again it is the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wherry_memory::PageSet;
use wherry_migration::source::take_follow;

/// Pages of the block, at most: a set of them is a small allocation.
const MOST: u64 = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    let (words, _) = bytes.as_chunks::<4>();
    let Some((head, words)) = words.split_first() else { return };
    let pages = u64::from(u32::from_le_bytes(*head)) % MOST + 1;
    let mut set = PageSet::new(pages);
    let mut from = 0;
    let mut follow = 0;
    // A word of all ones begins the next message; one with the top bit is a number beyond any block.
    for message in words.split(|word| *word == [0xff; 4]) {
        let number = |word: &[u8; 4]| match u32::from_le_bytes(*word) {
            far if far >> 31 == 1 => u64::from(far) << 32 | u64::from(far),
            near => u64::from(near),
        };
        let runs: Vec<u64> = message.iter().map(number).collect();
        let before = from;
        if take_follow(&mut set, &mut from, &runs).is_err() {
            assert!(from >= before && from <= pages, "{from} of {pages}");
            return;
        }
        follow += runs.iter().skip(1).step_by(2).sum::<u64>();
        assert_eq!(from, before + runs.iter().sum::<u64>());
        assert!(from <= pages);
        assert_eq!(set.count(), follow);
    }
    let (mut again, mut runs, mut told) = (PageSet::new(pages), Vec::new(), 0);
    for run in set.runs(0..pages) {
        runs.extend([run.start - told, run.end - run.start]);
        told = run.end;
    }
    assert_eq!(take_follow(&mut again, &mut 0, &runs), Ok(()));
    assert_eq!(again.words(), set.words());
});
