//! The report pages: how the probe guest and the outside talk through guest RAM.
//!
//! This file is compiled twice: into the guest, which writes these structures with atomic stores, and into the
//! host side, which reads them from the RAM memfd (mapped, or with `pread`). It therefore needs only `core`.
//!
//! Everything lives at one guest physical address, [`REPORT_GPA`], the same under every VMM: it is the start of the
//! probe's own ELF image, so no loader puts anything else there.
//!
//! | guest physical address | content |
//! |---|---|
//! | [`REPORT_GPA`] | [`Header`]: identity, parameters in force, where the data set lies, the first failure |
//! | [`CONTROL_GPA`] | [`Control`]: words that the host may write |
//! | [`cpu_page_gpa`]`(i)` | [`CpuPage`] of vCPU `i`, one 4 KiB page each, [`MAX_CPUS`] of them |
//!
//! Integers are little-endian, as the guest's CPU writes them. Each word is written by one vCPU only, except the
//! failure words of the header (first writer wins) and the control page (host). While [`Header::magic`]
//! is not [`MAGIC`], nothing else means anything; where the data lies is known once a vCPU's phase is at least
//! [`Phase::Filling`].
//!
//! Host writes into guest RAM do not appear in KVM's dirty log. So the control words are for times when no migration
//! runs, or for a VMM that logs its own writes.

use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// Guest physical address of the [`Header`].
pub const REPORT_GPA: u64 = 0x10_0000;
/// Guest physical address of the [`Control`] page.
pub const CONTROL_GPA: u64 = REPORT_GPA + PAGE_SIZE;
/// Guest physical address of the first [`CpuPage`].
pub const CPU_PAGES_GPA: u64 = REPORT_GPA + 2 * PAGE_SIZE;
/// Bytes from [`REPORT_GPA`] to the end of the last [`CpuPage`].
pub const REPORT_SIZE: u64 = (2 + MAX_CPUS as u64) * PAGE_SIZE;
/// Size of a guest page, in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// Most vCPUs the probe starts. More in the machine stay as they are.
pub const MAX_CPUS: usize = 64;
/// Most pieces of RAM the data set is spread over.
pub const MAX_EXTENTS: usize = 8;
/// Most verification errors kept with details per vCPU. All are counted.
pub const MAX_ERRORS: usize = 8;
/// Buckets of the gap histogram: bucket `b` counts gaps of `2^b <= ns < 2^(b+1)`, bucket 0 also shorter ones.
pub const GAP_BUCKETS: usize = 40;
/// Touches of pages that take less are not in the histogram: the page was there.
pub const TOUCH_FLOOR_NS: u64 = 1 << TOUCH_FLOOR_LOG;
const TOUCH_FLOOR_LOG: u32 = 10;
/// Steps of a power of two in the histogram of touches, as a power of two.
const TOUCH_STEPS_LOG: u32 = 4;
/// Buckets of the histogram of touches: 16 of the same width for each power of two from [`TOUCH_FLOOR_NS`] on, up to a
/// second; the last one counts longer ones too.
pub const TOUCH_BUCKETS: usize = 20 << TOUCH_STEPS_LOG;
/// Most disk requests in flight.
pub const MAX_DISK_DEPTH: usize = 80;
/// Bytes of failure text kept.
pub const MESSAGE_BYTES: usize = 256;

/// First word of the header: `WHRYPRB1` in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"WHRYPRB1");
/// Version of this layout. Fields are only ever added; a change of meaning raises it.
pub const VERSION: u32 = 1;

/// Guest physical address of the 4 KiB MMIO probe port. A VMM may implement it to be told of events at once; under
/// one that does not, reads give all ones (or zeroes) and the guest leaves it alone.
pub const PORT_GPA: u64 = 0xfed5_0000;
/// Read-only 32-bit register of the probe port: [`PORT_ID`] where the port exists.
pub const PORT_REG_ID: u64 = 0x00;
/// Write-only 32-bit register: `event << 24 | vCPU << 16 | argument`, see [`PortEvent`].
pub const PORT_REG_EVENT: u64 = 0x04;
/// Write-only 32-bit register: the guest has ended and asks for power-off. The value is 0 for a good end.
pub const PORT_REG_POWEROFF: u64 = 0x08;
/// Value of [`PORT_REG_ID`]: `WPRT` in memory order.
pub const PORT_ID: u32 = u32::from_le_bytes(*b"WPRT");

