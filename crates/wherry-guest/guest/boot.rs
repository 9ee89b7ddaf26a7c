//! What the VMM hands over at the PVH entry: `hvm_start_info` (Xen's `public/arch-x86/hvm/start_info.h`).

pub use crate::ram::MemoryMapEntry;

/// `hvm_start_info`.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

const MAGIC: u32 = 0x336e_c578;
/// Longest command line read.
pub const COMMAND_LINE_BYTES: usize = 1024;
/// Most entries of the memory map read.
pub const MEMORY_MAP_ENTRIES: usize = 64;

unsafe extern "C" {
    #[link_name = "start_info_gpa"]
    static START_INFO_GPA: u64;
}

/// A copy of everything handed over, so that the pages it came in are free.
pub struct BootInfo {
    /// Address of the ACPI root pointer, 0 if there is none.
    pub rsdp: u64,
    command_line: [u8; COMMAND_LINE_BYTES],
    command_line_len: usize,
    memory_map: [MemoryMapEntry; MEMORY_MAP_ENTRIES],
    memory_map_len: usize,
}

impl BootInfo {
    /// Reads what the VMM left.
    ///
    /// # Errors
    /// Says which part makes no sense.
    pub fn read() -> Result<Self, &'static str> {
        let empty = MemoryMapEntry { start: 0, size: 0, kind: 0, reserved: 0 };
        let mut boot = Self {
            rsdp: 0,
            command_line: [0; COMMAND_LINE_BYTES],
            command_line_len: 0,
            memory_map: [empty; MEMORY_MAP_ENTRIES],
            memory_map_len: 0,
        };
        // SAFETY: pvh_start stored the address before ring 3 began.
        let gpa = unsafe { START_INFO_GPA };
        if gpa == 0 || gpa > 0xffff_f000 {
            return Err("the PVH start info is not below 4 GiB");
        }
        // SAFETY: all of the first 4 GiB is mapped; the structure is plain data, checked by its magic.
        let info = unsafe { (gpa as *const StartInfo).read_unaligned() };
        if info.magic != MAGIC {
            return Err("the PVH start info has a wrong magic");
        }
        if info.version < 1 || info.memory_map == 0 || info.memory_map > 0xffff_f000 {
            return Err("the PVH start info has no memory map");
        }
        boot.rsdp = info.rsdp;
        if info.command_line != 0 && info.command_line < 0xffff_f000 {
            for i in 0..COMMAND_LINE_BYTES {
                // SAFETY: mapped, see above; ends at the zero or at our limit.
                let byte = unsafe { ((info.command_line + i as u64) as *const u8).read() };
                if byte == 0 {
                    break;
                }
                boot.command_line[i] = byte;
                boot.command_line_len = i + 1;
            }
            if boot.command_line_len == COMMAND_LINE_BYTES {
                return Err("the command line is too long");
            }
        }
        for i in 0..(info.memory_map_entries as usize).min(MEMORY_MAP_ENTRIES) {
            // SAFETY: mapped, plain data.
            boot.memory_map[i] = unsafe { (info.memory_map as *const MemoryMapEntry).add(i).read_unaligned() };
            boot.memory_map_len = i + 1;
        }
        Ok(boot)
    }

    /// The command line.
    ///
    /// # Errors
    /// It is not UTF-8.
    pub fn command_line(&self) -> Result<&str, &'static str> {
        core::str::from_utf8(&self.command_line[..self.command_line_len]).map_err(|_| "the command line is not UTF-8")
    }

    /// The memory map, in the VMM's order.
    pub fn memory_map(&self) -> &[MemoryMapEntry] {
        &self.memory_map[..self.memory_map_len]
    }
}
