//! The unit `vcpu`, one for each vCPU.
//!
//! Order of a restore, and why: special registers first, for they say whether the local APIC is in x2APIC mode and
//! whether SVM is on; the TSC before the MSRs that compare with it; nested state after the MSRs that allow it; the local
//! APIC before its TSC deadline, because setting the APIC forgets the deadline, and the guest's timer would be dead;
//! events last, because nothing may be injected in between.
//!
//! Setting the kvm-clock's MSRs touches guest memory, so a restore may wait for a page; its caller has a deadline.
#![expect(unsafe_code, reason = "the XSAVE area, whose length only KVM knows, and nested state")]

mod convert;
pub(crate) mod msrs;
pub mod saved;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{Xsave, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use wherry_state::{Saved, SavedState, Section, StateUnit, UnitError, UnitId};

use self::msrs::MsrReader;
use self::saved::{DebugRegisters, Events, Registers, SpecialRegisters, Tsc, VcpuState, Xcr};
use super::clock::{Carry, TimeBase};
use super::{Once, bad, kvm};
use crate::vcpu::{Hold, Vcpu};
use crate::vm::{ExitNotice, Host, ioctl};

/// What all vCPUs of a machine have in common.
pub(crate) struct VcpuTraits {
    pub(crate) host: Arc<Host>,
    pub(crate) time: Arc<TimeBase>,
    pub(crate) notice: ExitNotice,
    /// The MSRs to save.
    pub(crate) msrs: Vec<u32>,
    /// Bytes of the XSAVE area, at least 4096.
    pub(crate) xsave_bytes: usize,
    /// The guest's TSC frequency in kHz.
    pub(crate) tsc_khz: u32,
    /// The TSC offset can be read and set, and the guest's TSC is not scaled.
    pub(crate) tsc_offset: bool,
    /// CPUID offers a hypervisor's features, so there may be nested state.
    pub(crate) nested: bool,
}

/// Buffers that exist before they are needed in a blackout.
struct Buffers {
    msrs: MsrReader,
    xsave: Option<Xsave>,
}

pub(crate) struct VcpuUnit {
    vcpu: Arc<Vcpu>,
    common: Arc<VcpuTraits>,
    buffers: Mutex<Buffers>,
    once: Once,
}

impl VcpuUnit {
    pub(crate) fn new(vcpu: Arc<Vcpu>, common: Arc<VcpuTraits>) -> Self {
        let words = (common.xsave_bytes - size_of::<kvm_xsave>()).div_ceil(4);
        let xsave = if common.host.xsave2 { Xsave::new(words).ok() } else { None };
        let buffers = Mutex::new(Buffers { msrs: MsrReader::new(&common.msrs), xsave });
        Self { vcpu, common, buffers, once: Once::default() }
    }

    fn save_xsave(&self, fd: &VcpuFd, buffer: &mut Option<Xsave>) -> Result<Vec<u8>, UnitError> {
        let mut bytes = Vec::with_capacity(self.common.xsave_bytes);
        let mut take = |words: &[u32]| words.iter().for_each(|w| bytes.extend_from_slice(&w.to_le_bytes()));
        match buffer {
            Some(xsave) => {
                // SAFETY: the buffer was made for as many bytes as KVM_CAP_XSAVE2 said, which is what KVM writes.
                unsafe { fd.get_xsave2(xsave) }.map_err(kvm("reading the XSAVE area"))?;
                take(&xsave.as_fam_struct_ref().xsave.region);
                take(xsave.as_slice());
            }
            None => take(&fd.get_xsave().map_err(kvm("reading the XSAVE area"))?.region),
        }
        let len = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        bytes.truncate(len);
        Ok(bytes)
    }

    fn load_xsave(&self, fd: &VcpuFd, bytes: &[u8]) -> Result<(), UnitError> {
        let room = if self.common.host.xsave2 { self.common.xsave_bytes } else { size_of::<kvm_xsave>() };
        if bytes.len() > room {
            return Err(UnitError::failed(format!(
                "the XSAVE area has {} bytes, {room} are possible here",
                bytes.len()
            )));
        }
        let words = room.div_ceil(4) - size_of::<kvm_xsave>() / 4;
        let mut xsave = Xsave::new(words).map_err(|e| UnitError::failed(format!("an XSAVE area: {e:?}")))?;
        let word = |chunk: &[u8]| {
            let mut word = [0; 4];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        };
        let (low, high) = bytes.split_at(bytes.len().min(size_of::<kvm_xsave>()));
        // SAFETY: only the fixed part is changed through this reference, the length stays.
        let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
        region.iter_mut().zip(low.chunks(4)).for_each(|(to, from)| *to = word(from));
        xsave.as_mut_slice().iter_mut().zip(high.chunks(4)).for_each(|(to, from)| *to = word(from));
        // SAFETY: the buffer has as many bytes as KVM_CAP_XSAVE2 said (or 4096, without it), which is what KVM reads.
        unsafe { fd.set_xsave2(&xsave) }.map_err(kvm("setting the XSAVE area"))
    }

