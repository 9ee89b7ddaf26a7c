//! The report pages decoded into plain values, for programs on the host that read guest RAM with `pread`.
//!
//! Guest RAM is hostile input: every length and number in it is checked or bounded here. The guest writes while we
//! read, so figures of one snapshot can be some microseconds apart; each 64-bit word is whole.

use core::mem::offset_of;

use crate::report::{
    AccelReport, CpuPage, DiskReport, EduReport, Extent, FailureKind, Fault, GAP_BUCKETS, Header, MAGIC, MAX_CPUS,
    MAX_ERRORS, MAX_EXTENTS, MESSAGE_BYTES, MismatchKind, NetReport, PAGE_SIZE, Phase, REPORT_SIZE, TOUCH_BUCKETS,
    TestdmaReport, VERSION, VerifyError, touch_bucket_start,
};

/// Why there is no snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// The probe does not run (yet), or what runs is not the probe.
    #[error("the report page has no magic: the probe guest does not run yet, or another kernel does")]
    NotRunning,
    /// The guest was built from another version.
    #[error("the report pages have layout version {found}, this program reads version {VERSION}")]
    Version {
        /// What the guest says.
        found: u32,
    },
    /// The caller handed too few bytes.
    #[error("{given} bytes are not the report pages: give the {REPORT_SIZE} bytes from REPORT_GPA")]
    Short {
        /// How many bytes there were.
        given: usize,
    },
}

/// The first failure of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Its kind; `None` for one this version does not know.
    pub kind: Option<FailureKind>,
    /// The vCPU that failed.
    pub cpu: u32,
    /// What happened, in words.
    pub message: String,
}

/// A verification error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Its kind; `None` for one this version does not know.
    pub kind: Option<MismatchKind>,
    /// The vCPU that found it.
    pub cpu: u32,
    /// Guest physical address of the first wrong byte.
    pub gpa: u64,
    /// Index of the data page.
    pub page: u64,
    /// The aligned 8 bytes that should be there.
    pub expected: u64,
    /// The aligned 8 bytes that were there.
    pub found: u64,
    /// Generation that should be there, see [`crate::data::Generation::from_word`].
    pub expected_generation: u64,
    /// Generation that was there, 0 if it could not be told.
    pub found_generation: u64,
}

/// An exception in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector.
    pub vector: u32,
    /// Error code.
    pub error_code: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// CR2.
    pub cr2: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Code segment.
    pub cs: u64,
}

/// A histogram of the gaps between heartbeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gaps {
    /// Heartbeats counted.
    pub count: u64,
    /// Largest gap in ns.
    pub max_ns: u64,
    /// Sum of all gaps in ns.
    pub sum_ns: u64,
    /// Bucket `b`: gaps of at least `2^b` ns and less than `2^(b+1)` ns.
    pub buckets: [u64; GAP_BUCKETS],
}

impl Gaps {
    /// An upper bound, in ns, of the gap that `per_mille` of all gaps do not exceed (a power of two, or the largest
    /// gap). 0 without heartbeats.
    pub fn quantile_ns(&self, per_mille: u32) -> u64 {
        let total: u128 = self.buckets.iter().map(|&n| u128::from(n)).sum();
        let wanted = (total * u128::from(per_mille)).div_ceil(1000);
        let mut seen = 0u128;
        for (bucket, &n) in self.buckets.iter().enumerate() {
            seen += u128::from(n);
            if n != 0 && seen >= wanted {
                return (2u64 << bucket).min(self.max_ns);
            }
        }
        0
    }
}

/// What one vCPU reports; the fields are those of [`CpuPage`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are documented at `report::CpuPage`")]
pub struct CpuSnapshot {
    pub heartbeat: u64,
    pub heartbeat_tsc: u64,
    pub phase: Phase,
    pub apic_id: u32,
    pub slice_start: u64,
    pub slice_pages: u64,
    pub pages_filled: u64,
    pub pages_dirtied: u64,
    pub pages_verified: u64,
    pub pages_prechecked: u64,
    pub verify_passes: u64,
    pub verify_errors: u64,
    pub generation_sum: u64,
    pub tsc_backwards: u64,
    pub tsc_backwards_max: u64,
    pub control_seen: u64,
    pub reset_seen: u32,
    pub timer_interrupts: u64,
    pub register_checks: u64,
    pub register_errors: u64,
    pub gaps: Gaps,
    /// Touches of pages.
    pub touches: Touches,
    /// The first exception, if there was one.
    pub exception: Option<Exception>,
    /// The first verification errors, at most [`MAX_ERRORS`].
    pub mismatches: Vec<Mismatch>,
}