/// Events written to [`PORT_REG_EVENT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PortEvent {
    /// A vCPU entered the [`Phase`] given as argument.
    Phase = 1,
    /// The guest failed; the argument is the [`FailureKind`].
    Failure = 2,
}

impl PortEvent {
    /// The register value for this event.
    pub const fn encode(self, cpu: u8, argument: u16) -> u32 {
        (self as u32) << 24 | (cpu as u32) << 16 | argument as u32
    }

    /// Takes a register value apart. `None` for an event this version does not know.
    pub const fn decode(value: u32) -> Option<(Self, u8, u16)> {
        let event = match (value >> 24) as u8 {
            1 => Self::Phase,
            2 => Self::Failure,
            _ => return None,
        };
        Some((event, (value >> 16) as u8, value as u16))
    }
}

/// What a vCPU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Phase {
    /// Not started by the probe (yet).
    Absent = 0,
    /// Started, setting itself up.
    Booting = 1,
    /// Writing the data set for the first time.
    Filling = 2,
    /// Dirtying and verifying.
    Running = 3,
    /// Asked to finish, or the run time is over; the last full verification found nothing wrong. Halted.
    Finished = 4,
    /// Something went wrong. After a verification error the vCPU goes on working; otherwise it is halted.
    Failed = 5,
}

impl Phase {
    /// The phase with this number. `None` for a number that is not one.
    pub const fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::Absent,
            1 => Self::Booting,
            2 => Self::Filling,
            3 => Self::Running,
            4 => Self::Finished,
            5 => Self::Failed,
            _ => return None,
        })
    }
}

/// Why the guest failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FailureKind {
    /// It has not.
    None = 0,
    /// A parameter on the command line is unknown or out of range.
    Parameter = 1,
    /// The data set does not fit into RAM, or the memory map is unusable.
    Memory = 2,
    /// A vCPU did not come up.
    Smp = 3,
    /// A page does not hold what was written to it. See [`VerifyError`].
    Verify = 4,
    /// An exception in the guest. See [`Fault`].
    Fault = 5,
    /// A panic in the guest: a bug of the probe.
    Panic = 6,
    /// No way to learn the TSC frequency.
    Clock = 7,
    /// A register of a vCPU did not keep its value.
    Registers = 8,
    /// A disk does not hold what was written to it, or does not do what it should.
    Disk = 9,
    /// The test device for DMA does not do what it should, or an interrupt of it was lost.
    Testdma = 10,
    /// The accelerator does not do what it should, or an interrupt of it was lost.
    Accel = 11,
    /// The educational device does not do what it should, or an interrupt of it was lost.
    Edu = 12,
    /// A network device does not do what it should, or a frame came that should not.
    Net = 13,
}

impl FailureKind {
    /// The kind with this number. `None` for a number that is not one.
    pub const fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            0 => Self::None,
            1 => Self::Parameter,
            2 => Self::Memory,
            3 => Self::Smp,
            4 => Self::Verify,
            5 => Self::Fault,
            6 => Self::Panic,
            7 => Self::Clock,
            8 => Self::Registers,
            9 => Self::Disk,
            10 => Self::Testdma,
            11 => Self::Accel,
            12 => Self::Edu,
            13 => Self::Net,
            _ => return None,
        })
    }
}

/// What kind of wrong content a verification found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MismatchKind {
    /// Content that was never written there.
    Corrupt = 1,
    /// Content of an earlier generation of the same page: a lost write.
    Stale = 2,
    /// A page of zeroes: a lost page.
    Zero = 3,
    /// The page is right but its entry in the shadow table is not.
    Table = 4,
    /// The page differs from its full shadow copy, and the copy is the wrong one.
    Shadow = 5,
    /// The sum of all generations of a vCPU's slice is not what that vCPU has counted: pages *and* their table
    /// entries went back together. The address is that of the table.
    Ledger = 6,
}

impl MismatchKind {
    /// The kind with this number. `None` for a number that is not one.
    pub const fn from_u32(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Corrupt,
            2 => Self::Stale,
            3 => Self::Zero,
            4 => Self::Table,
            5 => Self::Shadow,
            6 => Self::Ledger,
            _ => return None,
        })
    }
}