    fn save_special(&self, fd: &VcpuFd) -> Result<SpecialRegisters, UnitError> {
        let sregs = match self.common.host.sregs2 {
            true => ioctl::get_sregs2(fd),
            false => fd.get_sregs().map(|s| convert::widen(&s)),
        };
        Ok(SpecialRegisters::from(&sregs.map_err(kvm("reading special registers"))?))
    }

    fn save_tsc(&self, fd: &VcpuFd) -> Result<Tsc, UnitError> {
        let deadline = msrs::get(fd, msrs::TSC_DEADLINE).unwrap_or(0);
        let moment = self.common.time.saved().ok_or_else(|| UnitError::failed("the clock was not saved before it"))?;
        if self.common.tsc_offset {
            let offset = ioctl::get_tsc_offset(fd).map_err(kvm("reading the TSC offset"))?;
            return Ok(Tsc { value: moment.host_tsc.wrapping_add(offset), offset: Some(offset), deadline });
        }
        let value = msrs::get(fd, msrs::TSC).ok_or_else(|| UnitError::failed("reading the TSC"))?;
        // Back to the moment at which the clock was saved. Scaled or not, a few microseconds are the same within a tick.
        let since = ioctl::host_tsc().wrapping_sub(moment.host_tsc);
        Ok(Tsc { value: value.wrapping_sub(since), offset: None, deadline })
    }

    fn load_tsc(&self, fd: &VcpuFd, tsc: &Tsc) -> Result<(), UnitError> {
        let carry =
            self.common.time.carry().ok_or_else(|| UnitError::failed("the clock was not restored before it"))?;
        if self.common.tsc_offset {
            let offset = match (carry, tsc.offset) {
                (Carry::SameHost { .. }, Some(offset)) => offset,
                _ => offset(carry, tsc.value, self.common.tsc_khz),
            };
            ioctl::set_tsc_offset(fd, offset).map_err(kvm("setting the TSC offset"))?;
            let here = ioctl::get_tsc_offset(fd).map_err(kvm("reading the TSC offset"))?;
            let corrected = self.common.host.tsc_movable && close_enough(here, offset, self.common.tsc_khz);
            if here != offset && !corrected {
                let reason = "this host's KVM does not move the guest's TSC, which would go wrong by";
                return Err(UnitError::failed(format!("{reason} {} ticks", offset.wrapping_sub(here) as i64)));
            }
            return Ok(());
        }
        let value = offset(carry, tsc.value, self.common.tsc_khz).wrapping_add(ioctl::host_tsc());
        msrs::set(fd, &[msrs::TSC], &[value])
    }

    fn save_nested(&self, fd: &VcpuFd) -> Result<Option<Vec<u8>>, UnitError> {
        if !self.common.nested {
            return Ok(None);
        }
        let mut buffer = KvmNestedStateBuffer::empty();
        match fd.nested_state(&mut buffer) {
            Ok(None) => Ok(None),
            Ok(Some(len)) => {
                let len = len.get().min(size_of::<KvmNestedStateBuffer>());
                // SAFETY: the buffer was zeroed before KVM wrote `len` bytes of it, so all bytes are initialised.
                let bytes = unsafe { std::slice::from_raw_parts((&raw const buffer).cast::<u8>(), len) };
                Ok(Some(bytes.to_vec()))
            }
            // Some KVM back ends have the capability and not the call.
            Err(e) if e.errno() == libc::EINVAL => Ok(None),
            Err(e) => Err(kvm("reading nested state")(e)),
        }
    }

    fn load_nested(&self, fd: &VcpuFd, bytes: &[u8]) -> Result<(), UnitError> {
        let mut buffer = KvmNestedStateBuffer::empty();
        if bytes.len() > size_of::<KvmNestedStateBuffer>() || bytes.len() < 8 {
            return Err(UnitError::failed(format!("nested state of {} bytes", bytes.len())));
        }
        // SAFETY: fits; the structure is plain bytes, any of which are valid.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut buffer).cast::<u8>(), bytes.len()) };
        buffer.size = bytes.len() as u32;
        fd.set_nested_state(&buffer).map_err(kvm("setting nested state"))
    }