/// How long the first touches of pages took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touches {
    /// Touches timed.
    pub count: u64,
    /// The longest, in ns.
    pub max_ns: u64,
    /// Those of at least [`TOUCH_FLOOR_NS`](crate::report::TOUCH_FLOOR_NS), by [`touch_bucket`](crate::report::touch_bucket).
    pub buckets: Vec<u64>,
}

impl Touches {
    /// How many took at least `floor_ns`, as far as the buckets tell: those whose shortest touch does.
    pub fn slow(&self, floor_ns: u64) -> u64 {
        let slow = self.buckets.iter().enumerate().filter(|(bucket, _)| touch_bucket_start(*bucket) >= floor_ns);
        slow.map(|(_, n)| *n).fold(0, u64::wrapping_add)
    }

    /// An upper bound, in ns, of the time that `per_mille` of the `n` longest touches do not exceed: the end of a bucket, or
    /// the longest. 0 if there are none.
    ///
    /// For whoever knows how many touches had to wait: what else takes long, such as a page that only has to be mapped,
    /// cannot be told from them by its time.
    pub fn quantile_of_longest_ns(&self, per_mille: u32, n: u64) -> u64 {
        let n = u128::from(n).min(self.buckets.iter().map(|&n| u128::from(n)).sum());
        // So many are longer than the one that is asked for.
        let longer = n - (n * u128::from(per_mille)).div_ceil(1000).clamp(n.min(1), n);
        let mut seen = 0u128;
        for (bucket, &count) in self.buckets.iter().enumerate().rev() {
            seen += u128::from(count);
            if count > 0 && seen > longer {
                let end = if bucket + 1 < TOUCH_BUCKETS { touch_bucket_start(bucket + 1) } else { u64::MAX };
                return end.min(self.max_ns);
            }
        }
        0
    }

    /// Adds another vCPU's.
    pub fn merge(&mut self, other: &Touches) {
        self.count = self.count.wrapping_add(other.count);
        self.max_ns = self.max_ns.max(other.max_ns);
        self.buckets.resize(self.buckets.len().max(other.buckets.len()), 0);
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(to, from)| *to = to.wrapping_add(*from));
    }
}

/// All report pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// TSC frequency in kHz, 0 while unknown.
    pub tsc_khz: u64,
    /// Number of the [`crate::report::TscSource`].
    pub tsc_source: u32,
    /// The guest found the MMIO probe port.
    pub port_present: bool,
    /// Bytes of RAM in the memory map.
    pub ram_bytes: u64,
    /// Pages of the data set.
    pub data_pages: u64,
    /// Guest physical address of the shadow table.
    pub table_gpa: u64,
    /// Guest physical address of the full shadow copy.
    pub shadow_gpa: Option<u64>,
    /// Seed of the data.
    pub seed: u64,
    /// Guest physical address and number of pages of each piece of the data set.
    pub extents: Vec<(u64, u64)>,
    /// vCPUs of which the guest says that they have come up.
    pub cpus_online: u32,
    /// The first failure.
    pub failure: Option<Failure>,
    /// One entry per vCPU that shares the work.
    pub cpus: Vec<CpuSnapshot>,
    /// The disk load, if there is one.
    pub disk: Option<DiskSnapshot>,
    /// The DMA load, if there is one.
    pub testdma: Option<TestdmaSnapshot>,
    /// The load of the accelerator, if there is one.
    pub accel: Option<AccelSnapshot>,
    /// The load of the educational device, if there is one.
    pub edu: Option<EduSnapshot>,
    /// The network load, if there is one.
    pub net: Option<NetSnapshot>,
}