/// Where the TSC frequency comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TscSource {
    /// Not known yet.
    Unknown = 0,
    /// The parameter `tsc_khz=`.
    Parameter = 1,
    /// CPUID leaf 0x15.
    Cpuid15 = 2,
    /// CPUID leaf 0x40000010.
    CpuidHypervisor = 3,
    /// The multiplier of the kvm-clock.
    KvmClock = 4,
    /// CPUID leaf 0x16.
    Cpuid16 = 5,
    /// Measured against the PIT.
    Pit = 6,
}

/// A piece of RAM that holds data pages.
#[repr(C)]
pub struct Extent {
    /// Guest physical address of the first page.
    pub gpa: AtomicU64,
    /// Number of pages.
    pub pages: AtomicU64,
}

/// The first report page.
#[repr(C)]
pub struct Header {
    /// [`MAGIC`], once the probe runs.
    pub magic: AtomicU64,
    /// [`VERSION`].
    pub version: AtomicU32,
    /// [`MAX_CPUS`] of this build: number of [`CpuPage`]s that follow.
    pub cpu_slots: AtomicU32,
    /// vCPUs that share the work, after `cpus=` and what ACPI lists.
    pub cpus: AtomicU32,
    /// Of these, how many have come up.
    pub cpus_online: AtomicU32,
    /// [`FailureKind`] of the first failure; 0 while all is well.
    pub failure: AtomicU32,
    /// vCPU that failed first.
    pub failure_cpu: AtomicU32,
    /// TSC frequency in kHz.
    pub tsc_khz: AtomicU64,
    /// [`TscSource`].
    pub tsc_source: AtomicU32,
    /// 1 where the MMIO probe port answers.
    pub port_present: AtomicU32,
    /// Bytes of RAM the memory map lists.
    pub ram_bytes: AtomicU64,
    /// Pages of the data set.
    pub data_pages: AtomicU64,
    /// Guest physical address of the shadow table: one 16-byte entry per data page (see `data::Entry`).
    pub table_gpa: AtomicU64,
    /// Guest physical address of the full shadow copy, or 0.
    pub shadow_gpa: AtomicU64,
    /// Seed of the data.
    pub seed: AtomicU64,
    /// Number of [`Header::extents`] in use.
    pub extent_count: AtomicU32,
    /// Length of [`Header::message`] in bytes.
    pub message_len: AtomicU32,
    /// Where the data pages lie, in order of page index.
    pub extents: [Extent; MAX_EXTENTS],
    /// What happened, in words (UTF-8, without a final zero).
    pub message: [AtomicU8; MESSAGE_BYTES],
    /// The disk load.
    pub disk: DiskReport,
    /// The DMA load.
    pub testdma: TestdmaReport,
    /// The load of the accelerator.
    pub accel: AccelReport,
    /// The load of the educational device.
    pub edu: EduReport,
    /// The network load.
    pub net: NetReport,
}

/// The disk load of vCPU 0.
#[repr(C)]
pub struct DiskReport {
    /// 1 when there is a disk load.
    pub present: AtomicU32,
    /// Most requests in flight.
    pub depth: AtomicU32,
    /// Sectors of 512 bytes of the device.
    pub sectors: AtomicU64,
    /// Blocks of 4 KiB that are worked on, from the first of the device.
    pub blocks: AtomicU64,
    /// Guest physical address of their generations: a 64-bit word each; the top bit says that it is part of a request.
    pub table_gpa: AtomicU64,
    /// Blocks read, each compared.
    pub reads: AtomicU64,
    /// Blocks written.
    pub writes: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Sectors that were as they should be.
    pub verified: AtomicU64,
    /// Requests that failed, and blocks that were wrong.
    pub errors: AtomicU64,
    /// Requests that came back although the device did not have them.
    pub unexpected: AtomicU64,
    /// Interrupts of the device.
    pub interrupts: AtomicU64,
    /// Longest request, in ns.
    pub longest_ns: AtomicU64,
    /// The first wrong block.
    pub first_block: AtomicU64,
    /// In it, the word that should be there.
    pub first_expected: AtomicU64,
    /// The word that was there.
    pub first_found: AtomicU64,
    /// Requests in flight.
    pub in_flight: AtomicU32,
    /// 0.
    pub disk_pad: AtomicU32,
}