    fn gather(&self) -> Result<VcpuState, UnitError> {
        let fd = self.vcpu.fd();
        let buffers = &mut *self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        // The MP state first: reading it lets pending INIT and SIPI act, which changes the other registers.
        let mp_state = fd.get_mp_state().map_err(kvm("reading the MP state"))?.mp_state;
        let regs = fd.get_regs().map_err(kvm("reading registers"))?;
        let xcrs = fd.get_xcrs().map_err(kvm("reading XCRs"))?;
        let events = fd.get_vcpu_events().map_err(kvm("reading events"))?;
        let debug = fd.get_debug_regs().map_err(kvm("reading debug registers"))?;
        let lapic = fd.get_lapic().map_err(kvm("reading the local APIC"))?;
        let (msr_numbers, msr_values) = buffers.msrs.read(&fd)?;
        let xcrs = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
        Ok(VcpuState {
            registers: Some(Registers::from(&regs)),
            special: Some(self.save_special(&fd)?),
            xcrs: xcrs.map(|x| Xcr { number: x.xcr, value: x.value }).collect(),
            xsave: self.save_xsave(&fd, &mut buffers.xsave)?,
            msr_numbers,
            msr_values,
            lapic: lapic.regs.iter().map(|b| *b as u8).collect(),
            events: Some(Events::from(&events)),
            mp_state,
            debug: Some(DebugRegisters::from(&debug)),
            tsc: Some(self.save_tsc(&fd)?),
            nested: self.save_nested(&fd)?,
        })
    }

    fn load(&self, section: &Section, state: &VcpuState) -> Result<(), UnitError> {
        let missing = |what: &str| bad(section, format!("{what} missing or misshapen"));
        let sregs = state.special.as_ref().and_then(convert::sregs2).ok_or_else(|| missing("special registers"))?;
        let regs = state.registers.as_ref().ok_or_else(|| missing("registers"))?;
        let events = state.events.as_ref().ok_or_else(|| missing("events"))?;
        let debug = state.debug.as_ref().and_then(convert::debugregs).ok_or_else(|| missing("debug registers"))?;
        let tsc = state.tsc.as_ref().ok_or_else(|| missing("the TSC"))?;
        let mut lapic = kvm_lapic_state::default();
        if state.lapic.len() != lapic.regs.len() {
            return Err(missing("the local APIC"));
        }
        lapic.regs.iter_mut().zip(&state.lapic).for_each(|(to, from)| *to = *from as _);
        let mut xcrs = kvm_xcrs::default();
        if state.xcrs.len() > xcrs.xcrs.len() {
            return Err(missing("XCRs"));
        }
        xcrs.nr_xcrs = state.xcrs.len() as u32;
        for (to, from) in xcrs.xcrs.iter_mut().zip(&state.xcrs) {
            *to = kvm_xcr { xcr: from.number, reserved: 0, value: from.value };
        }

        let fd = self.vcpu.fd();
        fd.set_mp_state(kvm_mp_state { mp_state: state.mp_state }).map_err(kvm("setting the MP state"))?;
        match self.common.host.sregs2 {
            true => ioctl::set_sregs2(&fd, &sregs),
            false => fd.set_sregs(&convert::narrow(&sregs)),
        }
        .map_err(kvm("setting special registers"))?;
        fd.set_regs(&kvm_regs::from(regs)).map_err(kvm("setting registers"))?;
        if xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&xcrs).map_err(kvm("setting XCRs"))?;
        }
        self.load_xsave(&fd, &state.xsave)?;
        fd.set_debug_regs(&debug).map_err(kvm("setting debug registers"))?;
        self.load_tsc(&fd, tsc)?;
        msrs::set(&fd, &state.msr_numbers, &state.msr_values)?;
        if let Some(nested) = &state.nested {
            self.load_nested(&fd, nested)?;
        }
        fd.set_lapic(&lapic).map_err(kvm("setting the local APIC"))?;
        if tsc.deadline != 0 {
            msrs::set(&fd, &[msrs::TSC_DEADLINE], &[tsc.deadline])?;
        }
        fd.set_vcpu_events(&events.into()).map_err(kvm("setting events"))
    }
}

/// What has to be added to this host's TSC to make a guest's, if its TSC was `value` at the moment of the save.
fn offset(carry: Carry, value: u64, tsc_khz: u32) -> u64 {
    match carry {
        Carry::SameHost { saved_tsc } => value.wrapping_sub(saved_tsc),
        Carry::OtherHost { now, passed_ns } => {
            let ticks = u128::from(passed_ns) * u128::from(tsc_khz) / 1_000_000;
            value.wrapping_add(ticks as u64).wrapping_sub(now.host_tsc)
        }
    }
}

