//! The little ACPI a kernel without drivers needs: which vCPUs there are (MADT). ACPI 6.5, sections 5.2.5 to 5.2.12.

use crate::report::MAX_CPUS;

/// Local APIC ids of the vCPUs that are enabled, in the order of the table.
pub struct Cpus {
    ids: [u32; MAX_CPUS],
    len: usize,
}

impl Cpus {
    /// The ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids[..self.len]
    }

    fn push(&mut self, id: u32) {
        if self.len < MAX_CPUS && !self.ids().contains(&id) {
            self.ids[self.len] = id;
            self.len += 1;
        }
    }
}

const MAPPED: u64 = 0xffff_0000;

/// Reads a value from a table. Tables are plain data below 4 GiB, which is mapped; anything else reads as `None`.
fn get<T: Copy>(gpa: u64) -> Option<T> {
    if gpa == 0 || gpa >= MAPPED {
        return None;
    }
    // SAFETY: mapped, and `T` is an integer or an array of them (private function).
    Some(unsafe { (gpa as *const T).read_unaligned() })
}

/// Address and length of the table with this signature.
fn find(rsdp: u64, signature: &[u8; 4]) -> Option<(u64, u64)> {
    if &get::<[u8; 8]>(rsdp)? != b"RSD PTR " {
        return None;
    }
    let xsdt = if get::<u8>(rsdp + 15)? >= 2 { get::<u64>(rsdp + 24)? } else { 0 };
    let (root, entry_size) = if xsdt != 0 && xsdt < MAPPED { (xsdt, 8) } else { (get::<u32>(rsdp + 16)?.into(), 4) };
    let length = u64::from(get::<u32>(root + 4)?).min(4096);
    let mut at = root + 36;
    while at + entry_size <= root + length {
        let table = if entry_size == 8 { get::<u64>(at)? } else { get::<u32>(at)?.into() };
        if get::<[u8; 4]>(table).as_ref() == Some(signature) {
            return Some((table, get::<u32>(table + 4)?.into()));
        }
        at += entry_size;
    }
    None
}

/// The vCPUs that the MADT lists as enabled. `None` without a MADT.
pub fn cpus(rsdp: u64) -> Option<Cpus> {
    const LOCAL_APIC: u8 = 0;
    const LOCAL_X2APIC: u8 = 9;
    let (madt, length) = find(rsdp, b"APIC")?;
    let mut cpus = Cpus { ids: [0; MAX_CPUS], len: 0 };
    let mut at = madt + 44;
    while at + 2 <= madt + length {
        let entry: u64 = get::<u8>(at + 1)?.into();
        if entry < 2 {
            return None;
        }
        match get::<u8>(at)? {
            LOCAL_APIC if get::<u32>(at + 4)? & 1 != 0 => cpus.push(get::<u8>(at + 3)?.into()),
            // Without x2APIC mode, ids above 254 cannot be reached.
            LOCAL_X2APIC if get::<u32>(at + 8)? & 1 != 0 && get::<u32>(at + 4)? < 255 => {
                cpus.push(get::<u32>(at + 4)?);
            }
            _ => {}
        }
        at += entry;
    }
    Some(cpus)
}
