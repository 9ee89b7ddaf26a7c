//! The thread of a vCPU: into the guest, out again for devices, to rest when told.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::time::Instant;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{At, Buses, Hold, Vcpu, kick_signal};
use crate::vm::ioctl;
use crate::vm::{Crash, ExitNotice, ExitReason};

/// Why the thread left the guest.
enum Left {
    /// It was kicked: it looks at its orders.
    Kicked,
    /// The machine cannot go on.
    Ended(ExitReason),
}

/// Does nothing: the signal's work is done when it has interrupted `KVM_RUN`.
pub(super) extern "C" fn ignore_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

pub(super) fn thread(vcpu: &Vcpu, buses: &Buses, notice: &ExitNotice) {
    // A thread that was started with the signal blocked would never be stopped.
    if let Err(e) = vmm_sys_util::signal::unblock_signal(kick_signal()) {
        notice.tell(ExitReason::Error(format!("vCPU {}: unblocking the kick signal: {e:?}", vcpu.index)));
    }
    vcpu.control().thread = Some(ioctl::thread_id());
    while await_orders(vcpu) {
        // A panic in a device must end the machine by name, not leave a vCPU that everyone waits for.
        let left = catch_unwind(AssertUnwindSafe(|| guest(vcpu, buses)))
            .unwrap_or_else(|_| Left::Ended(ExitReason::Error(format!("vCPU {}: a device panicked", vcpu.index))));
        let mut control = vcpu.control();
        control.at = At::Rest;
        if let Left::Ended(_) = left {
            control.holds |= Hold::Ended as u8;
        }
        // As in `release`: whoever is woken must not find the lock held.
        drop(control);
        vcpu.rested.notify_all();
        if let Left::Ended(reason) = left {
            tracing::warn!(vcpu = vcpu.index, %reason, "vCPU left the guest for good");
            notice.tell(reason);
        }
    }
    vcpu.control().thread = None;
}

/// Waits until nothing holds the vCPU; false when the thread is to end.
fn await_orders(vcpu: &Vcpu) -> bool {
    let mut control = vcpu.control();
    loop {
        if control.quit {
            return false;
        }
        if control.holds != 0 {
            control.at = At::Rest;
            control.throttled_until = None;
            control = vcpu.orders.wait(control).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let left = control.throttled_until.map(|until| until.saturating_duration_since(Instant::now()));
        match left.filter(|left| !left.is_zero()) {
            Some(left) => {
                control.at = At::Throttled;
                control = vcpu.orders.wait_timeout(control, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            None => {
                control.throttled_until = None;
                control.at = At::Guest;
                vcpu.page.set_immediate_exit(false);
                return true;
            }
        }
    }
}

/// Runs the guest until the vCPU is kicked or can run no longer.
fn guest(vcpu: &Vcpu, buses: &Buses) -> Left {
    let mut fd = vcpu.fd();
    loop {
        match fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                buses.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                buses.mmio.write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                for element in data.chunks_mut(vcpu.page.pio_element()) {
                    buses.pio.read(port.into(), element);
                }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                for element in data.chunks(vcpu.page.pio_element()) {
                    buses.pio.write(port.into(), element);
                }
            }
            // With the interrupt controllers in the kernel, KVM itself waits in HLT and for a start-up IPI (EAGAIN).
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::Intr) => return Left::Kicked,
            Ok(exit) => {
                let end = End::of(&exit);
                return Left::Ended(end.reason(vcpu, &fd));
            }
            Err(e) if e.errno() == libc::EINTR => return Left::Kicked,
            Err(e) if e.errno() == libc::EAGAIN => {}
            Err(e) => {
                let text = format!("running vCPU {}: {e}; {}", vcpu.index, registers_text(&fd));
                return Left::Ended(ExitReason::Error(text));
            }
        }
    }
}

/// The exits after which there is no going on, apart from the data they borrow.
enum End {
    TripleFault,
    Internal,
    Entry(u64),
    System(u32),
    Memory(u64),
    Other(String),
}

impl End {
    fn of(exit: &VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::Shutdown => End::TripleFault,
            VcpuExit::InternalError => End::Internal,
            VcpuExit::FailEntry(reason, _) => End::Entry(*reason),
            VcpuExit::SystemEvent(event, _) => End::System(*event),
            VcpuExit::MemoryFault { gpa, .. } => End::Memory(*gpa),
            other => End::Other(format!("{other:?}")),
        }
    }

    fn reason(self, vcpu: &Vcpu, fd: &VcpuFd) -> ExitReason {
        let crash = |what: String| ExitReason::Crash(Crash { vcpu: vcpu.index, what, registers: registers(fd) });
        match self {
            End::TripleFault => crash("triple fault".into()),
            End::Internal => crash(match vcpu.page.internal_suberror() {
                KVM_INTERNAL_ERROR_EMULATION => "an instruction that KVM cannot emulate".into(),
                KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions at the same time that KVM cannot deliver".into(),
                KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit of KVM while an event was delivered".into(),
                KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that KVM did not expect".into(),
                other => format!("KVM internal error {other}"),
            }),
            End::System(KVM_SYSTEM_EVENT_SHUTDOWN) => ExitReason::PowerOff,
            End::System(KVM_SYSTEM_EVENT_RESET) => ExitReason::Reset,
            End::System(KVM_SYSTEM_EVENT_CRASH) => crash("crash reported by the guest".into()),
            End::System(event) => ExitReason::Error(format!("system event {event} on vCPU {}", vcpu.index)),
            End::Entry(reason) => ExitReason::Error(format!(
                "the CPU refused to enter the guest on vCPU {}: reason {reason:#x}; {}",
                vcpu.index,
                registers_text(fd)
            )),
            End::Memory(gpa) => ExitReason::Error(format!(
                "vCPU {} used guest memory at {gpa:#x} that this host cannot give; {}",
                vcpu.index,
                registers_text(fd)
            )),
            End::Other(exit) => {
                ExitReason::Error(format!("vCPU {} left the guest by {exit}; {}", vcpu.index, registers_text(fd)))
            }
        }
    }
}

/// The registers that tell where the guest was.
fn registers(fd: &VcpuFd) -> Vec<(&'static str, u64)> {
    let mut list = Vec::new();
    if let Ok(r) = fd.get_regs() {
        list.extend([
            ("rip", r.rip),
            ("rsp", r.rsp),
            ("rflags", r.rflags),
            ("rax", r.rax),
            ("rbx", r.rbx),
            ("rcx", r.rcx),
            ("rdx", r.rdx),
            ("rsi", r.rsi),
            ("rdi", r.rdi),
            ("rbp", r.rbp),
        ]);
    }
    if let Ok(s) = fd.get_sregs() {
        list.extend([
            ("cs", s.cs.selector.into()),
            ("cr0", s.cr0),
            ("cr2", s.cr2),
            ("cr3", s.cr3),
            ("cr4", s.cr4),
            ("efer", s.efer),
        ]);
    }
    list
}

fn registers_text(fd: &VcpuFd) -> String {
    registers(fd).iter().map(|(name, value)| format!("{name}={value:#x}")).collect::<Vec<_>>().join(" ")
}