impl StateUnit for VcpuUnit {
    fn id(&self) -> UnitId {
        UnitId::new("vcpu", self.vcpu.index())
    }

    fn depends_on(&self) -> &[&str] {
        &["clock", "irqchip", "pit", "serial", "rtc", "pci-host", "acpi", "vfio-user", "vfio"]
    }

    fn schema(&self) -> u32 {
        VcpuState::SCHEMA
    }

    fn drain(&self, _: Instant) -> Result<(), UnitError> {
        Ok(())
    }

    fn undrain(&self) -> Result<(), UnitError> {
        Ok(())
    }

    fn begin_stop(&self) -> Result<(), UnitError> {
        self.vcpu.hold_hurriedly(Hold::Unit);
        Ok(())
    }

    fn finish_stop(&self, deadline: Instant) -> Result<(), UnitError> {
        if !self.vcpu.wait_rest(deadline) {
            return Err(UnitError::Deadline(
                "it is still in the guest or in a device; it may wait for memory that is not there yet".into(),
            ));
        }
        match self.common.notice.reason() {
            // Its state is not one to go on from; somebody must hear of it where the machine is.
            Some(reason) => Err(UnitError::failed(format!("the machine has ended: {reason}"))),
            None => Ok(()),
        }
    }

    fn save(&self) -> Result<Saved, UnitError> {
        Ok(Saved::Section(self.gather()?.to_section(&self.id())))
    }

    fn restore(&self, section: &Section) -> Result<(), UnitError> {
        let state = VcpuState::from_section(section)?;
        self.once.restoring()?;
        self.load(section, &state)
    }

    fn start(&self) -> Result<(), UnitError> {
        self.once.started();
        // Tells the guest that it was not running, so that its watchdogs forgive the gap. EINVAL: it has no kvm-clock.
        // Only at rest: the vCPU of a stop that failed is still in the guest, and nothing was missed.
        if self.vcpu.wait_rest(Instant::now())
            && let Err(e) = self.vcpu.fd().kvmclock_ctrl()
            && e.errno() != libc::EINVAL
        {
            return Err(kvm("telling the guest of the pause")(e));
        }
        self.vcpu.release(Hold::Unit);
        Ok(())
    }
}

/// Whether KVM took a TSC offset but for a correction: on a host whose TSC it calls unstable it changes what it is given by
/// some microseconds. A guest stands still for longer than that, so its TSC does not go backwards by it.
fn close_enough(here: u64, wanted: u64, khz: u32) -> bool {
    const SLACK_US: u64 = 100;
    (here.wrapping_sub(wanted) as i64).unsigned_abs() <= u64::from(khz) * SLACK_US / 1000
}

#[cfg(test)]
mod tests {
    use super::super::clock::Moment;
    use super::*;

    #[test]
    fn an_offset_that_an_unstable_host_corrects_is_taken_and_one_it_ignores_is_not() {
        let wanted = 5u64.wrapping_sub(1 << 50);
        assert!(close_enough(wanted, wanted, 2_600_000));
        // Seen: 64,940 ticks at 2.6 GHz, 25 us.
        assert!(close_enough(wanted.wrapping_add(64_940), wanted, 2_600_000));
        assert!(close_enough(wanted.wrapping_sub(64_940), wanted, 2_600_000));
        assert!(!close_enough(wanted.wrapping_add(260_001), wanted, 2_600_000));
        assert!(!close_enough(0, wanted, 2_600_000));
    }

    #[test]
    fn a_tsc_goes_on_by_what_the_clock_says_has_passed() {
        let now = Moment { kvmclock_ns: 0, realtime_ns: 0, host_tsc: 1_000 };
        let guest = |carry, host_tsc: u64| host_tsc.wrapping_add(offset(carry, 5_000_000, 3_000_000));
        // 10 us at 3 GHz, and 7 ticks since the clock was restored.
        assert_eq!(guest(Carry::OtherHost { now, passed_ns: 10_000 }, 1_007), 5_030_007);
        // A host whose TSC is far ahead of the guest's.
        let now = Moment { host_tsc: 1 << 60, ..now };
        assert_eq!(guest(Carry::OtherHost { now, passed_ns: 0 }, 1 << 60), 5_000_000);
        assert_eq!(guest(Carry::SameHost { saved_tsc: 400 }, 410), 5_000_010);
    }
}
