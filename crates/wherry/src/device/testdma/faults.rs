//! What the device does wrong on purpose: one `--fault NAME[=ARGUMENT]` each.
//!
//! Those that belong to a message or to a state of its migration happen at a [`Place`]: before it, or after it and before the
//! answer; the first time, or the `n`-th. Each of them happens once.

use std::str::FromStr;
use std::time::Duration;

use wherry_vfio_user::State;
use wherry_vfio_user::message::Command;
use wherry_vfio_user::server::Moment;

/// What stands in `--help`.
pub const HELP: &str = "\
Faults (--fault NAME[=ARGUMENT], as often as wanted):
  late-dma[=MS]          writes to a buffer that is complete, so long after it was brought to rest [10]
  stuck-transaction      Transactions Pending stays when it does no DMA any more
  lost-completion[=N]    buffer N is never completed, but counted [1]
  lost-interrupt[=N]     interrupt N is not raised [1]
  wrong-state[=N]        byte N of its state is wrong [1000]
  short-state            the end of its state is missing
  slow-state=MS          each piece of its state takes so long, out and in
  endless-state          its state has no end
  refuse=STATE           it does not go to that state
  crash=PLACE            its process ends
  disconnect=PLACE       it closes the connection
  hang=PLACE             it does not go on
PLACE is [after-]MESSAGE[:N] or [after-]STATE[:N]: before it, or after it without an answer; the N-th time [1].
MESSAGE: version, dma-map, dma-unmap, get-info, get-region-info, get-region-io-fds, get-irq-info, set-irqs,
  region-read, region-write, region-write-multi, reset, feature, mig-data-read, mig-data-write.
STATE: stop, running, stop-copy, resuming, running-p2p, pre-copy, pre-copy-p2p.";

const MESSAGES: [(&str, Command); 15] = [
    ("version", Command::Version),
    ("dma-map", Command::DmaMap),
    ("dma-unmap", Command::DmaUnmap),
    ("get-info", Command::GetInfo),
    ("get-region-info", Command::GetRegionInfo),
    ("get-region-io-fds", Command::GetRegionIoFds),
    ("get-irq-info", Command::GetIrqInfo),
    ("set-irqs", Command::SetIrqs),
    ("region-read", Command::RegionRead),
    ("region-write", Command::RegionWrite),
    ("region-write-multi", Command::RegionWriteMulti),
    ("reset", Command::Reset),
    ("feature", Command::Feature),
    ("mig-data-read", Command::MigDataRead),
    ("mig-data-write", Command::MigDataWrite),
];

const STATES: [(&str, State); 7] = [
    ("stop", State::Stop),
    ("running", State::Running),
    ("stop-copy", State::StopCopy),
    ("resuming", State::Resuming),
    ("running-p2p", State::RunningP2p),
    ("pre-copy", State::PreCopy),
    ("pre-copy-p2p", State::PreCopyP2p),
];

/// What has come: a message, or an order to go to a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Message(Command),
    State(State),
}

/// Where something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    event: Event,
    moment: Moment,
    /// How often it has to come until it is the time; 0: it has happened.
    left: u32,
}

/// What happens at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    Crash,
    Disconnect,
    Hang,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    LateDma(Duration),
    StuckTransaction,
    LostCompletion(u64),
    LostInterrupt(u64),
    WrongState(u64),
    ShortState,
    SlowState(Duration),
    EndlessState,
    Refuse(State),
    At(Mishap, Place),
}

fn named<T: Copy>(names: &[(&str, T)], name: &str) -> Option<T> {
    names.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, left) = match text.split_once(':') {
            Some((name, times)) => (name, times.parse().ok().filter(|times| *times > 0)),
            None => (text, Some(1)),
        };
        let left = left.ok_or_else(|| format!("{text:?}: give a number from 1 on behind the colon"))?;
        let (moment, name) = match name.strip_prefix("after-") {
            Some(name) => (Moment::After, name),
            None => (Moment::Before, name),
        };
        let message = named(&MESSAGES, name).map(Event::Message);
        let event = message.or_else(|| named(&STATES, name).map(Event::State));
        let event = event.ok_or_else(|| format!("{name:?} is no message and no state: see --help"))?;
        Ok(Self { event, moment, left })
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, argument) = match text.split_once('=') {
            Some((name, argument)) => (name, Some(argument)),
            None => (text, None),
        };
        let number = |default: Option<u64>| match argument {
            Some(argument) => argument.parse().map_err(|_| format!("{text:?}: give a number")),
            None => default.ok_or_else(|| format!("{name} needs a number: {name}=N")),
        };
        let place = || argument.ok_or_else(|| format!("{name} needs a place: {name}=PLACE"))?.parse();
        let fault = match name {
            "late-dma" => Self::LateDma(Duration::from_millis(number(Some(10))?)),
            "stuck-transaction" => Self::StuckTransaction,
            "lost-completion" => Self::LostCompletion(number(Some(1))?),
            "lost-interrupt" => Self::LostInterrupt(number(Some(1))?),
            "wrong-state" => Self::WrongState(number(Some(1000))?),
            "short-state" => Self::ShortState,
            "slow-state" => Self::SlowState(Duration::from_millis(number(None)?)),
            "endless-state" => Self::EndlessState,
            "refuse" => {
                let state = argument.and_then(|name| named(&STATES, name));
                Self::Refuse(state.ok_or_else(|| format!("{text:?}: give a state, such as refuse=stop-copy"))?)
            }
            "crash" => Self::At(Mishap::Crash, place()?),
            "disconnect" => Self::At(Mishap::Disconnect, place()?),
            "hang" => Self::At(Mishap::Hang, place()?),
            other => return Err(format!("unknown fault {other:?}: see --help")),
        };
        let takes_none = matches!(fault, Self::StuckTransaction | Self::ShortState | Self::EndlessState);
        if takes_none && argument.is_some() {
            return Err(format!("{name} takes no argument"));
        }
        Ok(fault)
    }
}

