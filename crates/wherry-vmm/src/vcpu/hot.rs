//! Which pages a vCPU at rest will touch first, seen from its registers: in a postcopy they go before the switch, so
//! that the guest does not begin with a chain of remote faults, one behind the other.
//!
//! A guess, and harmless if wrong: what is missed is asked for, what is not needed was a few pages. Page tables are
//! walked as the CPU would (Intel SDM 3A, 4.5); nothing is written, and tables that lead out of RAM end the walk.

use std::collections::BTreeSet;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::Vcpu;

const PAGE: u64 = 4096;
/// CR0.PG, EFER.LMA, CR4.LA57.
const PAGING: u64 = 1 << 31;
const LONG_MODE: u64 = 1 << 10;
const LA57: u64 = 1 << 12;
/// Of an entry: present, maps a large page, and the address.
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// What the kernel of a guest goes through at once: its per-CPU data, and where the host keeps its clock.
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

impl Vcpu {
    /// Guest physical pages (numbers) that it will touch first. Empty if it cannot be told.
    pub(crate) fn hot_pages<M: GuestMemoryBackend>(&self, memory: &M) -> BTreeSet<u64> {
        let fd = self.fd();
        let (Ok(regs), Ok(sregs)) = (fd.get_regs(), fd.get_sregs()) else { return BTreeSet::new() };
        let msr = |index| {
            let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
            (fd.get_msrs(&mut one).ok()? == 1).then(|| one.as_slice()[0].data)
        };
        let mut pages = touched_first(memory, &regs, &sregs, msr(KERNEL_GS_BASE));
        if let Some(clock) = msr(KVM_SYSTEM_TIME).filter(|value| value & 1 != 0) {
            pages.insert(clock / PAGE);
        }
        pages
    }
}

fn touched_first<M: GuestMemoryBackend>(
    memory: &M,
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    kernel_gs: Option<u64>,
) -> BTreeSet<u64> {
    let r = regs;
    let general =
        [r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    let tables = [sregs.gdt.base, sregs.idt.base, sregs.tr.base, sregs.fs.base, sregs.gs.base];
    let code = [r.rip, r.rip.wrapping_add(PAGE), r.rsp, r.rsp.wrapping_sub(PAGE)];
    let walk = Walk::new(sregs);
    let mut pages = BTreeSet::new();
    for address in code.into_iter().chain(tables).chain(kernel_gs).chain(general) {
        walk.follow(memory, address, &mut pages);
    }
    pages
}

/// How addresses are translated.
enum Walk {
    /// They are physical.
    None,
    /// Through so many levels of tables, from the root.
    Tables { root: u64, levels: u32 },
    /// In a way that long gone kernels use.
    Unknown,
}

impl Walk {
    fn new(sregs: &kvm_sregs) -> Self {
        match (sregs.cr0 & PAGING != 0, sregs.efer & LONG_MODE != 0) {
            (false, _) => Self::None,
            (true, true) => {
                Self::Tables { root: sregs.cr3 & ADDRESS, levels: if sregs.cr4 & LA57 != 0 { 5 } else { 4 } }
            }
            (true, false) => Self::Unknown,
        }
    }

    /// Adds the page of an address, and the tables on the way to it, if there is one.
    fn follow<M: GuestMemoryBackend>(&self, memory: &M, address: u64, pages: &mut BTreeSet<u64>) {
        let in_ram = |page: u64| memory.address_in_range(GuestAddress(page.saturating_mul(PAGE)));
        let (root, levels) = match self {
            Self::Tables { root, levels } => (*root, *levels),
            Self::None => {
                pages.extend(Some(address / PAGE).filter(|page| in_ram(*page)));
                return;
            }
            Self::Unknown => return,
        };
        let sign = 64 - (12 + 9 * levels);
        if ((address << sign) as i64 >> sign) as u64 != address {
            return;
        }
        let mut way = vec![];
        let mut table = root;
        for level in (0..levels).rev() {
            if !in_ram(table / PAGE) {
                return;
            }
            way.push(table / PAGE);
            let index = address >> (12 + 9 * level) & 511;
            let Ok(entry) = memory.read_obj::<u64>(GuestAddress(table + index * 8)) else { return };
            if entry & PRESENT == 0 {
                return;
            }
            let large = (level == 1 || level == 2) && entry & LARGE != 0;
            if large || level == 0 {
                let inside = if large { (1 << (12 + 9 * level)) - 1 } else { PAGE - 1 };
                let page = ((entry & ADDRESS & !inside) | (address & inside)) / PAGE;
                if in_ram(page) {
                    pages.extend(way);
                    pages.insert(page);
                }
                return;
            }
            table = entry & ADDRESS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    type Memory = GuestMemoryMmap<()>;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
    }

    fn entry(memory: &Memory, table: u64, index: u64, value: u64) {
        memory.write_obj(value, GuestAddress(table + index * 8)).unwrap();
    }

    fn long_mode(root: u64) -> kvm_sregs {
        kvm_sregs { cr0: PAGING, cr3: root, efer: LONG_MODE, ..Default::default() }
    }

    #[test]
    fn small_and_large_pages_are_found_with_the_tables_that_lead_to_them() {
        let memory = memory();
        // 0x1000 -> 0x2000 -> 0x3000 -> 0x4000 -> page 9 at address 0; 2 MiB at address 2 MiB.
        entry(&memory, 0x1000, 0, 0x2003);
        entry(&memory, 0x2000, 0, 0x3003);
        entry(&memory, 0x3000, 0, 0x4003);
        entry(&memory, 0x3000, 1, 0x0020_0083);
        entry(&memory, 0x4000, 0, 0x9003);
        let walk = Walk::new(&long_mode(0x1000));
        let mut pages = BTreeSet::new();
        walk.follow(&memory, 0x123, &mut pages);
        assert_eq!(pages, [1, 2, 3, 4, 9].into());
        pages.clear();
        walk.follow(&memory, 0x20_5678, &mut pages);
        assert_eq!(pages, [1, 2, 3, 0x205].into());
    }

    #[test]
    fn tables_that_lead_nowhere_and_addresses_that_are_none_give_no_pages() {
        let memory = memory();
        entry(&memory, 0x1000, 0, 0x2003);
        // Not present; outside RAM; a loop is only as long as there are levels.
        entry(&memory, 0x2000, 1, 0x3002);
        entry(&memory, 0x2000, 2, 0xffff_ffff_f003);
        entry(&memory, 0x1000, 3, 0x1003);
        entry(&memory, 0x1000, 511, 0x1003);
        let walk = Walk::new(&long_mode(0x1000));
        for address in [0, 1 << 30, 2 << 30, 0x0000_8000_0000_0000, u64::MAX / 2] {
            let mut pages = BTreeSet::new();
            walk.follow(&memory, address, &mut pages);
            assert!(pages.is_empty(), "{address:#x}: {pages:?}");
        }
        let mut pages = BTreeSet::new();
        walk.follow(&memory, u64::MAX, &mut pages);
        assert_eq!(pages, [1].into(), "a table that maps itself is a page, too");
        Walk::new(&long_mode(0xdead_b000)).follow(&memory, 0, &mut pages);
        assert_eq!(pages.len(), 1);
    }

    #[test]
    fn without_paging_addresses_are_physical_and_only_ram_counts() {
        let memory = memory();
        let regs = kvm_regs { rip: 0x5000, rsp: 0x8000, rsi: 0xfee0_0000, ..Default::default() };
        let pages = touched_first(&memory, &regs, &kvm_sregs::default(), None);
        assert_eq!(pages, [0, 5, 6, 7, 8].into());
    }
}