/// The network load; the fields are those of [`NetReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are documented at `report::NetReport`")]
pub struct NetSnapshot {
    pub window: u32,
    pub sent: u64,
    pub received: u64,
    pub verified: u64,
    pub foreign: u64,
    pub errors: u64,
    pub interrupts: u64,
    pub longest_ns: u64,
    pub first_number: u64,
    pub first_word: u64,
    pub first_expected: u64,
    pub first_found: u64,
}

/// The disk load; the fields are those of [`DiskReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are documented at `report::DiskReport`")]
pub struct DiskSnapshot {
    pub depth: u32,
    pub sectors: u64,
    pub blocks: u64,
    pub table_gpa: u64,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub verified: u64,
    pub errors: u64,
    pub unexpected: u64,
    pub interrupts: u64,
    pub longest_ns: u64,
    pub first_block: u64,
    pub first_expected: u64,
    pub first_found: u64,
    pub in_flight: u32,
}

impl DiskSnapshot {
    /// Requests that have come back.
    pub fn completed(&self) -> u64 {
        self.reads + self.writes + self.flushes
    }
}

/// The load of the accelerator; the fields are those of [`AccelReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are documented at `report::AccelReport`")]
pub struct AccelSnapshot {
    pub form: u32,
    pub bell: u32,
    pub engines: u32,
    pub rings: u32,
    pub depth: u32,
    pub bytes: u32,
    pub submitted: u64,
    pub returned: u64,
    pub jobs: u64,
    pub verified: u64,
    pub rechecked: u64,
    pub errors: u64,
    pub miscounted: u64,
    pub lost: u64,
    pub interrupts: u64,
    pub rung: u64,
    pub longest_ns: u64,
    pub by_class: [u64; 5],
    pub shared_gpa: u64,
    pub places_gpa: u64,
    pub first_ring: u64,
    pub first_job: u64,
    pub first_at: u64,
    pub first_expected: u64,
    pub first_found: u64,
}

/// The DMA load; the fields are those of [`TestdmaReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are documented at `report::TestdmaReport`")]
pub struct TestdmaSnapshot {
    pub form: u32,
    pub interrupt: u32,
    pub vectors: u32,
    pub entries: u32,
    pub buffer: u32,
    pub received: u64,
    pub verified: u64,
    pub rechecked: u64,
    pub errors: u64,
    pub spurious: u64,
    pub interrupts: u64,
    pub lost: u64,
    pub longest_ns: u64,
    pub toggles: u64,
    pub area_gpa: u64,
    pub pool_gpa: u64,
    pub first_sequence: u64,
    pub first_word: u64,
    pub first_expected: u64,
    pub first_found: u64,
    pub masked: bool,
    /// The device is there and driven.
    pub plugged: bool,
}

/// The load of the educational device; the fields are those of [`EduReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are documented at `report::EduReport`")]
pub struct EduSnapshot {
    pub interrupt: u32,
    pub bytes: u32,
    pub gone: bool,
    pub asked: u64,
    pub answered: u64,
    pub dmas: u64,
    pub verified: u64,
    pub rechecked: u64,
    pub errors: u64,
    pub interrupts: u64,
    pub spurious: u64,
    pub lost: u64,
    pub stalled: u64,
    pub longest_ns: u64,
    pub latency_ns: u64,
    pub pool_gpa: u64,
    pub first_sequence: u64,
    pub first_at: u64,
    pub first_expected: u64,
    pub first_found: u64,
}

