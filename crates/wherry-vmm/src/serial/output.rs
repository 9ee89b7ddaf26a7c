//! The bounded buffer between the guest, which never waits, and the console.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Wake;

/// Most bytes that are kept for an outside that does not take them.
pub(super) const CAPACITY: usize = 256 << 10;

#[derive(Default)]
struct Buffer {
    bytes: VecDeque<u8>,
    dropped: u64,
}

/// The buffer; cloning gives another handle to the same one. Writing never fails and never waits.
#[derive(Clone)]
pub(super) struct Output {
    buffer: Arc<Mutex<Buffer>>,
    wake: Wake,
}

impl Output {
    pub fn new(wake: Wake) -> Self {
        Self { buffer: Arc::default(), wake }
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_empty(&self) -> bool {
        self.lock().bytes.is_empty()
    }

    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    /// All that waits, which stays.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.iter().copied().collect()
    }

    /// Takes up to `limit` of the oldest bytes.
    pub fn take(&self, limit: usize) -> Vec<u8> {
        let mut buffer = self.lock();
        let len = buffer.bytes.len().min(limit);
        buffer.bytes.drain(..len).collect()
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let was_empty = {
            let mut buffer = self.lock();
            let was_empty = buffer.bytes.is_empty();
            for byte in data {
                if buffer.bytes.len() == CAPACITY {
                    buffer.bytes.pop_front();
                    buffer.dropped += 1;
                }
                buffer.bytes.push_back(*byte);
            }
            was_empty
        };
        if was_empty {
            self.wake.now();
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
