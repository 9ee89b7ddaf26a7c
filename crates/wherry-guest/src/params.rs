//! Parameters of the probe, as they stand on the kernel command line: `name=value`, separated by blanks.
//!
//! This file is compiled into the guest and into the host side (which can check a command line before it starts a
//! machine). It needs only `core`.

use core::fmt;

use crate::accel::{MAX_BYTES, MAX_DEPTH};
use crate::edu::BUFFER_BYTES;
use crate::report::{MAX_CPUS, MAX_DISK_DEPTH, RATE_MAX};
use crate::testdma::{MAX_BUFFER, MAX_ENTRIES, MAX_VECTORS};

/// Which pages are dirtied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Pattern {
    /// Any page, all alike.
    Uniform = 0,
    /// Nine of ten writes go to the hot set (the first pages of each slice), the tenth to any page.
    Hot = 1,
    /// One after the other.
    Sequential = 2,
}

impl Pattern {
    /// The pattern with this number; an unknown number is taken as uniform.
    pub const fn from_u32(value: u32) -> Self {
        match value {
            1 => Self::Hot,
            2 => Self::Sequential,
            _ => Self::Uniform,
        }
    }
}

/// How a page is dirtied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Write {
    /// The whole page is rewritten.
    Page = 0,
    /// One cache line is written.
    Line = 1,
}

/// What a vCPU does when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// It spins, so that its heartbeat never rests.
    Spin,
    /// It halts for about 100 us at a time, woken by its local APIC's timer.
    Halt,
}

/// Whether there is a full copy of the data set beside the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shadow {
    /// The table of generations and checksums only.
    Table,
    /// Every page is kept twice, and both are compared.
    Full,
}

/// All parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// `data=`: size of the data set in bytes. `None` (default): half of the free RAM, at most 512 MiB.
    pub data: Option<u64>,
    /// `from=`: lowest guest physical address of the data set. Default: where RAM is first free.
    pub from: u64,
    /// `rate=`: bytes dirtied per second by all vCPUs, `max` is [`RATE_MAX`]. Default 50M.
    pub rate: u64,
    /// `pattern=uniform|hot|sequential`.
    pub pattern: Pattern,
    /// `hot=`: size of the hot set in thousandths of the data set. Default 10%.
    pub hot_permille: u32,
    /// `verify=`: share of its time that a vCPU spends on verification, in thousandths. Default 20%.
    pub verify_permille: u32,
    /// `write=page|line`.
    pub write: Write,
    /// `precheck=on|off`: check a page before it is overwritten, so that no lost write can hide. Default on.
    pub precheck: bool,
    /// `shadow=table|full`.
    pub shadow: Shadow,
    /// `seed=`: seed of the data.
    pub seed: u64,
    /// `cpus=`: use at most this many vCPUs. Default all.
    pub cpus: usize,
    /// `idle=spin|halt`.
    pub idle: Idle,
    /// `tsc_khz=`: frequency of the TSC, where the guest cannot find out.
    pub tsc_khz: Option<u64>,
    /// `run=`: finish by itself after this many milliseconds of work. `None` (default): never.
    pub run_ms: Option<u64>,
    /// `disk=`: bytes of the first virtio disk that are worked on. `None` (default): none.
    pub disk: Option<u64>,
    /// `disk_depth=`: requests in flight. Default 32.
    pub disk_depth: u16,
    /// `disk_wait=interrupt|poll`.
    pub disk_wait: DiskWait,
    /// `net=on|off`: send frames through the first virtio network device, which have to come back. Default off.
    pub net: bool,
    /// `testdma=ring|wait`: work with the test device for DMA. `None` (default): leave it alone.
    pub testdma: Option<DmaLoad>,
    /// `testdma_interrupt=msix|msi|intx`.
    pub testdma_interrupt: DmaInterrupt,
    /// `testdma_vectors=`: how many vectors it uses in turn. Default 1.
    pub testdma_vectors: u32,
    /// `testdma_entries=`: entries of the ring. Default 256.
    pub testdma_entries: u32,
    /// `testdma_buffer=`: bytes of a buffer. Default 4096.
    pub testdma_buffer: u32,
    /// `testdma_pool=`: bytes of all buffers. Default 8M.
    pub testdma_pool: u64,
    /// `testdma_mask=on|off`: mask and unmask the vectors now and then. Default off.
    pub testdma_mask: bool,
    /// `testdma_plug=on|off`: that device comes and goes while the guest runs: it is looked for at the ports of hot plug, taken
    /// when it comes and let go when that is asked for. Default off: it is there, and stays.
    pub testdma_plug: bool,
    /// `testdma_eject=`: milliseconds that letting it go takes. Default 0.
    pub testdma_eject: u32,
    /// `accel=full|wait`: work with the accelerator. `None` (default): leave it alone.
    pub accel: Option<AccelLoad>,
    /// `accel_bell=register|event|poll`. Default event.
    pub accel_bell: AccelBell,
    /// `accel_depth=`: submissions of a ring under way, at full depth. Default 8.
    pub accel_depth: u32,
    /// `accel_bytes=`: bytes of a job. Default 4096.
    pub accel_bytes: u32,
    /// `accel_key=`: handle of a key for AES-256-GCM. `None` (default): nothing is sealed.
    pub accel_key: Option<u32>,
    /// `edu=`: work with QEMU's educational device, which interrupts so. `None` (default): leave it alone.
    pub edu: Option<EduInterrupt>,
    /// `edu_bytes=`: bytes of a buffer. Default 4096.
    pub edu_bytes: u32,
    /// `edu_raises=`: interrupts without DMA after each DMA. Default 16.
    pub edu_raises: u32,
    /// `fault=`: on purpose, for tests of the failure path: `page`, `gp`, `panic` or `registers`, after the fill.
    pub fault: Option<InjectedFault>,
}