/// Words at offsets in a page.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    /// Offsets come from `offset_of` of structures that fit into the slice.
    fn u64(&self, offset: usize) -> u64 {
        self.0.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn u32(&self, offset: usize) -> u32 {
        self.0.get(offset..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }
}

impl Snapshot {
    /// Decodes the [`REPORT_SIZE`] bytes of guest RAM from [`crate::report::REPORT_GPA`] on.
    ///
    /// # Errors
    /// The probe does not run yet (ask again), its layout has another version, or too few bytes were given.
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        if (bytes.len() as u64) < REPORT_SIZE {
            return Err(SnapshotError::Short { given: bytes.len() });
        }
        let header = Words(&bytes[..PAGE_SIZE as usize]);
        if header.u64(offset_of!(Header, magic)) != MAGIC {
            return Err(SnapshotError::NotRunning);
        }
        let version = header.u32(offset_of!(Header, version));
        if version != VERSION {
            return Err(SnapshotError::Version { found: version });
        }
        let cpus = (header.u32(offset_of!(Header, cpus)) as usize).min(MAX_CPUS);
        let pages = bytes[2 * PAGE_SIZE as usize..].chunks_exact(PAGE_SIZE as usize);
        let extents = (header.u32(offset_of!(Header, extent_count)) as usize).min(MAX_EXTENTS);
        let shadow = header.u64(offset_of!(Header, shadow_gpa));
        Ok(Self {
            tsc_khz: header.u64(offset_of!(Header, tsc_khz)),
            tsc_source: header.u32(offset_of!(Header, tsc_source)),
            port_present: header.u32(offset_of!(Header, port_present)) == 1,
            ram_bytes: header.u64(offset_of!(Header, ram_bytes)),
            data_pages: header.u64(offset_of!(Header, data_pages)),
            table_gpa: header.u64(offset_of!(Header, table_gpa)),
            shadow_gpa: (shadow != 0).then_some(shadow),
            seed: header.u64(offset_of!(Header, seed)),
            extents: (0..extents)
                .map(|i| {
                    let at = offset_of!(Header, extents) + i * size_of::<Extent>();
                    (header.u64(at + offset_of!(Extent, gpa)), header.u64(at + offset_of!(Extent, pages)))
                })
                .collect(),
            cpus_online: header.u32(offset_of!(Header, cpus_online)),
            failure: failure(&header),
            disk: disk(&header),
            testdma: testdma(&header),
            accel: accel(&header),
            edu: edu(&header),
            net: net(&header),
            cpus: pages.take(cpus).map(|page| CpuSnapshot::decode(&Words(page))).collect(),
        })
    }

    /// The phase of the whole guest: failed if anything is, else that of the vCPU that is least far.
    pub fn phase(&self) -> Phase {
        if self.failure.is_some() || self.cpus.iter().any(|cpu| cpu.phase == Phase::Failed) {
            return Phase::Failed;
        }
        self.cpus.iter().map(|cpu| cpu.phase).min().unwrap_or(Phase::Absent)
    }

    /// Verification errors of all vCPUs.
    pub fn verify_errors(&self) -> u64 {
        self.sum(|cpu| cpu.verify_errors)
    }

    /// Pages dirtied by all vCPUs since the fill.
    pub fn pages_dirtied(&self) -> u64 {
        self.sum(|cpu| cpu.pages_dirtied)
    }

    /// Pages verified by all vCPUs.
    pub fn pages_verified(&self) -> u64 {
        self.sum(|cpu| cpu.pages_verified)
    }

    /// Largest gap of any vCPU, in ns.
    pub fn largest_gap_ns(&self) -> u64 {
        self.cpus.iter().map(|cpu| cpu.gaps.max_ns).max().unwrap_or(0)
    }

    /// Touches of pages by all vCPUs.
    pub fn touches(&self) -> Touches {
        let mut all = Touches::default();
        self.cpus.iter().for_each(|cpu| all.merge(&cpu.touches));
        all
    }

    /// Guest physical address of data page `index`. `None` beyond the data set.
    pub fn page_gpa(&self, index: u64) -> Option<u64> {
        let mut left = index;
        for &(gpa, pages) in &self.extents {
            if left < pages {
                return gpa.checked_add(left.checked_mul(PAGE_SIZE)?);
            }
            left -= pages;
        }
        None
    }

    fn sum(&self, figure: impl Fn(&CpuSnapshot) -> u64) -> u64 {
        self.cpus.iter().map(figure).fold(0, u64::wrapping_add)
    }
}

