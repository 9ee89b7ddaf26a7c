//! Boot: puts a kernel, its initial RAM disk and its command line into guest RAM and says how the first vCPU starts.
//!
//! There is no firmware. [`load`] recognises the image and follows one of two protocols:
//!
//! - [`elf`]: an ELF with a PVH entry (Xen's `docs/misc/pvh.pandoc`) starts in 32-bit protected mode, paging off, with
//!   the address of `hvm_start_info` in `ebx`.
//! - [`bzimage`]: a Linux bzImage (the kernel's `Documentation/arch/x86/boot.rst`) starts at its 64-bit entry with
//!   identity page tables and the address of the zero page in `rsi`.
//!
//! [`entry_state`] turns the result into vCPU registers. [`memory_map`] is what both tell the guest about its memory.
//!
//! Contract: RAM is fresh, that is zero, and no vCPU runs. Images are hostile input: everything is checked against
//! the memory map before it is written, and nothing is written outside RAM. What this module writes below 1 MiB is
//! listed in [`low`].

mod bzimage;
mod elf;
mod entry;
mod memory_map;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use wherry_memory::GuestMemory;

pub use entry::{Entry, EntrySregs, entry_state};
pub use memory_map::{MapEntry, MapKind, memory_map};

/// Where boot structures lie in low RAM. The guest may reuse all of it once it has read them.
pub mod low {
    /// Four segment descriptors: null, null, code, data. The selectors are those of Linux's boot protocol.
    pub const GDT: u64 = 0x500;
    /// PVH: `hvm_start_info`; Linux: unused.
    pub const START_INFO: u64 = 0x6000;
    /// PVH: `hvm_modlist_entry` of the initial RAM disk.
    pub const MODULES: u64 = 0x6100;
    /// PVH: `hvm_memmap_table_entry` list; at most one page.
    pub const MEMORY_MAP: u64 = 0x6200;
    /// Linux: `boot_params`, one page.
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Linux: PML4, PDPT and four page directories that map the first 4 GiB one to one.
    pub const PAGE_TABLES: u64 = 0x9000;
    /// The command line and its closing NUL.
    pub const CMDLINE: u64 = 0x2_0000;
    /// First address behind the space for the command line.
    pub const CMDLINE_END: u64 = 0x3_0000;
    /// Kernels are loaded at or above this.
    pub const KERNEL_MIN: u64 = 0x10_0000;
}

/// What PVH guests can be given: the length of Linux's own buffer, without the closing NUL.
const PVH_CMDLINE_MAX: usize = 2047;

/// Where a kernel image comes from.
#[derive(Clone, Debug)]
pub enum KernelSource<'a> {
    /// A file.
    Path(&'a Path),
    /// Bytes in this process; the name is for messages.
    Bytes {
        /// What to call it.
        name: &'a str,
        /// The image.
        image: &'a [u8],
    },
}

impl KernelSource<'_> {
    fn name(&self) -> String {
        match self {
            KernelSource::Path(path) => path.display().to_string(),
            KernelSource::Bytes { name, .. } => (*name).to_string(),
        }
    }
}

/// A guest cannot be booted from what was given.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("reading {what} {}: {source}", path.display())]
    Read {
        /// `the kernel` or `the initial RAM disk`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image is of no known kind.
    #[error("{name} is neither a Linux bzImage nor an ELF: {hint}")]
    NotAKernel {
        /// The image.
        name: String,
        /// What it looks like, or what to try.
        hint: &'static str,
    },
    /// The ELF is damaged or for another machine.
    #[error("{name} is not a usable x86 ELF: {reason}")]
    BadElf {
        /// The image.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The ELF cannot be started.
    #[error(
        "{0} is an ELF without a PVH entry (note XEN_ELFNOTE_PHYS32_ENTRY): build Linux with CONFIG_PVH=y, or use its \
         bzImage"
    )]
    NoPvhEntry(String),
    /// The bzImage is damaged or too old.
    #[error("{name} is not a usable bzImage: {reason}")]
    BadBzImage {
        /// The image.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The kernel does not fit into RAM.
    #[error("{name} needs the guest addresses {start:#x}..{end:#x}, which are not all free RAM: give more memory")]
    KernelDoesNotFit {
        /// The image.
        name: String,
        /// First address it needs.
        start: u64,
        /// End of what it needs.
        end: u64,
    },
    /// The initial RAM disk does not fit into RAM beside the kernel.
    #[error(
        "the initial RAM disk of {size} bytes does not fit between the kernel's end at {from:#x} and {limit:#x}: give \
         more memory or a smaller disk"
    )]
    InitrdDoesNotFit {
        /// Its size in bytes.
        size: u64,
        /// First address behind the kernel.
        from: u64,
        /// First address it may not reach.
        limit: u64,
    },
    /// The command line is too long.
    #[error("the command line has {len} bytes; this kernel takes {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// What is possible.
        max: usize,
    },
    /// The command line has a NUL in it.
    #[error("the command line has a NUL byte at position {0}")]
    CmdlineNul(usize),
    /// RAM could not be written.
    #[error("writing {what} into guest RAM: {source}")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// Why it failed.
        source: GuestMemoryError,
    },
}

