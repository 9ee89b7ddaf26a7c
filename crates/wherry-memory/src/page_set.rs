//! A set of granules of one block, as a bitmap laid out the way `KVM_GET_DIRTY_LOG` lays it out: bit `n % 64` of word
//! `n / 64` is granule `n`.

use std::ops::Range;

/// A set of granule numbers below a fixed limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// An empty set over granules `0..pages`.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// The set of all granules `0..pages`.
    pub fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        set.insert_range(0..pages);
        set
    }

    /// The limit: granules are numbered below it.
    pub fn limit(&self) -> u64 {
        self.pages
    }

    /// The bitmap, 64 granules a word. Bits at or beyond [`limit`](Self::limit) are zero.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// ORs a bitmap of the same layout into the set. Words and bits beyond the limit are ignored.
    pub fn union_words(&mut self, words: &[u64]) {
        for (mine, other) in self.words.iter_mut().zip(words) {
            *mine |= other;
        }
        self.trim();
    }

    /// ORs another set into this one.
    pub fn union(&mut self, other: &PageSet) {
        self.union_words(&other.words);
    }

    /// Keeps only what is also in `other`; granules beyond `other`'s limit go.
    pub fn intersect(&mut self, other: &PageSet) {
        for (i, mine) in self.words.iter_mut().enumerate() {
            *mine &= other.words.get(i).copied().unwrap_or(0);
        }
    }

    /// Removes all that is in `other`.
    pub fn subtract(&mut self, other: &PageSet) {
        for (mine, other) in self.words.iter_mut().zip(&other.words) {
            *mine &= !other;
        }
    }

    /// Makes the set the same as `other` inside `range`, which begins at a multiple of 64 granules; it ends at one, or at
    /// the limit.
    pub fn copy_range(&mut self, other: &PageSet, range: Range<u64>) {
        for word in words_of(&range) {
            if let Some(mine) = self.words.get_mut(word) {
                *mine = other.words.get(word).copied().unwrap_or(0);
            }
        }
        self.trim();
    }

    /// Removes what is in `other` inside such a range; how many granules.
    pub fn subtract_range(&mut self, other: &PageSet, range: Range<u64>) -> u64 {
        let mut gone = 0;
        for word in words_of(&range) {
            if let (Some(mine), Some(other)) = (self.words.get_mut(word), other.words.get(word)) {
                gone += u64::from((*mine & other).count_ones());
                *mine &= !other;
            }
        }
        gone
    }

    /// Adds one granule; `true` if it was not there.
    ///
    /// # Panics
    /// If `page` is not below the limit.
    pub fn insert(&mut self, page: u64) -> bool {
        assert!(page < self.pages, "granule {page} beyond the limit {}", self.pages);
        let word = &mut self.words[(page / 64) as usize];
        let new = *word & (1 << (page % 64)) == 0;
        *word |= 1 << (page % 64);
        new
    }

    /// Removes one granule; `true` if it was there.
    pub fn remove(&mut self, page: u64) -> bool {
        if page >= self.pages {
            return false;
        }
        let word = &mut self.words[(page / 64) as usize];
        let had = *word & (1 << (page % 64)) != 0;
        *word &= !(1 << (page % 64));
        had
    }

    /// Whether the granule is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Adds a range of granules, cut at the limit.
    pub fn insert_range(&mut self, range: Range<u64>) {
        self.for_words(range, |word, mask| *word |= mask);
    }

    /// Removes a range of granules, cut at the limit.
    pub fn remove_range(&mut self, range: Range<u64>) {
        self.for_words(range, |word, mask| *word &= !mask);
    }

    /// How many granules are in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The maximal runs of consecutive members inside `range`, in ascending order.
    pub fn runs(&self, range: Range<u64>) -> Runs<'_> {
        Runs { set: self, next: range.start, end: range.end.min(self.pages) }
    }

    fn for_words(&mut self, range: Range<u64>, mut f: impl FnMut(&mut u64, u64)) {
        let end = range.end.min(self.pages);
        let mut page = range.start;
        while page < end {
            let bit = page % 64;
            let n = (64 - bit).min(end - page);
            let mask = if n == 64 { u64::MAX } else { ((1u64 << n) - 1) << bit };
            f(&mut self.words[(page / 64) as usize], mask);
            page += n;
        }
    }

    fn trim(&mut self) {
        if !self.pages.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (self.pages % 64)) - 1;
        }
    }

    /// First granule at or after `from` whose membership is `member`, or `end`.
    fn find(&self, from: u64, end: u64, member: bool) -> u64 {
        let mut page = from;
        while page < end {
            let word = self.words[(page / 64) as usize];
            let word = if member { word } else { !word } >> (page % 64);
            if word != 0 {
                return (page + u64::from(word.trailing_zeros())).min(end);
            }
            page = (page / 64 + 1) * 64;
        }
        end
    }
}

