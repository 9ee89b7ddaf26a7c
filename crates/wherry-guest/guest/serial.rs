//! Text on the first serial port (16550 at 0x3f8), through the gate: for a few lines at boot and at failures.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::gate;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// Bytes a 16550 takes at once when its transmitter is empty.
const FIFO: usize = 16;

static BUSY: AtomicBool = AtomicBool::new(false);

/// Sets 115200 8N1 with FIFOs, without interrupts.
pub fn init() {
    for (offset, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)] {
        gate::outb(COM1 + offset, value);
    }
}

/// A line buffer that goes out in pieces of one FIFO.
struct Out {
    buffer: [u8; FIFO],
    len: usize,
}

impl Out {
    fn flush(&mut self) {
        // A port that is absent or stuck must not stop the guest.
        for _ in 0..100_000 {
            if gate::inb(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                break;
            }
        }
        gate::outs(COM1, &self.buffer[..self.len]);
        self.len = 0;
    }
}

impl Write for Out {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            self.buffer[self.len] = byte;
            self.len += 1;
            if self.len == FIFO {
                self.flush();
            }
        }
        Ok(())
    }
}

/// Writes one line, `wherry-guest: ` before it. Lines of several vCPUs do not mix.
pub fn line(text: fmt::Arguments<'_>) {
    // A vCPU that faults while it prints must still get its line out: wait long, not for ever.
    let mut patience = 50_000_000u64;
    while BUSY.swap(true, Ordering::Acquire) && patience > 0 {
        core::hint::spin_loop();
        patience -= 1;
    }
    let mut out = Out { buffer: [0; FIFO], len: 0 };
    // `Out::write_str` never fails.
    let _ = write!(out, "wherry-guest: {text}\r\n");
    out.flush();
    BUSY.store(false, Ordering::Release);
}