/// Loads a kernel, an initial RAM disk and a command line. `rsdp` is where the ACPI tables begin, if there are any.
pub fn load(
    memory: &GuestMemory,
    kernel: &KernelSource<'_>,
    initrd: Option<&Path>,
    cmdline: &str,
    rsdp: Option<u64>,
) -> Result<Entry, BootError> {
    let name = kernel.name();
    let read;
    let image = match kernel {
        KernelSource::Bytes { image, .. } => *image,
        KernelSource::Path(path) => {
            let wrap = |source| BootError::Read { what: "the kernel", path: path.to_path_buf(), source };
            read = std::fs::read(path).map_err(wrap)?;
            &read
        }
    };
    if let Some(position) = cmdline.bytes().position(|b| b == 0) {
        return Err(BootError::CmdlineNul(position));
    }
    let boot = Boot { memory, name, initrd, cmdline, rsdp, map: memory_map(memory) };
    match image {
        [0x7f, b'E', b'L', b'F', ..] => elf::load(&boot, image),
        _ if image.get(0x202..0x206) == Some(b"HdrS") => bzimage::load(&boot, image),
        _ => {
            let hint = match image {
                [0x1f, 0x8b, ..] => "it is compressed by gzip; decompress it first",
                [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is compressed by zstd; decompress it first",
                [] => "it is empty",
                _ => "give a bzImage (such as /boot/vmlinuz-*) or an ELF with a PVH entry",
            };
            Err(BootError::NotAKernel { name: boot.name, hint })
        }
    }
}

/// What both protocols work on.
struct Boot<'a> {
    memory: &'a GuestMemory,
    name: String,
    initrd: Option<&'a Path>,
    cmdline: &'a str,
    rsdp: Option<u64>,
    map: Vec<MapEntry>,
}

impl Boot<'_> {
    /// Checks that a range is RAM which the memory map calls usable, at or above [`low::KERNEL_MIN`].
    fn check_kernel(&self, start: u64, len: u64) -> Result<u64, BootError> {
        let end = start.saturating_add(len);
        let usable = self.map.iter().any(|e| e.kind == MapKind::Ram && e.start <= start && end <= e.start + e.size);
        if usable && start >= low::KERNEL_MIN && start.checked_add(len).is_some() {
            return Ok(end);
        }
        Err(BootError::KernelDoesNotFit { name: self.name.clone(), start, end })
    }

    fn write(&self, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Memory { what, source })
    }

    /// Writes the command line where [`low::CMDLINE`] says.
    fn write_cmdline(&self, max: usize) -> Result<(), BootError> {
        let max = max.min((low::CMDLINE_END - low::CMDLINE) as usize - 1);
        if self.cmdline.len() > max {
            return Err(BootError::CmdlineTooLong { len: self.cmdline.len(), max });
        }
        self.write("the command line", low::CMDLINE, self.cmdline.as_bytes())?;
        self.write("the command line", low::CMDLINE + self.cmdline.len() as u64, &[0])
    }

    /// Writes the initial RAM disk as high as possible in the RAM block that begins at 0, behind `kernel_end` and below
    /// `limit`. Returns its address and size, or `None` if there is none.
    fn write_initrd(&self, kernel_end: u64, limit: u64) -> Result<Option<(u64, u64)>, BootError> {
        let Some(path) = self.initrd else { return Ok(None) };
        let wrap = |source| BootError::Read { what: "the initial RAM disk", path: path.to_path_buf(), source };
        let mut file = File::open(path).map_err(wrap)?;
        let size = file.metadata().map_err(wrap)?.len();
        if size == 0 {
            return Err(wrap(io::Error::new(io::ErrorKind::InvalidData, "the file is empty")));
        }
        let from = kernel_end.next_multiple_of(4096);
        let low_end = self.map.iter().find(|e| e.start == low::KERNEL_MIN).map_or(0, |e| e.start + e.size);
        let limit = limit.min(low_end);
        let address = limit
            .checked_sub(size)
            .map(|address| address / 4096 * 4096)
            .filter(|address| *address >= from)
            .ok_or(BootError::InitrdDoesNotFit { size, from, limit })?;
        self.memory
            .read_exact_volatile_from(GuestAddress(address), &mut file, size as usize)
            .map_err(|source| BootError::Memory { what: "the initial RAM disk", source })?;
        Ok(Some((address, size)))
    }
}

#[cfg(test)]
mod tests;
