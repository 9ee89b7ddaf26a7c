//! vCPUs: one thread each, which is either in the guest or at rest.
//!
//! A [`Vcpu`] is *held* for reasons (see [`Hold`]); its thread enters the guest only while there is none. To hold it is
//! quick and does not wait; [`Vcpu::wait_rest`] waits. At rest, the descriptor may be used by other threads
//! ([`Vcpu::fd`]) to save and restore its state.
//!
//! The race that decided the form: a signal that comes between the thread's last look at its orders and `KVM_RUN` would
//! be lost. So whoever holds a vCPU sets `immediate_exit` in the shared run page *before* the signal, both under
//! `control`, and the thread clears it only under the same lock, when nothing holds it.
//!
//! A vCPU comes to rest only on `EINTR` from `KVM_RUN`: KVM completes an access to a device (the data of a read goes
//! into the guest's register) on the *next* `KVM_RUN`, before it looks at `immediate_exit`. State saved earlier would
//! have lost the access.
//!
//! Lock order: `fd` before `control`. The thread holds `fd` while it is in the guest.

mod hot;
mod run;
mod run_page;
mod set;
mod throttle;

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use rustix::process::{Pid, getpriority_process, setpriority_process};

use crate::vm::ioctl;
use crate::vm::{ExitNotice, VmError};
use wherry_pci::bus::Bus;

use run_page::RunPage;

pub(crate) use set::VcpuSet;
pub(crate) use throttle::Throttle;

/// Why a vCPU does not enter the guest. Each is given and taken back on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Hold {
    /// Its state unit is stopped, or was not started yet.
    Unit = 1,
    /// The user has paused the machine.
    User = 2,
    /// The machine has ended. Never taken back.
    Ended = 4,
}

/// Where the thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Waiting to be let go.
    Rest,
    /// In the guest, or in the VMM on its behalf.
    Guest,
    /// Kept out of the guest for a while by the throttle. Holds nothing, looks at its orders before it goes on.
    Throttled,
}

/// What the thread is told, and what it tells.
struct Control {
    /// Set of [`Hold`]s.
    holds: u8,
    /// The thread is to end.
    quit: bool,
    /// Until when the throttle keeps it out of the guest.
    throttled_until: Option<Instant>,
    at: At,
    /// The thread, once it runs.
    thread: Option<libc::pid_t>,
    /// Its nice value of before it was asked to hurry.
    unhurried: Option<i32>,
}

/// One vCPU.
pub(crate) struct Vcpu {
    index: u32,
    fd: Mutex<VcpuFd>,
    /// Lies in the run page that `fd` has mapped.
    page: RunPage,
    control: Mutex<Control>,
    /// The thread waits on it for its orders.
    orders: Condvar,
    /// Others wait on it for the thread's rest.
    rested: Condvar,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("index", &self.index).finish_non_exhaustive()
    }
}

/// The buses a vCPU's accesses go to.
#[derive(Clone, Debug)]
pub(crate) struct Buses {
    /// Port I/O.
    pub(crate) pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub(crate) mmio: Arc<Bus>,
}

impl Vcpu {
    /// Takes a vCPU that KVM has made. It is held by [`Hold::Unit`] and has no thread yet.
    pub(crate) fn new(index: u32, mut fd: VcpuFd) -> Self {
        let page = RunPage::of(&mut fd);
        page.set_immediate_exit(true);
        Self {
            index,
            fd: Mutex::new(fd),
            page,
            control: Mutex::new(Control {
                holds: Hold::Unit as u8,
                quit: false,
                throttled_until: None,
                at: At::Rest,
                thread: None,
                unhurried: None,
            }),
            orders: Condvar::new(),
            rested: Condvar::new(),
        }
    }

    /// Its number, from 0; also its APIC id.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// Its thread, once that runs.
    pub(crate) fn thread(&self) -> Option<u32> {
        self.control().thread.and_then(|thread| u32::try_from(thread).ok())
    }