/// The DMA load of vCPU 0.
#[repr(C)]
pub struct TestdmaReport {
    /// 1 when there is a DMA load.
    pub present: AtomicU32,
    /// What the device does: 1 ring, 2 stop and wait.
    pub form: AtomicU32,
    /// How it interrupts: 1 INTx, 2 MSI, 3 MSI-X.
    pub interrupt: AtomicU32,
    /// Vectors in use.
    pub vectors: AtomicU32,
    /// Entries of the ring.
    pub entries: AtomicU32,
    /// Bytes of a buffer.
    pub buffer: AtomicU32,
    /// Buffers or letters that came.
    pub received: AtomicU64,
    /// Those of them that were right.
    pub verified: AtomicU64,
    /// Buffers that still were when their turn came again.
    pub rechecked: AtomicU64,
    /// Those that were not, and whatever else was wrong.
    pub errors: AtomicU64,
    /// Interrupts without a letter.
    pub spurious: AtomicU64,
    /// Interrupts of the device.
    pub interrupts: AtomicU64,
    /// Interrupts that did not come within a second.
    pub lost: AtomicU64,
    /// Longest time from one buffer or letter to the next, in ns.
    pub longest_ns: AtomicU64,
    /// How often vectors were masked or unmasked.
    pub toggles: AtomicU64,
    /// Guest physical address of the area that driver and device share.
    pub area_gpa: AtomicU64,
    /// Guest physical address of the buffers.
    pub pool_gpa: AtomicU64,
    /// Sequence number of the first that was wrong.
    pub first_sequence: AtomicU64,
    /// In it, which word; all ones for its completion.
    pub first_word: AtomicU64,
    /// The word that should be there.
    pub first_expected: AtomicU64,
    /// The word that was there.
    pub first_found: AtomicU64,
    /// 1 while the vectors are masked.
    pub masked: AtomicU32,
    /// 1 while the device is there and driven.
    pub plugged: AtomicU32,
}

/// The load of the accelerator, of vCPU 0.
#[repr(C)]
pub struct AccelReport {
    /// 1 when there is such a load.
    pub present: AtomicU32,
    /// 1 full depth, 2 stop and wait.
    pub form: AtomicU32,
    /// How it tells the device of new work: 0 by a register, 1 by bells, 2 it is polled. (`params::AccelBell`)
    pub bell: AtomicU32,
    /// Engines of the device.
    pub engines: AtomicU32,
    /// Rings: one for each context and class.
    pub rings: AtomicU32,
    /// Submissions of a ring that are under way.
    pub depth: AtomicU32,
    /// Bytes of a job.
    pub bytes: AtomicU32,
    /// 0.
    pub accel_pad: AtomicU32,
    /// Submissions.
    pub submitted: AtomicU64,
    /// Those that came back.
    pub returned: AtomicU64,
    /// Jobs that ended.
    pub jobs: AtomicU64,
    /// Those of them that were right, and done exactly once.
    pub verified: AtomicU64,
    /// Those that still were when their place's turn came again.
    pub rechecked: AtomicU64,
    /// Those that were not, and whatever else was wrong.
    pub errors: AtomicU64,
    /// Of the errors: jobs that were done another number of times than once.
    pub miscounted: AtomicU64,
    /// Interrupts that did not come within a second.
    pub lost: AtomicU64,
    /// How often memory was looked at after an interrupt.
    pub interrupts: AtomicU64,
    /// How often the device was told of new work by a register or a bell.
    pub rung: AtomicU64,
    /// Longest time from one submission that came back to the next, in ns.
    pub longest_ns: AtomicU64,
    /// Jobs that were right, by class.
    pub by_class: [AtomicU64; 5],
    /// Guest physical address of the page with commands and tails.
    pub shared_gpa: AtomicU64,
    /// Guest physical address of the first job's place, in the first ring.
    pub places_gpa: AtomicU64,
    /// Ring of the first job that was wrong.
    pub first_ring: AtomicU64,
    /// Its number.
    pub first_job: AtomicU64,
    /// Guest physical address of the word that was wrong.
    pub first_at: AtomicU64,
    /// The word that should be there.
    pub first_expected: AtomicU64,
    /// The word that was there.
    pub first_found: AtomicU64,
}