/// All faults of a device.
#[derive(Clone, Debug, Default)]
pub struct Faults(Vec<Fault>);

impl Faults {
    pub fn new(faults: &[Fault]) -> Self {
        Self(faults.to_vec())
    }

    fn find<T>(&self, which: impl Fn(Fault) -> Option<T>) -> Option<T> {
        self.0.iter().find_map(|fault| which(*fault))
    }

    pub fn late_dma(&self) -> Option<Duration> {
        self.find(|fault| if let Fault::LateDma(after) = fault { Some(after) } else { None })
    }

    pub fn stuck_transaction(&self) -> bool {
        self.0.contains(&Fault::StuckTransaction)
    }

    pub fn loses_completion(&self, sequence: u64) -> bool {
        self.0.contains(&Fault::LostCompletion(sequence))
    }

    pub fn loses_interrupt(&self, number: u64) -> bool {
        self.0.contains(&Fault::LostInterrupt(number))
    }

    /// Which byte of the state is wrong.
    pub fn wrong_state(&self) -> Option<u64> {
        self.find(|fault| if let Fault::WrongState(at) = fault { Some(at) } else { None })
    }

    pub fn short_state(&self) -> bool {
        self.0.contains(&Fault::ShortState)
    }

    pub fn slow_state(&self) -> Option<Duration> {
        self.find(|fault| if let Fault::SlowState(time) = fault { Some(time) } else { None })
    }

    pub fn endless_state(&self) -> bool {
        self.0.contains(&Fault::EndlessState)
    }

    pub fn refuses(&self, state: State) -> bool {
        self.0.contains(&Fault::Refuse(state))
    }

    /// What is to happen here.
    pub fn happens(&mut self, event: Event, moment: Moment) -> Option<Mishap> {
        let mut happens = None;
        for fault in &mut self.0 {
            if let Fault::At(mishap, place) = fault
                && (place.event, place.moment) == (event, moment)
                && place.left > 0
            {
                place.left -= 1;
                if place.left == 0 {
                    happens = Some(*mishap);
                }
            }
        }
        happens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> Fault {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn every_fault_place_message_and_state_of_the_help_is_one() {
        for (name, command) in MESSAGES {
            assert!(HELP.contains(name));
            let place = Place { event: Event::Message(command), moment: Moment::After, left: 3 };
            assert_eq!(fault(&format!("crash=after-{name}:3")), Fault::At(Mishap::Crash, place));
        }
        for (name, state) in STATES {
            assert!(HELP.contains(name));
            assert_eq!(fault(&format!("refuse={name}")), Fault::Refuse(state));
            let place = Place { event: Event::State(state), moment: Moment::Before, left: 1 };
            assert_eq!(fault(&format!("hang={name}")), Fault::At(Mishap::Hang, place));
        }
        for line in HELP.lines().filter_map(|line| line.strip_prefix("  ")) {
            let name = line.split_whitespace().next().unwrap_or_default();
            if MESSAGES.iter().any(|(message, _)| name.trim_end_matches(',') == *message) {
                continue;
            }
            let text = name.replace("[=", "=").replace(']', "").replace("=MS", "=7").replace("=N", "=7");
            fault(&text.replace("=STATE", "=stop").replace("=PLACE", "=reset"));
        }
    }

    #[test]
    fn the_manual_has_every_fault_of_the_help() {
        const MANUAL: &str = include_str!("../../../../../docs/testdma.md");
        let lines = HELP.lines().take_while(|line| !line.starts_with("PLACE"));
        let lines = lines.filter_map(|line| line.strip_prefix("  "));
        let names: Vec<_> = lines.filter_map(|line| line.split_whitespace().next()).collect();
        let documented: Vec<_> = MANUAL.lines().skip_while(|line| *line != "## Faults").collect();
        let documented = documented.iter().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        assert!(documented.eq(names.iter().copied()), "{names:?}");
    }

    #[test]
    fn what_is_none_is_refused_with_what_would_be_right() {
        for (text, hint) in [
            ("late", "see --help"),
            ("crash", "crash=PLACE"),
            ("crash=dinner", "no message and no state"),
            ("crash=reset:0", "from 1 on"),
            ("slow-state", "slow-state=N"),
            ("lost-interrupt=x", "a number"),
            ("refuse=reset", "give a state"),
            ("short-state=1", "no argument"),
        ] {
            let error = text.parse::<Fault>().expect_err(text);
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn what_happens_at_a_place_happens_there_once() {
        let mut faults = Faults::new(&[fault("disconnect=reset:2"), fault("hang=after-stop")]);
        let reset = Event::Message(Command::Reset);
        let seen: Vec<_> = (0..4).map(|_| faults.happens(reset, Moment::Before)).collect();
        assert_eq!(seen, [None, Some(Mishap::Disconnect), None, None]);
        assert_eq!(faults.happens(reset, Moment::After), None);
        assert_eq!(faults.happens(Event::State(State::Stop), Moment::Before), None);
        assert_eq!(faults.happens(Event::State(State::Stop), Moment::After), Some(Mishap::Hang));
    }
}
