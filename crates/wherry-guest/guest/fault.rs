//! The ends of a guest that goes wrong: failures, exceptions, panics. Each goes into the report page, to the probe
//! port and on serial; then, unless the caller goes on, the vCPU halts.

use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::sync::atomic::Ordering::{Relaxed, Release};
use core::sync::atomic::{AtomicU8, AtomicU32};

use crate::report::{
    Control, CpuPage, FailureKind, Header, MAX_CPUS, MESSAGE_BYTES, Phase, PortEvent, REPORT_GPA, cpu_page_gpa,
};
use crate::{gate, percpu, port, report, serial};

/// The report header of this guest.
pub fn header() -> &'static Header {
    // SAFETY: the page belongs to the image, is mapped for ever and consists of atomics.
    unsafe { &*(REPORT_GPA as *const Header) }
}

/// The control page of this guest.
pub fn control() -> &'static Control {
    // SAFETY: as above.
    unsafe { &*(report::CONTROL_GPA as *const Control) }
}

/// The report page of vCPU `cpu`.
pub fn cpu_page(cpu: usize) -> &'static CpuPage {
    assert!(cpu < MAX_CPUS);
    // SAFETY: as above.
    unsafe { &*(cpu_page_gpa(cpu) as *const CpuPage) }
}

/// Sets the phase of a vCPU, and tells the VMM.
pub fn set_phase(cpu: usize, phase: Phase) {
    cpu_page(cpu).phase.store(phase as u32, Release);
    port::event(PortEvent::Phase, cpu, phase as u32);
}

struct Message<'a> {
    bytes: &'a [AtomicU8; MESSAGE_BYTES],
    len: usize,
}

impl Write for Message<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let mut utf8 = [0; 4];
            let utf8 = c.encode_utf8(&mut utf8).as_bytes();
            if self.len + utf8.len() > MESSAGE_BYTES {
                return Err(fmt::Error);
            }
            for byte in utf8 {
                self.bytes[self.len].store(*byte, Relaxed);
                self.len += 1;
            }
        }
        Ok(())
    }
}

static FAILED: AtomicU32 = AtomicU32::new(0);

/// Reports a failure. The header keeps the first one; serial gets every one.
pub fn report(cpu: usize, kind: FailureKind, text: fmt::Arguments<'_>) {
    if FAILED.compare_exchange(0, kind as u32, Relaxed, Relaxed).is_ok() {
        let header = header();
        let mut message = Message { bytes: &header.message, len: 0 };
        // A text that does not fit is cut.
        let _ = message.write_fmt(text);
        header.message_len.store(message.len as u32, Relaxed);
        header.failure_cpu.store(cpu as u32, Relaxed);
        header.failure.store(kind as u32, Release);
    }
    set_phase(cpu, Phase::Failed);
    port::event(PortEvent::Failure, cpu, kind as u32);
    serial::line(format_args!("FAILED vcpu={cpu} kind={kind:?}: {text}"));
}

/// Reports a failure and ends this vCPU.
pub fn die(cpu: usize, kind: FailureKind, text: fmt::Arguments<'_>) -> ! {
    report(cpu, kind, text);
    gate::halt()
}

/// Ring 0 comes here, in ring 3 on a stack of its own, after the first exception of a vCPU.
#[unsafe(no_mangle)]
extern "C" fn guest_fault(cpu: usize) -> ! {
    let frame = percpu::fault_frame(cpu);
    let fault = &cpu_page(cpu).fault;
    let vector = frame.vector.load(Relaxed);
    fault.vector.store(vector as u32, Relaxed);
    fault.error_code.store(frame.error_code.load(Relaxed), Relaxed);
    fault.rip.store(frame.rip.load(Relaxed), Relaxed);
    fault.cs.store(frame.cs.load(Relaxed), Relaxed);
    fault.rsp.store(frame.rsp.load(Relaxed), Relaxed);
    fault.cr2.store(frame.cr2.load(Relaxed), Relaxed);
    fault.taken.store(1, Release);
    die(
        cpu,
        FailureKind::Fault,
        format_args!(
            "exception {vector} error={:#x} rip={:#x} cs={:#x} rsp={:#x} cr2={:#x}",
            frame.error_code.load(Relaxed),
            frame.rip.load(Relaxed),
            frame.cs.load(Relaxed),
            frame.rsp.load(Relaxed),
            frame.cr2.load(Relaxed),
        ),
    )
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    die(percpu::current(), FailureKind::Panic, format_args!("{info}"))
}