/// The load of QEMU's educational device, of vCPU 0.
#[repr(C)]
pub struct EduReport {
    /// 1 when there is such a load.
    pub present: AtomicU32,
    /// How it interrupts: 1 INTx, 2 MSI.
    pub interrupt: AtomicU32,
    /// Bytes of a buffer.
    pub bytes: AtomicU32,
    /// 1 when the device no longer answers.
    pub gone: AtomicU32,
    /// Times that the device was told to interrupt: DMA, factorials, and the register for it.
    pub asked: AtomicU64,
    /// Those of them whose interrupt came.
    pub answered: AtomicU64,
    /// Of those, DMA.
    pub dmas: AtomicU64,
    /// Buffers that came back from the device as they had gone there.
    pub verified: AtomicU64,
    /// Buffers that still held that when their turn came again.
    pub rechecked: AtomicU64,
    /// Those that were wrong, and whatever else was.
    pub errors: AtomicU64,
    /// Interrupts of the device.
    pub interrupts: AtomicU64,
    /// Those that came though nothing was raised, or a second time for the same.
    pub spurious: AtomicU64,
    /// Those that did not come within a second of what was raised.
    pub lost: AtomicU64,
    /// Times that the device did not do within a minute what it was told.
    pub stalled: AtomicU64,
    /// Longest time from one interrupt to the next, in ns. DMA alone takes 100 ms.
    pub longest_ns: AtomicU64,
    /// Longest time from a write to the register that interrupts to that interrupt, in ns.
    pub latency_ns: AtomicU64,
    /// Guest physical address of the buffers.
    pub pool_gpa: AtomicU64,
    /// Number of the first buffer that was wrong.
    pub first_sequence: AtomicU64,
    /// Guest physical address of the first word of it that was.
    pub first_at: AtomicU64,
    /// The word that should be there.
    pub first_expected: AtomicU64,
    /// The word that was there.
    pub first_found: AtomicU64,
}

/// The network load of vCPU 0.
#[repr(C)]
pub struct NetReport {
    /// 1 when there is a network load.
    pub present: AtomicU32,
    /// Most frames under way.
    pub window: AtomicU32,
    /// Frames sent.
    pub sent: AtomicU64,
    /// Frames that came back, in order.
    pub received: AtomicU64,
    /// Those of them that were right.
    pub verified: AtomicU64,
    /// Frames of others.
    pub foreign: AtomicU64,
    /// Frames that were wrong, and whatever else was.
    pub errors: AtomicU64,
    /// Interrupts of the device.
    pub interrupts: AtomicU64,
    /// Longest time from one frame that came back to the next, in ns.
    pub longest_ns: AtomicU64,
    /// The first frame that was wrong.
    pub first_number: AtomicU64,
    /// In it, which word; all ones for its length, one less for its number.
    pub first_word: AtomicU64,
    /// What should be there.
    pub first_expected: AtomicU64,
    /// What was there.
    pub first_found: AtomicU64,
}

/// Words that the host may write. The guest fills them from its parameters before any vCPU is [`Phase::Filling`].
///
/// To change the load: write the new values, then add 1 to [`Control::sequence`]. A vCPU has taken them when its
/// [`CpuPage::control_seen`] shows that number.
#[repr(C)]
pub struct Control {
    /// Raised by the host after it changed any word below.
    pub sequence: AtomicU64,
    /// Bytes per second dirtied by all vCPUs together; [`RATE_MAX`] for as fast as possible.
    pub rate: AtomicU64,
    /// Pattern: 0 uniform, 1 hot set, 2 sequential. (`params::Pattern`)
    pub pattern: AtomicU32,
    /// Size of the hot set in thousandths of the data set.
    pub hot_permille: AtomicU32,
    /// Share of its time a vCPU spends on verification, in thousandths.
    pub verify_permille: AtomicU32,
    /// How a page is dirtied: 0 whole page, 1 one cache line. (`params::Write`)
    pub write: AtomicU32,
    /// Not 0: do not dirty anything (verification and heartbeat go on).
    pub stop: AtomicU32,
    /// Each change empties the gap histograms.
    pub reset_gaps: AtomicU32,
    /// Not 0: verify everything once more, then finish.
    pub finish: AtomicU32,
    /// Reserved, 0.
    pub reserved: AtomicU32,
}

