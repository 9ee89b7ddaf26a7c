//! When to stop the guest: what the blackout would be now, whether precopy converges, and how hard to throttle.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use crate::journey::lock;

/// What something cost in the last journeys of this process, in microseconds. State can be saved only at rest, so
/// before the first stop there is only a guess. A journey on a busy machine says little about the next one: the median of
/// the last few counts.
struct History(Mutex<VecDeque<u64>>);

const HISTORY: usize = 7;

impl History {
    const fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    fn add(&self, cost: Duration) {
        let mut all = lock(&self.0);
        if all.len() == HISTORY {
            all.pop_front();
        }
        all.push_back(us(cost));
    }

    /// 0 if there is none.
    fn median(&self) -> u64 {
        let mut all: Vec<u64> = lock(&self.0).iter().copied().collect();
        all.sort_unstable();
        all.get(all.len().saturating_sub(1) / 2).copied().unwrap_or(0)
    }
}

static SOURCE: History = History::new();
static DESTINATION: History = History::new();

/// Remembers what stop and save took at this source.
pub(crate) fn remember_source(cost: Duration) {
    SOURCE.add(cost);
}

/// Remembers what load and start took at this destination.
pub(crate) fn remember_destination(cost: Duration) {
    DESTINATION.add(cost);
}

/// What load and start usually take here, in microseconds; 0 if not known.
pub(crate) fn usual_destination_us() -> u64 {
    DESTINATION.median()
}

pub(crate) fn us(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

/// The guess before anything was measured: what a stop takes, and what each unit adds at either end.
const GUESS: Duration = Duration::from_micros(200);
const GUESS_PER_UNIT: Duration = Duration::from_micros(15);

/// What is still to come of the streams of units.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct States {
    /// Bytes, as far as is known.
    pub(crate) bytes: u64,
    /// How long they take from one end to the other.
    pub(crate) time: Duration,
    /// More could be given while the machine runs.
    pub(crate) more: bool,
}

/// Predicts the blackout from what was measured so far.
#[derive(Clone, Debug)]
pub(crate) struct Predictor {
    /// Bytes a second that the receiver acknowledged lately; 0: not known.
    pub(crate) bandwidth: f64,
    /// Shortest round trip seen on the control channel.
    pub(crate) round_trip: Duration,
    /// Stop and save here.
    pub(crate) source_cost: Duration,
    /// Load and start there.
    pub(crate) destination_cost: Duration,
    /// Of units with streams.
    pub(crate) states: States,
}

impl Predictor {
    /// `load_us` is the destination's own expectation, 0 if it has none.
    pub(crate) fn new(units: usize, load_us: u64) -> Self {
        let guess = GUESS + GUESS_PER_UNIT * u32::try_from(units).unwrap_or(u32::MAX);
        let measured = |us| if us == 0 { guess } else { Duration::from_micros(us) };
        Self {
            bandwidth: 0.0,
            round_trip: Duration::from_millis(1),
            source_cost: measured(SOURCE.median()),
            destination_cost: measured(load_us.min(10_000_000)),
            states: States::default(),
        }
    }

    /// Takes the bandwidth of a round into account: bytes that were acknowledged, and in what time. A round of a few
    /// pages says little about the bandwidth and much about the round trip, so it weighs by its size.
    pub(crate) fn learn(&mut self, bytes: u64, took: Duration) {
        if bytes == 0 {
            return;
        }
        let seen = bytes as f64 / took.as_secs_f64().max(1e-6);
        let weight = (bytes as f64 / (8 << 20) as f64).clamp(0.05, 0.7);
        self.bandwidth = if self.bandwidth == 0.0 { seen } else { self.bandwidth * (1.0 - weight) + seen * weight };
    }

    /// Sending that much takes so long.
    pub(crate) fn transfer(&self, bytes: u64) -> Duration {
        if self.bandwidth <= 0.0 {
            return Duration::from_secs(3600);
        }
        Duration::from_secs_f64((bytes as f64 / self.bandwidth).min(1e6))
    }

    /// What the blackout costs besides the last pages.
    pub(crate) fn fixed(&self) -> Duration {
        // Offer to Ready, and Run to Running.
        self.source_cost + self.destination_cost + self.round_trip * 2 + self.states.time
    }

    /// The whole blackout if the guest were stopped now with that much dirty.
    pub(crate) fn blackout(&self, bytes: u64) -> Duration {
        self.transfer(bytes) + self.fixed()
    }
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Stop the guest.
    Stop,
    /// Send another round.
    Round,
}

/// Decides when precopy ends and when it needs help.
#[derive(Clone, Debug, Default)]
pub(crate) struct Convergence {
    /// Consecutive rounds that made no good progress.
    stuck: u32,
    /// Rounds made after the limit was met, to make the blackout shorter still.
    polished: u32,
    throttle: u8,
}

/// First step of the throttle, each further one, and the most, in percent.
const THROTTLE_FIRST: u8 = 20;
const THROTTLE_STEP: u8 = 10;
const THROTTLE_MOST: u8 = 99;
/// Rounds without good progress before each step.
const PATIENCE: u32 = 2;
/// At most so many rounds for a shorter blackout once the limit is met.
const POLISH: u32 = 4;

