//! The probe guest's disk load, as seen from outside: its report, and its image.

use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;

use wherry_guest::disk::{BLOCK_BYTES, BLOCK_WORDS, block_word};
use wherry_guest::report::{CONTROL_GPA, Control, REPORT_GPA, REPORT_SIZE};
use wherry_guest::snapshot::{DiskSnapshot, Snapshot};

use super::{Place, wait_for};

/// Requests that have to come back to show that the disk is served.
const ENOUGH: u64 = 1500;

/// The RAM of a VM, kept beyond the end of its process.
pub struct Memory(File);

impl Memory {
    pub fn of(place: &Place, api: &str) -> Self {
        let status = place.wait_for_state(api, "running");
        let block = status["vm"]["blocks"].as_array().unwrap().iter().find(|b| b["guest_base"] == 0).unwrap();
        let path = format!("/proc/{}/fd/{}", status["pid"], block["fd"]);
        Self(File::options().read(true).write(true).open(path).unwrap())
    }

    /// Guest RAM of which the first bytes are those of a file: that of another VMM.
    pub fn of_file(file: File) -> Self {
        Self(file)
    }

    pub fn snapshot(&self) -> Snapshot {
        self.try_snapshot().unwrap()
    }

    /// None as long as the guest has not made one.
    pub fn try_snapshot(&self) -> Option<Snapshot> {
        let mut report = vec![0; REPORT_SIZE as usize];
        self.0.read_exact_at(&mut report, REPORT_GPA).ok()?;
        Snapshot::decode(&report).ok()
    }

    pub fn disk(&self) -> DiskSnapshot {
        let snapshot = self.snapshot();
        assert!(snapshot.failure.is_none(), "{:?}", snapshot.failure);
        let disk = snapshot.disk.unwrap();
        assert_eq!((disk.errors, disk.unexpected), (0, 0), "{disk:?}");
        disk
    }

    /// Waits until so many more requests have come back, verified.
    pub fn wait_for_requests(&self, what: &str) -> DiskSnapshot {
        let before = self.disk();
        wait_for(&format!("{ENOUGH} disk requests {what}"), || {
            let now = self.disk();
            let done = now.completed() >= before.completed() + ENOUGH && now.verified > before.verified;
            done.then_some(now)
        })
    }

    /// Has the guest read and compare everything once more, and switch off.
    pub fn finish(&self) {
        let word = |offset: usize| CONTROL_GPA + offset as u64;
        self.0.write_all_at(&1u32.to_le_bytes(), word(offset_of!(Control, finish))).unwrap();
    }

    /// Writes to guest RAM behind everybody's back.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    /// Compares an image with what the guest knows to have written; how many blocks that are.
    pub fn compare(&self, image: &File, seed: u64) -> u64 {
        let disk = self.disk();
        let mut table = vec![0; disk.blocks as usize * 8];
        self.0.read_exact_at(&mut table, disk.table_gpa).unwrap();
        let mut compared = 0;
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        for (block, entry) in (0..).zip(table.chunks_exact(8)) {
            let generation = u64::from_le_bytes(entry.try_into().unwrap());
            if generation == 0 {
                continue;
            }
            image.read_exact_at(&mut bytes, block * BLOCK_BYTES).unwrap();
            let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
            let expected = (0..BLOCK_WORDS).map(|word| block_word(seed, block, generation, word));
            assert!(words.eq(expected), "block {block} of the image is not of generation {generation}");
            compared += 1;
        }
        compared
    }
}