/// [`Control::rate`] for as fast as possible.
pub const RATE_MAX: u64 = u64::MAX;

/// One verification error.
#[repr(C)]
pub struct VerifyError {
    /// [`MismatchKind`].
    pub kind: AtomicU32,
    /// vCPU that found it.
    pub cpu: AtomicU32,
    /// Guest physical address of the first wrong byte.
    pub gpa: AtomicU64,
    /// Index of the data page.
    pub page: AtomicU64,
    /// The aligned 8 bytes that should be there.
    pub expected: AtomicU64,
    /// The aligned 8 bytes that are there.
    pub found: AtomicU64,
    /// Generation that should be there: `rewrites << 32 | touches`.
    pub expected_generation: AtomicU64,
    /// Generation found, as far as it can be told.
    pub found_generation: AtomicU64,
}

/// The first exception taken by a vCPU.
#[repr(C)]
pub struct Fault {
    /// Vector; meaningful when [`Fault::taken`] is not 0.
    pub vector: AtomicU32,
    /// 1 when an exception was taken.
    pub taken: AtomicU32,
    /// Error code.
    pub error_code: AtomicU64,
    /// Instruction pointer.
    pub rip: AtomicU64,
    /// CR2: the address, for a page fault.
    pub cr2: AtomicU64,
    /// Stack pointer.
    pub rsp: AtomicU64,
    /// Code segment: its low two bits are the ring.
    pub cs: AtomicU64,
}

/// What one vCPU reports.
#[repr(C)]
pub struct CpuPage {
    /// Grows continually while the vCPU runs, whatever it does.
    pub heartbeat: AtomicU64,
    /// TSC at the last heartbeat.
    pub heartbeat_tsc: AtomicU64,
    /// Keeps the heartbeat in a cache line of its own.
    pub heartbeat_pad: [AtomicU64; 6],

    /// [`Phase`].
    pub phase: AtomicU32,
    /// Local APIC id.
    pub apic_id: AtomicU32,
    /// First data page of this vCPU's slice.
    pub slice_start: AtomicU64,
    /// Number of data pages of this vCPU's slice.
    pub slice_pages: AtomicU64,
    /// Pages filled.
    pub pages_filled: AtomicU64,
    /// Pages dirtied since they were filled (whole pages and touches).
    pub pages_dirtied: AtomicU64,
    /// Pages verified by the cursor.
    pub pages_verified: AtomicU64,
    /// Pages checked just before they were overwritten.
    pub pages_prechecked: AtomicU64,
    /// Full passes of the verifying cursor over the slice.
    pub verify_passes: AtomicU64,
    /// Verification errors found.
    pub verify_errors: AtomicU64,
    /// Sum of all generation words of the slice (wrapping), counted beside the table.
    pub generation_sum: AtomicU64,
    /// How often the TSC went backwards between two heartbeats.
    pub tsc_backwards: AtomicU64,
    /// Largest step backwards, in TSC ticks.
    pub tsc_backwards_max: AtomicU64,
    /// [`Control::sequence`] in force.
    pub control_seen: AtomicU64,
    /// [`Control::reset_gaps`] last obeyed.
    pub reset_seen: AtomicU32,
    /// How many of [`CpuPage::errors`] are filled.
    pub errors_kept: AtomicU32,
    /// Interrupts of the local APIC's timer taken (with `idle=halt`).
    pub timer_interrupts: AtomicU64,
    /// How often the registers were compared with what they should hold.
    pub register_checks: AtomicU64,
    /// How often they did not.
    pub register_errors: AtomicU64,

    /// Heartbeats in the histogram.
    pub gap_count: AtomicU64,
    /// Largest gap, in ns.
    pub gap_max_ns: AtomicU64,
    /// TSC at the end of the largest gap.
    pub gap_max_tsc: AtomicU64,
    /// Sum of all gaps, in ns.
    pub gap_sum_ns: AtomicU64,
    /// Gaps between heartbeats in the vCPU's own time; see [`GAP_BUCKETS`].
    pub gaps: [AtomicU64; GAP_BUCKETS],