/// How the end of a disk request is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskWait {
    /// By its interrupt, and only so: a lost one stops the load.
    Interrupt,
    /// By looking at the ring.
    Poll,
}

/// What is done with the test device for DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaLoad {
    /// It fills the buffers of a ring.
    Ring,
    /// It writes a letter at a time, and the vCPU halts in between.
    Wait,
}

/// How it interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaInterrupt {
    /// By MSI-X.
    Msix,
    /// By MSI.
    Msi,
    /// By its pin.
    Intx,
}

/// What is done with the accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccelLoad {
    /// Every ring is full.
    Full,
    /// One job at a time, and the vCPU halts in between.
    Wait,
}

/// How the accelerator is told of new work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AccelBell {
    /// By the register of the tail.
    Register = 0,
    /// The tail is in memory, and a bell is rung.
    Event = 1,
    /// The tail is in memory, and a bell is rung if the device does not look.
    Poll = 2,
}

/// How the educational device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum EduInterrupt {
    /// By its pin.
    Intx = 1,
    /// By MSI.
    Msi = 2,
}

/// A failure on request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InjectedFault {
    /// Reads an address that is not mapped.
    Page,
    /// Executes a privileged instruction in ring 3.
    Gp,
    /// Panics.
    Panic,
    /// Puts a register back to its reset value.
    Registers,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            data: None,
            from: 0,
            rate: 50 << 20,
            pattern: Pattern::Uniform,
            hot_permille: 100,
            verify_permille: 200,
            write: Write::Page,
            precheck: true,
            shadow: Shadow::Table,
            seed: 1,
            cpus: MAX_CPUS,
            idle: Idle::Spin,
            tsc_khz: None,
            run_ms: None,
            disk: None,
            disk_depth: 32,
            disk_wait: DiskWait::Interrupt,
            net: false,
            testdma: None,
            testdma_interrupt: DmaInterrupt::Msix,
            testdma_vectors: 1,
            testdma_entries: 256,
            testdma_buffer: 4096,
            testdma_pool: 8 << 20,
            testdma_mask: false,
            testdma_plug: false,
            testdma_eject: 0,
            accel: None,
            accel_bell: AccelBell::Event,
            accel_depth: 8,
            accel_bytes: 4096,
            accel_key: None,
            edu: None,
            edu_bytes: 4096,
            edu_raises: 16,
            fault: None,
        }
    }
}

/// A parameter that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParamError<'a> {
    /// The word on the command line.
    pub word: &'a str,
    /// What would be right.
    pub expected: &'static str,
}

impl fmt::Display for ParamError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "parameter '{}': expected {}", self.word, self.expected)
    }
}

impl core::error::Error for ParamError<'_> {}