fn disk(header: &Words<'_>) -> Option<DiskSnapshot> {
    let at = |field: usize| offset_of!(Header, disk) + field;
    let long = |field: usize| header.u64(at(field));
    let short = |field: usize| header.u32(at(field));
    (short(offset_of!(DiskReport, present)) == 1).then(|| DiskSnapshot {
        depth: short(offset_of!(DiskReport, depth)),
        sectors: long(offset_of!(DiskReport, sectors)),
        blocks: long(offset_of!(DiskReport, blocks)),
        table_gpa: long(offset_of!(DiskReport, table_gpa)),
        reads: long(offset_of!(DiskReport, reads)),
        writes: long(offset_of!(DiskReport, writes)),
        flushes: long(offset_of!(DiskReport, flushes)),
        verified: long(offset_of!(DiskReport, verified)),
        errors: long(offset_of!(DiskReport, errors)),
        unexpected: long(offset_of!(DiskReport, unexpected)),
        interrupts: long(offset_of!(DiskReport, interrupts)),
        longest_ns: long(offset_of!(DiskReport, longest_ns)),
        first_block: long(offset_of!(DiskReport, first_block)),
        first_expected: long(offset_of!(DiskReport, first_expected)),
        first_found: long(offset_of!(DiskReport, first_found)),
        in_flight: short(offset_of!(DiskReport, in_flight)),
    })
}

fn net(header: &Words<'_>) -> Option<NetSnapshot> {
    let at = |field: usize| offset_of!(Header, net) + field;
    let long = |field: usize| header.u64(at(field));
    let short = |field: usize| header.u32(at(field));
    (short(offset_of!(NetReport, present)) == 1).then(|| NetSnapshot {
        window: short(offset_of!(NetReport, window)),
        sent: long(offset_of!(NetReport, sent)),
        received: long(offset_of!(NetReport, received)),
        verified: long(offset_of!(NetReport, verified)),
        foreign: long(offset_of!(NetReport, foreign)),
        errors: long(offset_of!(NetReport, errors)),
        interrupts: long(offset_of!(NetReport, interrupts)),
        longest_ns: long(offset_of!(NetReport, longest_ns)),
        first_number: long(offset_of!(NetReport, first_number)),
        first_word: long(offset_of!(NetReport, first_word)),
        first_expected: long(offset_of!(NetReport, first_expected)),
        first_found: long(offset_of!(NetReport, first_found)),
    })
}

fn accel(header: &Words<'_>) -> Option<AccelSnapshot> {
    let at = |field: usize| offset_of!(Header, accel) + field;
    let short = |field: usize| header.u32(at(field));
    let long = |field: usize| header.u64(at(field));
    (short(offset_of!(AccelReport, present)) == 1).then(|| AccelSnapshot {
        form: short(offset_of!(AccelReport, form)),
        bell: short(offset_of!(AccelReport, bell)),
        engines: short(offset_of!(AccelReport, engines)),
        rings: short(offset_of!(AccelReport, rings)),
        depth: short(offset_of!(AccelReport, depth)),
        bytes: short(offset_of!(AccelReport, bytes)),
        submitted: long(offset_of!(AccelReport, submitted)),
        returned: long(offset_of!(AccelReport, returned)),
        jobs: long(offset_of!(AccelReport, jobs)),
        verified: long(offset_of!(AccelReport, verified)),
        rechecked: long(offset_of!(AccelReport, rechecked)),
        errors: long(offset_of!(AccelReport, errors)),
        miscounted: long(offset_of!(AccelReport, miscounted)),
        lost: long(offset_of!(AccelReport, lost)),
        interrupts: long(offset_of!(AccelReport, interrupts)),
        rung: long(offset_of!(AccelReport, rung)),
        longest_ns: long(offset_of!(AccelReport, longest_ns)),
        by_class: core::array::from_fn(|class| long(offset_of!(AccelReport, by_class) + 8 * class)),
        shared_gpa: long(offset_of!(AccelReport, shared_gpa)),
        places_gpa: long(offset_of!(AccelReport, places_gpa)),
        first_ring: long(offset_of!(AccelReport, first_ring)),
        first_job: long(offset_of!(AccelReport, first_job)),
        first_at: long(offset_of!(AccelReport, first_at)),
        first_expected: long(offset_of!(AccelReport, first_expected)),
        first_found: long(offset_of!(AccelReport, first_found)),
    })
}