/// The words of a range that begins at a whole one, and ends at one or at the limit.
fn words_of(range: &Range<u64>) -> Range<usize> {
    (range.start / 64) as usize..range.end.div_ceil(64) as usize
}

/// Iterator over runs of consecutive granules; see [`PageSet::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    next: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.set.find(self.next, self.end, true);
        if start >= self.end {
            return None;
        }
        let stop = self.set.find(start, self.end, false);
        self.next = stop;
        Some(start..stop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cross_words_and_stop_at_the_limit() {
        let mut set = PageSet::new(200);
        set.insert_range(60..130);
        set.insert(199);
        set.insert_range(190..500);
        assert_eq!(set.runs(0..u64::MAX).collect::<Vec<_>>(), [60..130, 190..200]);
        assert_eq!(set.runs(64..128).collect::<Vec<_>>(), std::iter::once(64..128).collect::<Vec<_>>());
        assert_eq!(set.count(), 80);
    }

    #[test]
    fn foreign_words_beyond_the_limit_are_dropped() {
        let mut set = PageSet::new(70);
        set.union_words(&[0, u64::MAX, u64::MAX]);
        assert_eq!(set.runs(0..1000).collect::<Vec<_>>(), std::iter::once(64..70).collect::<Vec<_>>());
        assert!(!set.contains(70));
    }

    #[test]
    fn set_algebra_agrees_with_a_plain_set() {
        let mut seed = 1u64;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..200 {
            let limit = 1 + next() % 300;
            let (mut a, mut b) = (PageSet::new(limit), PageSet::new(limit));
            let (mut sa, mut sb) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
            for _ in 0..20 {
                let start = next() % limit;
                let len = next() % 80;
                a.insert_range(start..start + len);
                sa.extend(start..(start + len).min(limit));
                let page = next() % limit;
                assert_eq!(b.insert(page), sb.insert(page));
                let gone = next() % limit;
                assert_eq!(b.remove(gone), sb.remove(&gone));
            }
            let listed = |s: &PageSet| s.runs(0..limit).flatten().collect::<Vec<_>>();
            assert_eq!(listed(&a), sa.iter().copied().collect::<Vec<_>>());
            let mut u = a.clone();
            u.union(&b);
            assert_eq!(listed(&u), sa.union(&sb).copied().collect::<Vec<_>>());
            u.subtract(&b);
            assert_eq!(listed(&u), sa.difference(&sb).copied().collect::<Vec<_>>());
            let part = next() % (limit.div_ceil(64)) * 64..limit;
            let mut copy = a.clone();
            copy.copy_range(&b, part.clone());
            let expected: Vec<_> = sa.range(..part.start).chain(sb.range(part.clone())).copied().collect();
            assert_eq!(listed(&copy), expected);
            let mut less = a.clone();
            let both = sa.intersection(&sb).filter(|page| part.contains(page)).count() as u64;
            assert_eq!(less.subtract_range(&b, part.clone()), both);
            let expected: Vec<_> = sa.iter().filter(|p| !part.contains(p) || !sb.contains(p)).copied().collect();
            assert_eq!(listed(&less), expected);
            a.intersect(&b);
            assert_eq!(listed(&a), sa.intersection(&sb).copied().collect::<Vec<_>>());
            assert_eq!(a.count(), sa.intersection(&sb).count() as u64);
        }
    }
}
