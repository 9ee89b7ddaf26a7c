//! The unit `clock`: the guest's kvm-clock, and the moment by which the vCPUs' TSCs are carried.
//!
//! Guest time never stands still: what passes between save and restore passes for the guest too. On another host the
//! time that has passed is told by `CLOCK_REALTIME`; one that is behind the source's counts as no time at all, so that
//! guest time never goes back. On the same host the TSC goes on and offsets stay as they are.
//!
//! A vCPU's TSC is saved as its value at the moment this unit was saved ([`Moment`]). So this unit is saved and
//! restored before the vCPUs.

pub mod saved;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::VmFd;
use rustix::time::ClockId;
use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use self::saved::ClockState;
use super::{Once, kvm};
use crate::vcpu::{Hold, VcpuSet};
use crate::vm::{Host, ioctl};

/// One moment, told by three clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) kvmclock_ns: u64,
    pub(crate) realtime_ns: u64,
    pub(crate) host_tsc: u64,
}

/// How the vCPUs' TSCs come over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carry {
    /// Same host, same boot: offsets stay.
    SameHost {
        /// The host's TSC when the clock was saved.
        saved_tsc: u64,
    },
    /// Another host: at `now`, `passed_ns` have passed since the moment of the save.
    OtherHost {
        /// The moment at which the clock was restored.
        now: Moment,
        /// Guest time since the save.
        passed_ns: u64,
    },
}

/// What this unit tells those of the vCPUs.
#[derive(Debug, Default)]
pub(crate) struct TimeBase(Mutex<(Option<Moment>, Option<Carry>)>);

impl TimeBase {
    fn get(&self) -> (Option<Moment>, Option<Carry>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The moment of the last save.
    pub(crate) fn saved(&self) -> Option<Moment> {
        self.get().0
    }

    /// What the restore found out.
    pub(crate) fn carry(&self) -> Option<Carry> {
        self.get().1
    }
}

pub(crate) struct ClockUnit {
    vm: Arc<VmFd>,
    host: Arc<Host>,
    base: Arc<TimeBase>,
    vcpus: Arc<VcpuSet>,
    once: Once,
}

impl ClockUnit {
    pub(crate) fn new(vm: Arc<VmFd>, host: Arc<Host>, base: Arc<TimeBase>, vcpus: Arc<VcpuSet>) -> Self {
        Self { vm, host, base, vcpus, once: Once::default() }
    }

    fn now(&self) -> Result<Moment, UnitError> {
        let before = ioctl::host_tsc();
        let clock = self.vm.get_clock().map_err(kvm("reading the clock"))?;
        let after = ioctl::host_tsc();
        let host_tsc = match clock.flags & KVM_CLOCK_HOST_TSC {
            0 => before + after.wrapping_sub(before) / 2,
            _ => clock.host_tsc,
        };
        let realtime_ns = match clock.flags & KVM_CLOCK_REALTIME {
            0 => realtime_ns(),
            _ => clock.realtime,
        };
        Ok(Moment { kvmclock_ns: clock.clock, realtime_ns, host_tsc })
    }
}

fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Realtime);
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

impl StateUnit for ClockUnit {
    fn id(&self) -> UnitId {
        UnitId::new("clock", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &[]
    }

    fn schema(&self) -> u32 {
        ClockState::SCHEMA
    }

    fn drain(&self, _: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn finish_stop(&self, _: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn save(&self) -> Result<Saved, UnitError> {
        let moment = self.now()?;
        self.base.0.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(moment);
        let state = ClockState {
            kvmclock_ns: moment.kvmclock_ns,
            realtime_ns: moment.realtime_ns,
            host_tsc: moment.host_tsc,
            boot_id: self.host.boot_id.clone(),
            paused_by_user: self.vcpus.is_held(Hold::User),
        };
        Ok(Saved::Section(state.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        let state = ClockState::from_section(section)?;
        self.once.restoring()?;
        let (clock, flags) = match self.host.clock_realtime {
            // KVM adds what has passed since `realtime`, if it is not in the future.
            true => (state.kvmclock_ns, KVM_CLOCK_REALTIME),
            false => (state.kvmclock_ns.saturating_add(realtime_ns().saturating_sub(state.realtime_ns)), 0),
        };
        let data = kvm_clock_data { clock, flags, realtime: state.realtime_ns, ..Default::default() };
        self.vm.set_clock(&data).map_err(kvm("setting the clock"))?;
        let now = self.now()?;
        let same = !state.boot_id.is_empty() && state.boot_id == self.host.boot_id && now.host_tsc >= state.host_tsc;
        let carry = match same {
            true => Carry::SameHost { saved_tsc: state.host_tsc },
            false => Carry::OtherHost { now, passed_ns: now.kvmclock_ns.saturating_sub(state.kvmclock_ns) },
        };
        self.base.0.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(carry);
        if state.paused_by_user {
            self.vcpus.hold(Hold::User);
        }
        Ok(())
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        Ok(())
    }
}
