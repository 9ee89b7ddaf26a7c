//! The content of data pages and its checksums.

use proptest::prelude::*;
use wherry_guest::data::{
    Difference, Entry, Generation, LINE_WORDS, LINES, PAGE_WORDS, first_difference, identify, line, page_checksum,
    page_tag, rewrite, touch,
};

fn page_at(seed: u64, index: u64, rewrites: u32, touches: u32) -> ([u64; PAGE_WORDS], Entry) {
    let mut page = [0; PAGE_WORDS];
    let mut entry = rewrite(&mut page, seed, index, rewrites);
    for _ in 0..touches {
        entry = touch(&mut page, seed, index, entry);
    }
    (page, entry)
}

#[test]
fn a_page_can_be_told_from_any_other_page_generation_and_seed() {
    let (page, entry) = page_at(7, 42, 3, 0);
    assert_eq!(page[0], page_tag(42));
    assert_eq!(page[1], 3 << 32);
    for (other, _) in [page_at(8, 42, 3, 0), page_at(7, 43, 3, 0), page_at(7, 42, 4, 0)] {
        let same = page.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!(same <= 2, "{same} words alike");
        assert_ne!(page_checksum(&other), entry.checksum);
    }
}

#[test]
fn each_touch_changes_exactly_one_line_and_goes_round_all_but_the_first() {
    let (mut page, mut entry) = page_at(1, 5, 1, 0);
    let mut touched = vec![0; LINES];
    for _ in 0..3 * (LINES - 1) {
        let before = page;
        entry = touch(&mut page, 1, 5, entry);
        let changed: Vec<usize> = (0..LINES)
            .filter(|&l| page[l * LINE_WORDS..][..LINE_WORDS] != before[l * LINE_WORDS..][..LINE_WORDS])
            .collect();
        assert_eq!(changed, [Generation::from_word(entry.generation).touched_line().unwrap()]);
        touched[changed[0]] += 1;
    }
    assert_eq!(touched[0], 0);
    assert!(touched[1..].iter().all(|&n| n == 3), "{touched:?}");
}

#[test]
fn pseudo_random_pages_do_not_compress_to_repeated_words_or_biased_bits() {
    let mut words = Vec::new();
    for index in 0..256 {
        // All but the tag and the generation.
        words.extend_from_slice(&page_at(3, index, 1, 0).0[2..]);
    }
    let ones: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
    let share = ones as f64 / (words.len() * 64) as f64;
    assert!((0.499..0.501).contains(&share), "{share}");
    let total = words.len();
    words.sort_unstable();
    words.dedup();
    assert_eq!(words.len(), total, "words are repeated");
}

#[test]
fn a_write_lost_on_the_way_is_told_as_the_older_generation() {
    let now = Generation { rewrites: 9, touches: 0 };
    assert_eq!(identify(&page_at(1, 2, 8, 0).0, 1, 2, now), Some(Generation { rewrites: 8, touches: 0 }));
    assert_eq!(identify(&page_at(1, 2, 8, 5).0, 1, 2, now), Some(Generation { rewrites: 8, touches: 5 }));
    let now = Generation { rewrites: 9, touches: 100 };
    assert_eq!(identify(&page_at(1, 2, 9, 99).0, 1, 2, now), Some(Generation { rewrites: 9, touches: 99 }));
    assert_eq!(identify(&page_at(1, 3, 9, 100).0, 1, 2, now), None, "that is another page");
    assert_eq!(identify(&[0; PAGE_WORDS], 1, 2, now), None);
}

proptest! {
    #[test]
    fn the_checksum_kept_by_touches_is_that_of_the_content(seed: u64, index in 0u64..1 << 40, touches in 0u32..300) {
        let (page, entry) = page_at(seed, index, 2, touches);
        prop_assert_eq!(entry.generation, Generation { rewrites: 2, touches }.to_word());
        prop_assert_eq!(page_checksum(&page), entry.checksum);
        prop_assert_eq!(first_difference(&page, seed, index, Generation { rewrites: 2, touches }), None);
    }

    #[test]
    fn a_flipped_bit_anywhere_is_found_by_checksum_and_by_comparison(
        seed: u64, touches in 0u32..130, word in 0..PAGE_WORDS, bit in 0..64,
    ) {
        let (mut page, entry) = page_at(seed, 11, 1, touches);
        let expected = page[word];
        page[word] ^= 1u64 << bit;
        prop_assert_ne!(page_checksum(&page), entry.checksum);
        let found = first_difference(&page, seed, 11, Generation::from_word(entry.generation));
        prop_assert_eq!(found, Some(Difference { word, expected, found: page[word] }));
    }

    #[test]
    fn a_touch_does_not_hide_a_byte_that_was_wrong_before(seed: u64, touches in 0u32..130, word in 0..PAGE_WORDS) {
        let (mut page, mut entry) = page_at(seed, 11, 1, touches);
        page[word] ^= 0x80;
        entry = touch(&mut page, seed, 11, entry);
        let overwritten = Generation::from_word(entry.generation).touched_line() == Some(word / LINE_WORDS);
        prop_assert_eq!(page_checksum(&page) == entry.checksum, overwritten);
    }

    #[test]
    fn two_lines_that_change_places_are_found(seed: u64, a in 0..LINES, b in 0..LINES) {
        prop_assume!(a != b);
        let (mut page, entry) = page_at(seed, 11, 1, 0);
        for i in 0..LINE_WORDS {
            page.swap(a * LINE_WORDS + i, b * LINE_WORDS + i);
        }
        prop_assert_ne!(page_checksum(&page), entry.checksum);
    }

    #[test]
    fn a_line_is_a_function_of_its_latest_touch(touches in 1u32..1000, at in 1..LINES) {
        let generation = Generation { rewrites: 1, touches };
        let latest = (1..=touches).rev().find(|&t| Generation { rewrites: 1, touches: t }.touched_line() == Some(at));
        prop_assert_eq!(generation.line_touch(at), latest.unwrap_or(0));
        let then = Generation { rewrites: 1, touches: latest.unwrap_or(0) };
        prop_assert_eq!(line(1, 1, generation, at), line(1, 1, then, at));
    }
}