impl Convergence {
    /// Throttle in force, in percent.
    pub(crate) fn throttle(&self) -> u8 {
        self.throttle
    }

    /// Whether further rounds promise nothing, without help: some made no good progress, or the last one did not and the
    /// guest writes `dirtied` bytes per second, which the link does not carry.
    pub(crate) fn is_hopeless(&self, dirtied: f64, predictor: &Predictor) -> bool {
        self.stuck >= PATIENCE || (self.stuck > 0 && dirtied >= predictor.bandwidth)
    }

    /// Judges a round that sent `sent` bytes and found `dirty` bytes written meanwhile.
    pub(crate) fn judge(
        &mut self,
        sent: u64,
        dirty: u64,
        predictor: &Predictor,
        limit: Duration,
        may_throttle: bool,
    ) -> Verdict {
        let blackout = predictor.blackout(dirty);
        let pages_part = predictor.transfer(dirty);
        // What the stop costs besides the pages no round makes shorter. Where that alone exceeds the limit, the guest is
        // stopped as soon as the pages hardly matter: waiting would not help.
        let limit = limit.max(predictor.fixed() + predictor.fixed() / 4);
        // Less than half of what was sent was dirtied again: the next round will be half as long.
        let shrinking = dirty < sent / 2;
        if blackout <= limit {
            if shrinking && self.polished < POLISH && pages_part * 4 > predictor.fixed() {
                self.polished += 1;
                return Verdict::Round;
            }
            return Verdict::Stop;
        }
        self.stuck = if shrinking { 0 } else { self.stuck + 1 };
        // Slowing the guest down shortens the page part only; where that is small it cannot help.
        let helps = pages_part * 4 > blackout;
        if may_throttle && helps && self.stuck >= PATIENCE {
            self.stuck = 0;
            self.throttle = match self.throttle {
                0 => THROTTLE_FIRST,
                t => t.saturating_add(THROTTLE_STEP).min(THROTTLE_MOST),
            };
        }
        Verdict::Round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn predictor() -> Predictor {
        Predictor {
            bandwidth: 1000.0 * MIB as f64,
            round_trip: Duration::from_micros(50),
            source_cost: Duration::from_micros(200),
            destination_cost: Duration::from_micros(200),
            states: States::default(),
        }
    }

    #[test]
    fn a_guest_that_dirties_little_is_stopped_as_soon_as_the_limit_is_met() {
        let mut c = Convergence::default();
        let limit = Duration::from_millis(5);
        assert_eq!(c.judge(512 * MIB, 30 * MIB, &predictor(), limit, true), Verdict::Round);
        assert_eq!(c.judge(30 * MIB, 2 * MIB, &predictor(), limit, true), Verdict::Round, "a cheap round pays");
        assert_eq!(c.judge(2 * MIB, MIB / 16, &predictor(), limit, true), Verdict::Stop);
        assert_eq!(c.throttle(), 0);
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_throttled_step_by_step() {
        let mut c = Convergence::default();
        let mut seen = vec![];
        for _ in 0..30 {
            assert_eq!(c.judge(500 * MIB, 450 * MIB, &predictor(), Duration::from_millis(5), true), Verdict::Round);
            seen.push(c.throttle());
        }
        seen.dedup();
        assert_eq!(seen, [0, 20, 30, 40, 50, 60, 70, 80, 90, 99]);
    }

    #[test]
    fn a_guest_that_outruns_the_link_is_hopeless_at_once_and_one_that_does_not_after_a_second_look() {
        let (predictor, limit) = (predictor(), Duration::from_millis(5));
        let mut c = Convergence::default();
        assert!(!c.is_hopeless(2.0 * predictor.bandwidth, &predictor), "no round was made");
        c.judge(500 * MIB, 450 * MIB, &predictor, limit, false);
        assert!(c.is_hopeless(predictor.bandwidth, &predictor));
        assert!(!c.is_hopeless(predictor.bandwidth * 0.9, &predictor));
        c.judge(450 * MIB, 400 * MIB, &predictor, limit, false);
        assert!(c.is_hopeless(predictor.bandwidth * 0.9, &predictor));
        c.judge(400 * MIB, 100 * MIB, &predictor, limit, false);
        assert!(!c.is_hopeless(predictor.bandwidth * 2.0, &predictor), "it converges all the same");
    }

    #[test]
    fn a_limit_below_the_fixed_cost_ends_when_the_pages_hardly_matter_and_is_not_blamed_on_the_guest() {
        let mut c = Convergence::default();
        let limit = Duration::from_micros(100);
        for _ in 0..10 {
            assert_eq!(c.judge(MIB, MIB / 3, &predictor(), limit, true), Verdict::Round);
        }
        assert_eq!(c.judge(MIB / 64, MIB / 64, &predictor(), limit, true), Verdict::Stop);
        assert_eq!(c.throttle(), 0);
    }

    #[test]
    fn one_slow_journey_does_not_spoil_the_next_prediction() {
        let history = History::new();
        assert_eq!(history.median(), 0);
        for ms in [1, 1, 900, 1, 1] {
            history.add(Duration::from_millis(ms));
        }
        assert_eq!(history.median(), 1000);
    }
}
