//! The figures of postcopy: from what the fault service counts, and over the wire to the source's report.

use std::time::Duration;

use wherry_fault::{Histogram, Share, SourceId, Statistics};
use wherry_stream::message::{self, Complete};

use crate::link::printable;
use crate::machine::VcpuThread;
use crate::predict::us;
use crate::progress::{Faults, Latency, Postcopy, SourceFaults, VcpuFaults, WorkerFaults};

/// vCPUs and processes that are taken from a peer, at most.
const MOST: usize = 4096;

fn latency(histogram: &Histogram) -> Latency {
    let at = |fraction| us(histogram.quantile(fraction).unwrap_or(Duration::ZERO));
    Latency { p50_us: at(0.5), p99_us: at(0.99), max_us: us(histogram.largest()) }
}

fn faults(share: &Share) -> Faults {
    let Latency { p50_us, p99_us, max_us } = latency(&share.latency);
    Faults { faults: share.faults, p50_us, p99_us, max_us }
}

/// What the fault service counts, by vCPU. Nothing of what is asked for on the wire.
pub(crate) fn of_faults(statistics: &Statistics, vcpus: &[VcpuThread]) -> Postcopy {
    let guest = statistics.source(SourceId::GUEST).cloned().unwrap_or_default();
    let mut threads = guest.threads;
    let mut each: Vec<_> = vcpus
        .iter()
        .map(|vcpu| VcpuFaults { index: vcpu.index, faults: faults(&threads.remove(&vcpu.thread).unwrap_or_default()) })
        .collect();
    each.sort_by_key(|vcpu| vcpu.index);
    let mut others = guest.others;
    threads.values().for_each(|share| others.merge(share));
    let sources = statistics.sources.iter().filter(|source| source.id != SourceId::GUEST).map(|source| {
        let share = Share { faults: source.faults, latency: source.latency.clone() };
        SourceFaults { name: source.name.clone(), faults: faults(&share), quarantined: source.quarantined.clone() }
    });
    let whole = latency(&guest.latency);
    Postcopy {
        faults: guest.faults,
        local: guest.local.count(),
        prefetched: statistics.prefetched,
        prefetch_hits: statistics.prefetch_hits,
        fault_p50_us: whole.p50_us,
        fault_p99_us: whole.p99_us,
        fault_max_us: whole.max_us,
        queue: latency(&guest.queue),
        wire: latency(&guest.wire),
        placement: latency(&guest.placement),
        largest_stall_us: each.iter().map(|vcpu| vcpu.faults.max_us).max().unwrap_or(0),
        vcpus: each,
        kernel_workers: WorkerFaults { workers: guest.worker_count, faults: faults(&guest.workers) },
        other_threads: faults(&others),
        sources: sources.collect(),
        ..Postcopy::default()
    }
}

impl From<Latency> for message::Latency {
    fn from(latency: Latency) -> Self {
        Self { p50_us: latency.p50_us, p99_us: latency.p99_us, max_us: latency.max_us }
    }
}

fn to_wire(faults: &Faults, number: u32) -> message::Faults {
    let latency = Latency { p50_us: faults.p50_us, p99_us: faults.p99_us, max_us: faults.max_us };
    message::Faults { faults: faults.faults, latency: Some(latency.into()), number, ..message::Faults::default() }
}

/// The last word of the destination.
pub(crate) fn to_complete(figures: &Postcopy) -> Complete {
    let workers = u32::try_from(figures.kernel_workers.workers).unwrap_or(u32::MAX);
    Complete {
        faults: figures.faults,
        p50_us: figures.fault_p50_us,
        p99_us: figures.fault_p99_us,
        max_us: figures.fault_max_us,
        duration_us: figures.duration_us,
        local: figures.local,
        requests: figures.requests,
        pages_asked: figures.pages_asked,
        prefetched: figures.prefetched,
        prefetch_hits: figures.prefetch_hits,
        queue: Some(figures.queue.into()),
        wire: Some(figures.wire.into()),
        placement: Some(figures.placement.into()),
        vcpus: figures.vcpus.iter().map(|vcpu| to_wire(&vcpu.faults, vcpu.index)).collect(),
        kernel_workers: Some(to_wire(&figures.kernel_workers.faults, workers)),
        other_threads: Some(to_wire(&figures.other_threads, 0)),
        sources: figures
            .sources
            .iter()
            .map(|source| message::Faults {
                name: source.name.clone(),
                quarantined: source.quarantined.clone(),
                ..to_wire(&source.faults, 0)
            })
            .collect(),
        largest_stall_us: figures.largest_stall_us,
    }
}