    /// The first exception.
    pub fault: Fault,
    /// The first verification errors.
    pub errors: [VerifyError; MAX_ERRORS],

    /// First touches of a page in a step of work: table entry or data page.
    pub touch_count: AtomicU64,
    /// The longest, in ns.
    pub touch_max_ns: AtomicU64,
    /// Those of at least [`TOUCH_FLOOR_NS`]; see [`touch_bucket`].
    pub touches: [AtomicU64; TOUCH_BUCKETS],
}

const _: () = {
    assert!(size_of::<Extent>() == 16);
    assert!(offset_of!(Header, cpus) == 16);
    assert!(offset_of!(Header, tsc_khz) == 32);
    assert!(offset_of!(Header, data_pages) == 56);
    assert!(offset_of!(Header, extents) == 96);
    assert!(offset_of!(Header, message) == 224);
    assert!(offset_of!(Header, disk) == 480);
    assert!(size_of::<DiskReport>() == 128);
    assert!(offset_of!(Header, testdma) == 608);
    assert!(size_of::<TestdmaReport>() == 152);
    assert!(offset_of!(Header, accel) == 760);
    assert!(size_of::<AccelReport>() == 216);
    assert!(offset_of!(Header, edu) == 976);
    assert!(size_of::<EduReport>() == 152);
    assert!(offset_of!(Header, net) == 1128);
    assert!(size_of::<NetReport>() == 96);
    assert!(size_of::<Header>() == 1224);
    assert!(size_of::<Control>() == 48);
    assert!(size_of::<VerifyError>() == 56);
    assert!(size_of::<Fault>() == 48);
    assert!(offset_of!(CpuPage, phase) == 64);
    assert!(offset_of!(CpuPage, gap_count) == 200);
    assert!(offset_of!(CpuPage, gaps) == 232);
    assert!(offset_of!(CpuPage, fault) == 552);
    assert!(offset_of!(CpuPage, errors) == 600);
    assert!(offset_of!(CpuPage, touch_count) == 1048);
    assert!(offset_of!(CpuPage, touches) == 1064);
    assert!(size_of::<CpuPage>() <= PAGE_SIZE as usize);
};

/// Guest physical address of the [`CpuPage`] of vCPU `cpu`.
pub const fn cpu_page_gpa(cpu: usize) -> u64 {
    CPU_PAGES_GPA + cpu as u64 * PAGE_SIZE
}

/// Guest physical address of the heartbeat counter of vCPU `cpu`: an aligned 64-bit word.
pub const fn heartbeat_gpa(cpu: usize) -> u64 {
    cpu_page_gpa(cpu) + offset_of!(CpuPage, heartbeat) as u64
}

/// Bucket of a touch of `ns` nanoseconds, at least [`TOUCH_FLOOR_NS`].
pub const fn touch_bucket(ns: u64) -> usize {
    let ns = if ns < TOUCH_FLOOR_NS { TOUCH_FLOOR_NS } else { ns };
    let octave = ns.ilog2();
    let step = (ns >> (octave - TOUCH_STEPS_LOG)) as usize & ((1 << TOUCH_STEPS_LOG) - 1);
    let bucket = (((octave - TOUCH_FLOOR_LOG) as usize) << TOUCH_STEPS_LOG) + step;
    if bucket < TOUCH_BUCKETS { bucket } else { TOUCH_BUCKETS - 1 }
}

/// The shortest touch, in ns, that is in a bucket.
pub const fn touch_bucket_start(bucket: usize) -> u64 {
    let step = bucket as u64 & ((1 << TOUCH_STEPS_LOG) - 1);
    ((1 << TOUCH_STEPS_LOG) + step) << (bucket as u32 >> TOUCH_STEPS_LOG) << (TOUCH_FLOOR_LOG - TOUCH_STEPS_LOG)
}

/// Bucket of a gap of `ns` nanoseconds.
pub const fn gap_bucket(ns: u64) -> usize {
    let log = (ns | 1).ilog2() as usize;
    if log < GAP_BUCKETS { log } else { GAP_BUCKETS - 1 }
}
