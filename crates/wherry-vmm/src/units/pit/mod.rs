//! The unit `pit`: KVM's i8254. The count of channel 0 starts afresh at the restore, as KVM has it; the other channels
//! go on from where they were.

pub mod saved;

use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{kvm_pit_channel_state, kvm_pit_state2};
use kvm_ioctls::VmFd;
use rustix::time::ClockId;
use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use self::saved::{PitChannel, PitState};
use super::{Once, bad, kvm};

pub(crate) struct PitUnit {
    vm: Arc<VmFd>,
    once: Once,
}

impl PitUnit {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, once: Once::default() }
    }
}

/// The clock by which KVM notes load times.
fn monotonic_ns() -> i64 {
    let now = rustix::time::clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

fn save_channel(c: &kvm_pit_channel_state, now: i64) -> PitChannel {
    PitChannel {
        count: c.count,
        latched_count: c.latched_count.into(),
        count_latched: c.count_latched.into(),
        status_latched: c.status_latched.into(),
        status: c.status.into(),
        read_state: c.read_state.into(),
        write_state: c.write_state.into(),
        write_latch: c.write_latch.into(),
        rw_mode: c.rw_mode.into(),
        mode: c.mode.into(),
        bcd: c.bcd.into(),
        gate: c.gate.into(),
        loaded_ns_ago: now.saturating_sub(c.count_load_time),
    }
}

fn load_channel(c: &PitChannel, now: i64) -> kvm_pit_channel_state {
    kvm_pit_channel_state {
        count: c.count,
        latched_count: c.latched_count as u16,
        count_latched: c.count_latched as u8,
        status_latched: c.status_latched as u8,
        status: c.status as u8,
        read_state: c.read_state as u8,
        write_state: c.write_state as u8,
        write_latch: c.write_latch as u8,
        rw_mode: c.rw_mode as u8,
        mode: c.mode as u8,
        bcd: c.bcd as u8,
        gate: c.gate as u8,
        count_load_time: now.saturating_sub(c.loaded_ns_ago),
    }
}

impl StateUnit for PitUnit {
    fn id(&self) -> UnitId {
        UnitId::new("pit", 0)
    }

    fn depends_on(&self) -> &[&str] {
        &["irqchip"]
    }

    fn schema(&self) -> u32 {
        PitState::SCHEMA
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
        let pit = self.vm.get_pit2().map_err(kvm("reading the PIT"))?;
        let now = monotonic_ns();
        let channels = pit.channels.iter().map(|c| save_channel(c, now)).collect();
        Ok(Saved::Section(PitState { channels, flags: pit.flags }.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        let state = PitState::from_section(section)?;
        let now = monotonic_ns();
        let channels: Vec<_> = state.channels.iter().map(|c| load_channel(c, now)).collect();
        let channels = channels.try_into().map_err(|_| bad(section, "a PIT has three channels"))?;
        self.once.restoring()?;
        let pit = kvm_pit_state2 { channels, flags: state.flags, ..Default::default() };
        self.vm.set_pit2(&pit).map_err(kvm("setting the PIT"))
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_goes_on_from_where_it_was_on_a_host_with_another_clock() {
        let here = kvm_pit_channel_state { count: 65536, mode: 2, count_load_time: 900, ..Default::default() };
        let there = load_channel(&save_channel(&here, 1000), 50);
        assert_eq!(there, kvm_pit_channel_state { count_load_time: -50, ..here });
    }
}