    /// Starts its thread, which waits until nothing holds the vCPU.
    pub(crate) fn spawn(self: &Arc<Self>, buses: Buses, notice: ExitNotice) -> Result<JoinHandle<()>, VmError> {
        let this = self.clone();
        let failed = |source: io::Error| VmError::Thread { vcpu: self.index, source };
        static HANDLER: Once = Once::new();
        let mut installed = Ok(());
        HANDLER.call_once(|| {
            installed = vmm_sys_util::signal::register_signal_handler(kick_signal(), run::ignore_signal);
        });
        installed.map_err(|e| failed(e.into()))?;
        std::thread::Builder::new()
            .name(format!("vcpu-{}", self.index))
            .spawn(move || run::thread(&this, &buses, &notice))
            .map_err(failed)
    }

    /// The descriptor, for use at rest. In the guest, this waits for rest.
    pub(crate) fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a reason not to be in the guest, and sees to it that the thread leaves it. Does not wait.
    pub(crate) fn hold(&self, why: Hold) {
        let mut control = self.control();
        control.holds |= why as u8;
        self.kick(&mut control);
    }

    /// [`hold`](Self::hold), when somebody waits for its rest with the whole machine: its thread goes before others until then. On a
    /// busy host a thread that has used its share, as one in a guest that never idles has, would come to rest tens of milliseconds
    /// late. Without the right to that (`CAP_SYS_NICE`) it comes when it comes.
    pub(crate) fn hold_hurriedly(&self, why: Hold) {
        let mut control = self.control();
        if let (None, Some(thread)) = (control.unhurried, control.thread.and_then(Pid::from_raw)) {
            let before = getpriority_process(Some(thread)).ok();
            control.unhurried = before.filter(|_| setpriority_process(Some(thread), -20).is_ok());
        }
        control.holds |= why as u8;
        self.kick(&mut control);
    }

    /// Takes a reason back; if it was the last, the vCPU runs.
    pub(crate) fn release(&self, why: Hold) {
        let mut control = self.control();
        if let (Some(nice), Some(thread)) = (control.unhurried.take(), control.thread.and_then(Pid::from_raw))
            && let Err(error) = setpriority_process(Some(thread), nice)
        {
            tracing::debug!(vcpu = self.index, %error, "its thread keeps its high priority");
        }
        control.holds &= !(why as u8);
        let free = control.holds == 0;
        // The lock goes before the notice. The woken thread may run on this very CPU, in our stead, and would find the
        // lock held by us who cannot run: milliseconds of blackout on a busy host.
        drop(control);
        if free {
            self.orders.notify_one();
        }
    }

    /// Whether this reason holds it.
    pub(crate) fn is_held(&self, why: Hold) -> bool {
        self.control().holds & why as u8 != 0
    }

    /// Whether it may be in the guest.
    pub(crate) fn runs(&self) -> bool {
        self.control().holds == 0
    }

    /// Waits until the thread is at rest. False if it is not by the deadline. Call it while the vCPU is held.
    pub(crate) fn wait_rest(&self, deadline: Instant) -> bool {
        let mut control = self.control();
        while control.at == At::Guest {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            control = self.rested.wait_timeout(control, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Keeps the vCPU out of the guest for a time, if it is in it.
    fn throttle(&self, time: Duration) {
        let mut control = self.control();
        if control.at == At::Guest && control.holds == 0 {
            control.throttled_until = Some(Instant::now() + time);
            self.kick(&mut control);
        }
    }

    /// Ends the thread. Does not wait for it.
    pub(crate) fn quit(&self) {
        let mut control = self.control();
        control.holds |= Hold::Ended as u8;
        control.quit = true;
        self.kick(&mut control);
        self.orders.notify_one();
    }

    /// Makes the thread leave the guest, or not enter it, and look at its orders.
    fn kick(&self, control: &mut Control) {
        self.page.set_immediate_exit(true);
        match (control.at, control.thread) {
            (At::Guest, Some(thread)) => ioctl::kick(thread, kick_signal()),
            (At::Throttled, _) => self.orders.notify_one(),
            _ => {}
        }
    }
}

/// The signal that takes vCPU threads out of the guest.
fn kick_signal() -> i32 {
    vmm_sys_util::signal::SIGRTMIN()
}