fn latency_from(wire: Option<message::Latency>) -> Latency {
    let wire = wire.unwrap_or_default();
    Latency { p50_us: wire.p50_us, p99_us: wire.p99_us, max_us: wire.max_us }
}

fn faults_from(wire: &message::Faults) -> Faults {
    let Latency { p50_us, p99_us, max_us } = latency_from(wire.latency);
    Faults { faults: wire.faults, p50_us, p99_us, max_us }
}

/// The source's own figures, with what the destination has said of its faults.
pub(crate) fn with_complete(own: Postcopy, complete: &Complete) -> Postcopy {
    let workers = complete.kernel_workers.clone().unwrap_or_default();
    let vcpus = complete.vcpus.iter().take(MOST);
    let sources = complete.sources.iter().take(MOST);
    Postcopy {
        duration_us: if complete.duration_us > 0 { complete.duration_us } else { own.duration_us },
        faults: complete.faults,
        local: complete.local,
        prefetched: complete.prefetched,
        prefetch_hits: complete.prefetch_hits,
        fault_p50_us: complete.p50_us,
        fault_p99_us: complete.p99_us,
        fault_max_us: complete.max_us,
        queue: latency_from(complete.queue),
        wire: latency_from(complete.wire),
        placement: latency_from(complete.placement),
        vcpus: vcpus.map(|vcpu| VcpuFaults { index: vcpu.number, faults: faults_from(vcpu) }).collect(),
        kernel_workers: WorkerFaults { workers: workers.number.into(), faults: faults_from(&workers) },
        other_threads: faults_from(&complete.other_threads.clone().unwrap_or_default()),
        sources: sources
            .map(|source| SourceFaults {
                name: printable(&source.name),
                faults: faults_from(source),
                quarantined: source.quarantined.as_deref().map(printable),
            })
            .collect(),
        largest_stall_us: complete.largest_stall_us,
        ..own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(n: u64) -> Faults {
        Faults { faults: n, p50_us: n + 1, p99_us: n + 2, max_us: n + 3 }
    }

    fn times(n: u64) -> Latency {
        Latency { p50_us: n, p99_us: n + 1, max_us: n + 2 }
    }

    #[test]
    fn all_that_the_destination_measures_reaches_the_source() {
        let figures = Postcopy {
            duration_us: 1,
            remaining_pages: 0,
            remaining_bytes: 0,
            faults: 2,
            local: 3,
            requests: 4,
            pages_asked: 5,
            pages_answered: 6,
            prefetched: 7,
            prefetch_hits: 8,
            fault_p50_us: 9,
            fault_p99_us: 10,
            fault_max_us: 11,
            queue: times(12),
            wire: times(15),
            placement: times(18),
            vcpus: vec![VcpuFaults { index: 0, faults: some(30) }, VcpuFaults { index: 3, faults: some(40) }],
            kernel_workers: WorkerFaults { workers: 50, faults: some(51) },
            other_threads: some(60),
            sources: vec![SourceFaults { name: "disk".into(), faults: some(70), quarantined: Some("lied".into()) }],
            largest_stall_us: 80,
        };
        // What is asked for on the wire, the source has counted itself.
        let own = Postcopy { requests: 4, pages_asked: 5, pages_answered: 6, ..Postcopy::default() };
        assert_eq!(with_complete(own, &to_complete(&figures)), figures);
    }

    #[test]
    fn what_a_hostile_destination_says_is_bounded_and_printable() {
        let source = message::Faults { name: "a\u{1b}[2J".into(), ..message::Faults::default() };
        let complete = Complete {
            vcpus: vec![message::Faults::default(); MOST + 1],
            sources: vec![source; MOST + 1],
            ..Complete::default()
        };
        let figures = with_complete(Postcopy { duration_us: 7, ..Postcopy::default() }, &complete);
        assert_eq!((figures.vcpus.len(), figures.sources.len(), figures.duration_us), (MOST, MOST, 7));
        assert!(!figures.sources[0].name.contains('\u{1b}'));
    }
}
