//! MSRs: which are saved, and what happens with those that KVM does not take back.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use wherry_state::UnitError;

use super::super::kvm;
use crate::vm::VmError;

/// IA32_TIME_STAMP_COUNTER.
pub(crate) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// IA32_MISC_ENABLE, and the bit for fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: MTRRs are on, memory is write-back by default. With MTRRs off, Linux uses no PAT.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);
/// What firmware would have set before a kernel starts.
pub(crate) const AT_BOOT: [(u32, u64); 2] = [MISC_ENABLE, MTRR_DEF_TYPE];

/// MSRs that a guest can write, that KVM keeps, and that its list does not have.
fn unlisted() -> impl Iterator<Item = u32> {
    // MTRRs: variable ranges, fixed ranges, default type. Then the one machine check bank (see `assemble`).
    (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f).chain([MTRR_DEF_TYPE.0]).chain(0x400..=0x403)
}

/// Whether an MSR of KVM's list is saved with the others.
fn wanted(index: u32) -> bool {
    match index {
        // Carried apart, in an order and with a meaning of their own.
        TSC | TSC_DEADLINE => false,
        // The old numbers of the kvm-clock's MSRs: the same registers as 0x4b564d00 and 0x4b564d01, which are listed too.
        0x11 | 0x12 => false,
        // Hyper-V's synthetic MSRs: our guests' CPUID never offers them.
        0x4000_0000..=0x4000_01ff => false,
        _ => true,
    }
}

/// The MSRs of KVM's list that this vCPU can read, and those that KVM does not list: the others are features its CPUID
/// does not offer.
pub(crate) fn readable(vcpu: &VcpuFd, list: &[u32]) -> Result<Vec<u32>, VmError> {
    let mut indices: Vec<u32> = list.iter().copied().filter(|index| wanted(*index)).collect();
    for index in unlisted() {
        if !indices.contains(&index) {
            indices.push(index);
        }
    }
    let mut checked = 0;
    while checked < indices.len() {
        let end = indices.len().min(checked + KVM_MAX_MSR_ENTRIES);
        let mut msrs = entries(&indices[checked..end], |_| 0)
            .ok_or_else(|| VmError::Lacks(vec!["a list of MSRs of a sensible length".into()]))?;
        checked += vcpu.get_msrs(&mut msrs).map_err(VmError::kvm("reading MSRs"))?;
        if checked < end {
            indices.remove(checked);
        }
    }
    Ok(indices)
}

fn entries(indices: &[u32], value: impl Fn(usize) -> u64) -> Option<Msrs> {
    let list: Vec<_> = indices
        .iter()
        .enumerate()
        .map(|(i, index)| kvm_msr_entry { index: *index, reserved: 0, data: value(i) })
        .collect();
    Msrs::from_entries(&list).ok()
}

/// Buffers to read always the same MSRs; made once, so that a save allocates little.
#[derive(Debug)]
pub(crate) struct MsrReader {
    chunks: Vec<Msrs>,
}

impl MsrReader {
    pub(crate) fn new(indices: &[u32]) -> Self {
        // A chunk is never longer than what `Msrs` takes.
        Self { chunks: indices.chunks(KVM_MAX_MSR_ENTRIES).filter_map(|c| entries(c, |_| 0)).collect() }
    }

    /// Reads them; numbers and values, in the order of the list.
    pub(crate) fn read(&mut self, vcpu: &VcpuFd) -> Result<(Vec<u32>, Vec<u64>), UnitError> {
        let total = self.chunks.iter().map(|c| c.as_slice().len()).sum();
        let (mut numbers, mut values) = (Vec::with_capacity(total), Vec::with_capacity(total));
        for chunk in &mut self.chunks {
            let read = vcpu.get_msrs(chunk).map_err(kvm("reading MSRs"))?;
            if let Some(failed) = chunk.as_slice().get(read) {
                return Err(UnitError::failed(format!("reading MSR {:#x}, which could be read before", failed.index)));
            }
            numbers.extend(chunk.as_slice().iter().map(|e| e.index));
            values.extend(chunk.as_slice().iter().map(|e| e.data));
        }
        Ok((numbers, values))
    }
}

/// Reads one MSR.
pub(crate) fn get(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut one = entries(&[index], |_| 0)?;
    (vcpu.get_msrs(&mut one).ok()? == 1).then(|| one.as_slice()[0].data)
}

/// Sets MSRs. One that KVM does not take is tolerated only if it has the value already, or if this vCPU does not have
/// it and the value is 0, which is what it would read as if it did. All others are named in the error.
pub(crate) fn set(vcpu: &VcpuFd, numbers: &[u32], values: &[u64]) -> Result<(), UnitError> {
    if numbers.len() != values.len() {
        return Err(UnitError::failed(format!("{} MSRs have {} values", numbers.len(), values.len())));
    }
    let mut refused = Vec::new();
    let mut done = 0;
    while done < numbers.len() {
        let end = numbers.len().min(done + KVM_MAX_MSR_ENTRIES);
        let msrs = entries(&numbers[done..end], |i| values[done + i])
            .ok_or_else(|| UnitError::failed("the list of MSRs is too long"))?;
        done += vcpu.set_msrs(&msrs).map_err(kvm("setting MSRs"))?;
        if done < end {
            let (index, value) = (numbers[done], values[done]);
            let here = get(vcpu, index);
            if here.unwrap_or(0) != value {
                refused.push(format!(
                    "{index:#x} to {value:#x} (here {})",
                    match here {
                        Some(here) => format!("it is {here:#x}"),
                        None => "it does not exist".into(),
                    }
                ));
            }
            done += 1;
        }
    }
    if refused.is_empty() {
        Ok(())
    } else {
        Err(UnitError::failed(format!("KVM does not set MSR {}", refused.join(", "))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_carried_apart_and_aliases_once() {
        for index in [TSC, TSC_DEADLINE, 0x11, 0x12, 0x4000_0000, 0x4000_0118] {
            assert!(!wanted(index), "{index:#x}");
        }
        for index in [0x174, 0x277, 0x4b56_4d00, 0x4b56_4d01, 0xc000_0080] {
            assert!(wanted(index), "{index:#x}");
        }
    }
}