const NAMES: &str = "one of data, from, rate, pattern, hot, verify, write, precheck, shadow, seed, cpus, idle, tsc_khz, run, \
                     disk, disk_depth, disk_wait, net, testdma, testdma_interrupt, testdma_vectors, testdma_entries, testdma_buffer, \
                     testdma_pool, testdma_mask, testdma_plug, testdma_eject, accel, accel_bell, accel_depth, accel_bytes, accel_key, \
                     edu, edu_bytes, edu_raises, fault, each with '=' and a value";
const SIZE: &str = "a number of bytes, with K, M, G or T behind it if wanted";
const PERCENT: &str = "a percentage from 0% to 100%";
const NUMBER: &str = "a number";

impl Params {
    /// Reads a command line. A parameter given twice counts as given last.
    ///
    /// # Errors
    /// The first word that is not a known parameter with a valid value.
    pub fn parse(line: &str) -> Result<Self, ParamError<'_>> {
        let mut params = Self::default();
        for word in line.split_ascii_whitespace() {
            params.set(word).map_err(|expected| ParamError { word, expected })?;
        }
        Ok(params)
    }

    fn set(&mut self, word: &str) -> Result<(), &'static str> {
        let (name, value) = word.split_once('=').ok_or(NAMES)?;
        match name {
            "data" => self.data = Some(size(value).ok_or(SIZE)?),
            "from" => self.from = size(value).ok_or(SIZE)?,
            "rate" => {
                self.rate = match value {
                    "max" => RATE_MAX,
                    _ => size(value).ok_or("a number of bytes per second (K, M, G), or max")?,
                }
            }
            "pattern" => {
                self.pattern = match value {
                    "uniform" => Pattern::Uniform,
                    "hot" => Pattern::Hot,
                    "sequential" => Pattern::Sequential,
                    _ => return Err("uniform, hot or sequential"),
                }
            }
            "hot" => self.hot_permille = percent(value).filter(|&p| p > 0).ok_or("a percentage from 0.1% to 100%")?,
            "verify" => self.verify_permille = percent(value).ok_or(PERCENT)?,
            "write" => {
                self.write = match value {
                    "page" => Write::Page,
                    "line" => Write::Line,
                    _ => return Err("page or line"),
                }
            }
            "precheck" => self.precheck = switch(value)?,
            "shadow" => {
                self.shadow = match value {
                    "table" => Shadow::Table,
                    "full" => Shadow::Full,
                    _ => return Err("table or full"),
                }
            }
            "seed" => self.seed = number(value).ok_or(NUMBER)?,
            "cpus" => {
                self.cpus = number(value)
                    .and_then(|n| usize::try_from(n).ok())
                    .filter(|n| (1..=MAX_CPUS).contains(n))
                    .ok_or("a number of vCPUs from 1 to 64")?;
            }
            "idle" => {
                self.idle = match value {
                    "spin" => Idle::Spin,
                    "halt" => Idle::Halt,
                    _ => return Err("spin or halt"),
                }
            }
            "tsc_khz" => {
                let khz = number(value).filter(|khz| (1_000..=100_000_000).contains(khz));
                self.tsc_khz = Some(khz.ok_or("a frequency in kHz from 1000 to 100000000")?);
            }
            "run" => self.run_ms = Some(number(value).filter(|&ms| ms <= 1 << 40).ok_or("a number of milliseconds")?),
            "disk" => self.disk = Some(size(value).ok_or(SIZE)?),
            "disk_depth" => {
                self.disk_depth = number(value)
                    .filter(|n| (1..=MAX_DISK_DEPTH as u64).contains(n))
                    .ok_or("a number of requests from 1 to 80")? as u16;
            }
            "disk_wait" => {
                self.disk_wait = match value {
                    "interrupt" => DiskWait::Interrupt,
                    "poll" => DiskWait::Poll,
                    _ => return Err("interrupt or poll"),
                }
            }
            "net" => self.net = switch(value)?,
            "testdma" => {
                self.testdma = Some(match value {
                    "ring" => DmaLoad::Ring,
                    "wait" => DmaLoad::Wait,
                    _ => return Err("ring or wait"),
                })
            }
            "testdma_interrupt" => {
                self.testdma_interrupt = match value {
                    "msix" => DmaInterrupt::Msix,
                    "msi" => DmaInterrupt::Msi,
                    "intx" => DmaInterrupt::Intx,
                    _ => return Err("msix, msi or intx"),
                }
            }
            "testdma_vectors" => {
                self.testdma_vectors = number(value)
                    .filter(|n| (1..=u64::from(MAX_VECTORS)).contains(n))
                    .ok_or("a number of vectors from 1 to 64")? as u32;
            }
            "testdma_entries" => {
                self.testdma_entries = number(value)
                    .filter(|n| n.is_power_of_two() && (2..=u64::from(MAX_ENTRIES)).contains(n))
                    .ok_or("a power of two from 2 to 1024")? as u32;
            }
            "testdma_buffer" => {
                self.testdma_buffer = size(value)
                    .filter(|n| n.is_multiple_of(8) && (16..=u64::from(MAX_BUFFER)).contains(n))
                    .ok_or("a number of bytes from 16 to 64K, a multiple of 8")?
                    as u32;
            }
            "testdma_pool" => self.testdma_pool = size(value).ok_or(SIZE)?,
            "testdma_mask" => self.testdma_mask = switch(value)?,
            "testdma_plug" => self.testdma_plug = switch(value)?,
            "testdma_eject" => {
                self.testdma_eject =
                    number(value).filter(|ms| *ms <= 1 << 20).ok_or("a number of milliseconds up to 1048576")? as u32;
            }
            "accel" => {
                self.accel = Some(match value {
                    "full" => AccelLoad::Full,
                    "wait" => AccelLoad::Wait,
                    _ => return Err("full or wait"),
                })
            }
            "accel_bell" => {
                self.accel_bell = match value {
                    "register" => AccelBell::Register,
                    "event" => AccelBell::Event,
                    "poll" => AccelBell::Poll,
                    _ => return Err("register, event or poll"),
                }
            }
            "accel_depth" => {
                self.accel_depth = number(value)
                    .filter(|n| n.is_power_of_two() && *n <= MAX_DEPTH.into())
                    .ok_or("a power of two up to 256")? as u32;
            }
            "accel_bytes" => {
                self.accel_bytes = size(value)
                    .filter(|n| n.is_multiple_of(512) && (512..=u64::from(MAX_BYTES)).contains(n))
                    .ok_or("a number of bytes from 512 to 1M, a multiple of 512")?
                    as u32;
            }
            "accel_key" => {
                self.accel_key =
                    Some(number(value).and_then(|n| u32::try_from(n).ok()).ok_or("a handle, a number of 32 bits")?);
            }
            "edu" => {
                self.edu = Some(match value {
                    "msi" => EduInterrupt::Msi,
                    "intx" => EduInterrupt::Intx,
                    _ => return Err("msi or intx"),
                })
            }
            "edu_bytes" => {
                self.edu_bytes = size(value)
                    .filter(|n| n.is_multiple_of(8) && (16..=u64::from(BUFFER_BYTES)).contains(n))
                    .ok_or("a number of bytes from 16 to 4K, a multiple of 8")? as u32;
            }
            "edu_raises" => {
                self.edu_raises = number(value).filter(|n| *n <= 1 << 20).ok_or("a number up to 1048576")? as u32;
            }
            "fault" => {
                self.fault = Some(match value {
                    "page" => InjectedFault::Page,
                    "gp" => InjectedFault::Gp,
                    "panic" => InjectedFault::Panic,
                    "registers" => InjectedFault::Registers,
                    _ => return Err("page, gp, panic or registers"),
                })
            }
            _ => return Err(NAMES),
        }
        Ok(())
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        // `from_str_radix` takes a sign, a number here has none.
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None if text.starts_with('+') => None,
        None => text.parse().ok(),
    }
}

fn size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    // RATE_MAX is reserved; nothing real comes near.
    number(digits)?.checked_mul(1 << shift).filter(|&bytes| bytes < 1 << 60)
}

fn percent(text: &str) -> Option<u32> {
    let digits = text.strip_suffix('%')?;
    let (whole, tenth) = match digits.split_once('.') {
        Some((whole, tenth)) if tenth.len() == 1 => (whole, number(tenth)?),
        Some(_) => return None,
        None => (digits, 0),
    };
    let permille = number(whole)?.checked_mul(10)?.checked_add(tenth)?;
    u32::try_from(permille).ok().filter(|&permille| permille <= 1000)
}

fn switch(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off"),
    }
}