fn testdma(header: &Words<'_>) -> Option<TestdmaSnapshot> {
    let at = |field: usize| offset_of!(Header, testdma) + field;
    let long = |field: usize| header.u64(at(field));
    let short = |field: usize| header.u32(at(field));
    (short(offset_of!(TestdmaReport, present)) == 1).then(|| TestdmaSnapshot {
        form: short(offset_of!(TestdmaReport, form)),
        interrupt: short(offset_of!(TestdmaReport, interrupt)),
        vectors: short(offset_of!(TestdmaReport, vectors)),
        entries: short(offset_of!(TestdmaReport, entries)),
        buffer: short(offset_of!(TestdmaReport, buffer)),
        received: long(offset_of!(TestdmaReport, received)),
        verified: long(offset_of!(TestdmaReport, verified)),
        rechecked: long(offset_of!(TestdmaReport, rechecked)),
        errors: long(offset_of!(TestdmaReport, errors)),
        spurious: long(offset_of!(TestdmaReport, spurious)),
        interrupts: long(offset_of!(TestdmaReport, interrupts)),
        lost: long(offset_of!(TestdmaReport, lost)),
        longest_ns: long(offset_of!(TestdmaReport, longest_ns)),
        toggles: long(offset_of!(TestdmaReport, toggles)),
        area_gpa: long(offset_of!(TestdmaReport, area_gpa)),
        pool_gpa: long(offset_of!(TestdmaReport, pool_gpa)),
        first_sequence: long(offset_of!(TestdmaReport, first_sequence)),
        first_word: long(offset_of!(TestdmaReport, first_word)),
        first_expected: long(offset_of!(TestdmaReport, first_expected)),
        first_found: long(offset_of!(TestdmaReport, first_found)),
        masked: short(offset_of!(TestdmaReport, masked)) != 0,
        plugged: short(offset_of!(TestdmaReport, plugged)) != 0,
    })
}

fn edu(header: &Words<'_>) -> Option<EduSnapshot> {
    let at = |field: usize| offset_of!(Header, edu) + field;
    let long = |field: usize| header.u64(at(field));
    let short = |field: usize| header.u32(at(field));
    (short(offset_of!(EduReport, present)) == 1).then(|| EduSnapshot {
        interrupt: short(offset_of!(EduReport, interrupt)),
        bytes: short(offset_of!(EduReport, bytes)),
        gone: short(offset_of!(EduReport, gone)) != 0,
        asked: long(offset_of!(EduReport, asked)),
        answered: long(offset_of!(EduReport, answered)),
        dmas: long(offset_of!(EduReport, dmas)),
        verified: long(offset_of!(EduReport, verified)),
        rechecked: long(offset_of!(EduReport, rechecked)),
        errors: long(offset_of!(EduReport, errors)),
        interrupts: long(offset_of!(EduReport, interrupts)),
        spurious: long(offset_of!(EduReport, spurious)),
        lost: long(offset_of!(EduReport, lost)),
        stalled: long(offset_of!(EduReport, stalled)),
        longest_ns: long(offset_of!(EduReport, longest_ns)),
        latency_ns: long(offset_of!(EduReport, latency_ns)),
        pool_gpa: long(offset_of!(EduReport, pool_gpa)),
        first_sequence: long(offset_of!(EduReport, first_sequence)),
        first_at: long(offset_of!(EduReport, first_at)),
        first_expected: long(offset_of!(EduReport, first_expected)),
        first_found: long(offset_of!(EduReport, first_found)),
    })
}

fn failure(header: &Words<'_>) -> Option<Failure> {
    let kind = header.u32(offset_of!(Header, failure));
    let length = (header.u32(offset_of!(Header, message_len)) as usize).min(MESSAGE_BYTES);
    let message = &header.0[offset_of!(Header, message)..][..length];
    (kind != 0).then(|| Failure {
        kind: FailureKind::from_u32(kind),
        cpu: header.u32(offset_of!(Header, failure_cpu)),
        message: String::from_utf8_lossy(message).into_owned(),
    })
}

