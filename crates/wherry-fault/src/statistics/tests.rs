use proptest::prelude::*;

use super::*;

fn recorded(nanos: impl IntoIterator<Item = u64>) -> Histogram {
    let recorder = Recorder::default();
    nanos.into_iter().for_each(|n| recorder.add(Duration::from_nanos(n)));
    recorder.histogram()
}

#[test]
fn buckets_follow_each_other_without_a_gap_and_are_a_sixteenth_wide_at_most() {
    let mut start = 0;
    for bucket in 0..BUCKETS - 1 {
        let end = upper_limit(bucket);
        assert!(end > start, "bucket {bucket} is empty");
        assert_eq!((bucket_of(start), bucket_of(end - 1), bucket_of(end)), (bucket, bucket, bucket + 1));
        assert!(start < 16 || (end - start) * 16 <= start, "bucket {bucket}: {start}..{end}");
        start = end;
    }
    assert!(start > 1_000_000_000_000, "the last bucket begins at {start} ns");
    assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
}

#[test]
fn no_latency_has_no_quantile_and_one_latency_is_all_of_them() {
    assert_eq!(Histogram::default().quantile(0.5), None);
    assert_eq!(recorded([]).quantile(0.5), None);
    let one = recorded([12_345]);
    assert_eq!([0.0, 0.5, 1.0].map(|f| one.quantile(f)), [Some(Duration::from_nanos(12_345)); 3]);
    let huge = recorded([u64::MAX]);
    assert_eq!(huge.quantile(1.0), Some(Duration::from_nanos(u64::MAX)));
}

#[test]
fn threads_of_this_process_are_told_apart_and_workers_of_the_kernel_are_not() {
    let counters = Counters::default();
    let here = rustix::thread::gettid().as_raw_nonzero().get() as u32;
    // Thread 2 is the kernel's kthreadd, or in a container nobody; it is never one of ours.
    for thread in [Some(here), Some(2), Some(3), Some(2), None] {
        counters.row(thread).faults.fetch_add(1, Relaxed);
    }
    let figures = counters.statistics(SourceId::GUEST, "guest");
    assert_eq!(figures.threads.iter().map(|(t, s)| (*t, s.faults)).collect::<Vec<_>>(), [(here, 1)]);
    assert_eq!((figures.workers.faults, figures.worker_count, figures.others.faults), (3, 2, 1));
}

#[test]
fn more_threads_than_are_told_apart_are_counted_together() {
    let counters = Counters::default();
    let (hold, held) = (std::sync::Barrier::new(THREADS + 6), &counters);
    std::thread::scope(|scope| {
        for _ in 0..THREADS + 5 {
            scope.spawn(|| {
                let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
                held.row(Some(thread)).faults.fetch_add(1, Relaxed);
                // No number is used twice as long as all of them live.
                hold.wait();
            });
        }
        hold.wait();
    });
    let figures = counters.statistics(SourceId::GUEST, "guest");
    assert_eq!((figures.threads.len(), figures.others.faults), (THREADS, 5));
}

proptest! {
    #[test]
    fn a_quantile_is_never_below_the_true_one_and_at_most_a_sixteenth_above(
        mut values in prop::collection::vec(prop_oneof![0..64u64, 0..200_000u64, 0..1u64 << 39], 1..300),
        fraction in 0.0..=1.0f64,
    ) {
        let histogram = recorded(values.iter().copied());
        values.sort_unstable();
        let rank = ((values.len() as f64 * fraction).ceil() as usize).clamp(1, values.len());
        let (truth, got) = (values[rank - 1], nanos(histogram.quantile(fraction).unwrap()));
        prop_assert!(got >= truth && got <= truth + truth / 16 + 1, "{truth} ns became {got} ns");
        prop_assert!(got <= *values.last().unwrap());
    }

    #[test]
    fn merging_is_the_same_as_counting_together(
        a in prop::collection::vec(any::<u64>(), 0..50),
        b in prop::collection::vec(any::<u64>(), 0..50),
    ) {
        let mut merged = Histogram::default();
        merged.merge(&recorded(a.iter().copied()));
        merged.merge(&recorded(b.iter().copied()));
        let together = recorded(a.iter().chain(&b).copied());
        prop_assert_eq!(merged, together);
    }
}
