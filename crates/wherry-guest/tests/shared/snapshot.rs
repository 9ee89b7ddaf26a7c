//! Decoding of report pages, also of ones that lie.

use std::mem::offset_of;

use proptest::prelude::*;
use wherry_guest::report::{
    CpuPage, FailureKind, GAP_BUCKETS, Header, MAGIC, MAX_CPUS, MAX_ERRORS, MAX_EXTENTS, MESSAGE_BYTES, PAGE_SIZE,
    Phase, PortEvent, REPORT_SIZE, TOUCH_BUCKETS, TOUCH_FLOOR_NS, VERSION, gap_bucket, heartbeat_gpa, touch_bucket,
    touch_bucket_start,
};
use wherry_guest::snapshot::{Gaps, Snapshot, SnapshotError, Touches};

fn pages() -> Vec<u8> {
    let mut bytes = vec![0; REPORT_SIZE as usize];
    put(&mut bytes, offset_of!(Header, magic), &MAGIC.to_le_bytes());
    put(&mut bytes, offset_of!(Header, version), &VERSION.to_le_bytes());
    put(&mut bytes, offset_of!(Header, cpus), &2u32.to_le_bytes());
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn cpu(i: usize) -> usize {
    (2 + i) * PAGE_SIZE as usize
}

#[test]
fn memory_without_the_magic_is_no_report() {
    assert_eq!(Snapshot::decode(&vec![0; REPORT_SIZE as usize]), Err(SnapshotError::NotRunning));
    assert_eq!(Snapshot::decode(&[0; 100]), Err(SnapshotError::Short { given: 100 }));
}

#[test]
fn a_report_of_another_version_is_refused_by_number() {
    let mut bytes = pages();
    put(&mut bytes, offset_of!(Header, version), &9u32.to_le_bytes());
    let error = Snapshot::decode(&bytes).unwrap_err();
    assert_eq!(error, SnapshotError::Version { found: 9 });
    assert!(error.to_string().contains("version 9"));
}

#[test]
fn the_whole_guest_is_as_far_as_its_slowest_vcpu_and_failed_if_one_failed() {
    let mut bytes = pages();
    put(&mut bytes, cpu(0) + offset_of!(CpuPage, phase), &(Phase::Running as u32).to_le_bytes());
    put(&mut bytes, cpu(1) + offset_of!(CpuPage, phase), &(Phase::Filling as u32).to_le_bytes());
    assert_eq!(Snapshot::decode(&bytes).unwrap().phase(), Phase::Filling);
    put(&mut bytes, cpu(1) + offset_of!(CpuPage, phase), &(Phase::Failed as u32).to_le_bytes());
    assert_eq!(Snapshot::decode(&bytes).unwrap().phase(), Phase::Failed);
}

#[test]
fn a_failure_comes_with_its_words() {
    let mut bytes = pages();
    put(&mut bytes, offset_of!(Header, failure), &(FailureKind::Verify as u32).to_le_bytes());
    put(&mut bytes, offset_of!(Header, failure_cpu), &1u32.to_le_bytes());
    put(&mut bytes, offset_of!(Header, message_len), &4u32.to_le_bytes());
    put(&mut bytes, offset_of!(Header, message), b"lostXX");
    let snapshot = Snapshot::decode(&bytes).unwrap();
    let failure = snapshot.failure.as_ref().unwrap();
    assert_eq!((failure.kind, failure.cpu, failure.message.as_str()), (Some(FailureKind::Verify), 1, "lost"));
    assert_eq!(snapshot.phase(), Phase::Failed);
}

#[test]
fn lengths_beyond_the_page_are_cut() {
    let mut bytes = pages();
    for offset in [
        offset_of!(Header, cpus),
        offset_of!(Header, extent_count),
        offset_of!(Header, message_len),
        offset_of!(Header, failure),
        cpu(0) + offset_of!(CpuPage, errors_kept),
    ] {
        put(&mut bytes, offset, &u32::MAX.to_le_bytes());
    }
    let snapshot = Snapshot::decode(&bytes).unwrap();
    assert_eq!(snapshot.cpus.len(), MAX_CPUS);
    assert_eq!(snapshot.extents.len(), MAX_EXTENTS);
    assert_eq!(snapshot.cpus[0].mismatches.len(), MAX_ERRORS);
    assert_eq!(snapshot.failure.unwrap().message.len(), MESSAGE_BYTES);
}

#[test]
fn pages_are_found_across_extents() {
    let mut bytes = pages();
    put(&mut bytes, offset_of!(Header, extent_count), &2u32.to_le_bytes());
    for (i, word) in [0x100_0000u64, 3, 0x1_0000_0000, 2].into_iter().enumerate() {
        put(&mut bytes, offset_of!(Header, extents) + 8 * i, &word.to_le_bytes());
    }
    let snapshot = Snapshot::decode(&bytes).unwrap();
    assert_eq!(snapshot.page_gpa(2), Some(0x100_2000));
    assert_eq!(snapshot.page_gpa(3), Some(0x1_0000_0000));
    assert_eq!(snapshot.page_gpa(5), None);
}

#[test]
fn quantiles_are_bounds_in_powers_of_two() {
    let mut buckets = [0; GAP_BUCKETS];
    buckets[6] = 990;
    buckets[20] = 10;
    let gaps = Gaps { count: 1000, max_ns: 1_500_000, sum_ns: 0, buckets };
    assert_eq!(gaps.quantile_ns(500), 128);
    assert_eq!(gaps.quantile_ns(990), 128);
    assert_eq!(gaps.quantile_ns(999), 1_500_000);
    assert_eq!(Gaps { buckets: [0; GAP_BUCKETS], ..gaps }.quantile_ns(500), 0);
}

#[test]
fn gaps_fall_into_the_bucket_of_their_power_of_two() {
    assert_eq!([0, 1, 2, 3, 4, 1023, 1024].map(gap_bucket), [0, 0, 1, 1, 2, 9, 10]);
    assert_eq!(gap_bucket(u64::MAX), GAP_BUCKETS - 1);
}

#[test]
fn touches_fall_into_sixteen_buckets_for_each_power_of_two() {
    let mut end = TOUCH_FLOOR_NS;
    for bucket in 0..TOUCH_BUCKETS - 1 {
        let start = touch_bucket_start(bucket);
        assert_eq!(start, end, "bucket {bucket} leaves a gap or overlaps");
        end = touch_bucket_start(bucket + 1);
        assert!((end - start) * 16 <= start, "bucket {bucket} is too wide");
        assert_eq!([start, end - 1, end].map(touch_bucket), [bucket, bucket, bucket + 1]);
    }
    assert!((1 << 29..1 << 30).contains(&end), "the last bucket begins at {end} ns");
    assert_eq!([0, 1, u64::MAX].map(touch_bucket), [0, 0, TOUCH_BUCKETS - 1]);
}

#[test]
fn quantiles_of_touches_are_of_the_longest_ones() {
    let mut touches = Touches { count: 5000, max_ns: 90_000, buckets: vec![0; TOUCH_BUCKETS] };
    assert_eq!((touches.slow(0), touches.quantile_of_longest_ns(500, 10)), (0, 0));
    touches.buckets[touch_bucket(2000)] = 900;
    touches.buckets[touch_bucket(30_000)] = 98;
    touches.buckets[touch_bucket(89_000)] = 2;
    assert_eq!((touches.slow(0), touches.slow(8192)), (1000, 100));
    let of = |per_mille, n| touches.quantile_of_longest_ns(per_mille, n);
    assert!((30_001..=32_768).contains(&of(980, 100)));
    assert_eq!((of(981, 100), of(1000, 100), of(500, 2), of(0, 1)), (90_000, 90_000, 90_000, 90_000));
    assert!((30_001..=32_768).contains(&of(500, 100)) && (2001..=2048).contains(&of(500, 1000)));
    assert_eq!((of(500, u64::MAX), of(500, 0)), (of(500, 1000), 90_000), "as many as there are; of none the longest");
    let mut both = Touches::default();
    both.merge(&touches);
    both.merge(&touches);
    assert_eq!((both.count, both.slow(8192), both.max_ns), (10_000, 200, 90_000));
}

#[test]
fn the_heartbeat_of_each_vcpu_has_a_cache_line_of_its_own() {
    assert_eq!(heartbeat_gpa(0), 0x10_2000);
    assert!((0..MAX_CPUS).all(|i| heartbeat_gpa(i).is_multiple_of(64)));
    assert_eq!(offset_of!(CpuPage, phase), 64);
}

#[test]
fn port_events_survive_the_register() {
    let value = PortEvent::Phase.encode(63, Phase::Failed as u16);
    assert_eq!(PortEvent::decode(value), Some((PortEvent::Phase, 63, Phase::Failed as u16)));
    assert_eq!(PortEvent::decode(0), None);
    assert_eq!(PortEvent::decode(u32::MAX), None);
}

proptest! {
    #[test]
    fn no_guest_makes_the_reader_panic(noise in proptest::collection::vec((0usize..REPORT_SIZE as usize - 8, any::<u64>()), 0..400)) {
        let mut bytes = pages();
        for (at, word) in noise {
            put(&mut bytes, at, &word.to_le_bytes());
        }
        if let Ok(snapshot) = Snapshot::decode(&bytes) {
            let _ = (snapshot.phase(), snapshot.verify_errors(), snapshot.page_gpa(u64::MAX), snapshot.page_gpa(7));
            for cpu in &snapshot.cpus {
                let _ = (cpu.gaps.quantile_ns(990), cpu.touches.quantile_of_longest_ns(990, 77), cpu.touches.slow(0));
            }
        }
    }
}