impl CpuSnapshot {
    fn decode(page: &Words<'_>) -> Self {
        let kept = (page.u32(offset_of!(CpuPage, errors_kept)) as usize).min(MAX_ERRORS);
        let mut buckets = [0; GAP_BUCKETS];
        for (i, bucket) in buckets.iter_mut().enumerate() {
            *bucket = page.u64(offset_of!(CpuPage, gaps) + 8 * i);
        }
        Self {
            heartbeat: page.u64(offset_of!(CpuPage, heartbeat)),
            heartbeat_tsc: page.u64(offset_of!(CpuPage, heartbeat_tsc)),
            phase: Phase::from_u32(page.u32(offset_of!(CpuPage, phase))).unwrap_or(Phase::Failed),
            apic_id: page.u32(offset_of!(CpuPage, apic_id)),
            slice_start: page.u64(offset_of!(CpuPage, slice_start)),
            slice_pages: page.u64(offset_of!(CpuPage, slice_pages)),
            pages_filled: page.u64(offset_of!(CpuPage, pages_filled)),
            pages_dirtied: page.u64(offset_of!(CpuPage, pages_dirtied)),
            pages_verified: page.u64(offset_of!(CpuPage, pages_verified)),
            pages_prechecked: page.u64(offset_of!(CpuPage, pages_prechecked)),
            verify_passes: page.u64(offset_of!(CpuPage, verify_passes)),
            verify_errors: page.u64(offset_of!(CpuPage, verify_errors)),
            generation_sum: page.u64(offset_of!(CpuPage, generation_sum)),
            tsc_backwards: page.u64(offset_of!(CpuPage, tsc_backwards)),
            tsc_backwards_max: page.u64(offset_of!(CpuPage, tsc_backwards_max)),
            control_seen: page.u64(offset_of!(CpuPage, control_seen)),
            reset_seen: page.u32(offset_of!(CpuPage, reset_seen)),
            timer_interrupts: page.u64(offset_of!(CpuPage, timer_interrupts)),
            register_checks: page.u64(offset_of!(CpuPage, register_checks)),
            register_errors: page.u64(offset_of!(CpuPage, register_errors)),
            gaps: Gaps {
                count: page.u64(offset_of!(CpuPage, gap_count)),
                max_ns: page.u64(offset_of!(CpuPage, gap_max_ns)),
                sum_ns: page.u64(offset_of!(CpuPage, gap_sum_ns)),
                buckets,
            },
            touches: Touches {
                count: page.u64(offset_of!(CpuPage, touch_count)),
                max_ns: page.u64(offset_of!(CpuPage, touch_max_ns)),
                buckets: (0..TOUCH_BUCKETS).map(|i| page.u64(offset_of!(CpuPage, touches) + 8 * i)).collect(),
            },
            exception: exception(page),
            mismatches: (0..kept)
                .map(|i| mismatch(page, offset_of!(CpuPage, errors) + i * size_of::<VerifyError>()))
                .collect(),
        }
    }
}

fn exception(page: &Words<'_>) -> Option<Exception> {
    let at = offset_of!(CpuPage, fault);
    (page.u32(at + offset_of!(Fault, taken)) != 0).then(|| Exception {
        vector: page.u32(at + offset_of!(Fault, vector)),
        error_code: page.u64(at + offset_of!(Fault, error_code)),
        rip: page.u64(at + offset_of!(Fault, rip)),
        cr2: page.u64(at + offset_of!(Fault, cr2)),
        rsp: page.u64(at + offset_of!(Fault, rsp)),
        cs: page.u64(at + offset_of!(Fault, cs)),
    })
}

fn mismatch(page: &Words<'_>, at: usize) -> Mismatch {
    Mismatch {
        kind: MismatchKind::from_u32(page.u32(at + offset_of!(VerifyError, kind))),
        cpu: page.u32(at + offset_of!(VerifyError, cpu)),
        gpa: page.u64(at + offset_of!(VerifyError, gpa)),
        page: page.u64(at + offset_of!(VerifyError, page)),
        expected: page.u64(at + offset_of!(VerifyError, expected)),
        found: page.u64(at + offset_of!(VerifyError, found)),
        expected_generation: page.u64(at + offset_of!(VerifyError, expected_generation)),
        found_generation: page.u64(at + offset_of!(VerifyError, found_generation)),
    }
}
