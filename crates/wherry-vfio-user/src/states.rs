//! The states of a device's migration, and the ways between them (chapter "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE", and
//! `enum vfio_device_mig_state` for the two that are our extension).

use std::collections::VecDeque;

/// A state of a device's migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum State {
    /// It has failed, and must be reset.
    Error = 0,
    /// It does not change anything, inside or outside.
    Stop = 1,
    /// It runs.
    Running = 2,
    /// It has stopped, and its state is read.
    StopCopy = 3,
    /// It has stopped, and its state is written.
    Resuming = 4,
    /// It runs, but starts nothing towards other devices.
    RunningP2p = 5,
    /// It runs, and its state is read.
    PreCopy = 6,
    /// As [`Self::RunningP2p`], and its state is read.
    PreCopyP2p = 7,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// The state with a number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// Whether its state is read in it.
    pub fn is_saving(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p | Self::StopCopy)
    }

    /// Whether it is one of our extension.
    pub fn is_p2p(self) -> bool {
        matches!(self, Self::RunningP2p | Self::PreCopyP2p)
    }
}

/// Which states a device has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ways {
    /// [`State::PreCopy`].
    pub pre_copy: bool,
    /// The P2P states. With them the direct arcs between running and stopped are gone: a device passes through them.
    pub p2p: bool,
}

impl Ways {
    fn has(self, state: State) -> bool {
        match state {
            State::Error => false,
            State::RunningP2p => self.p2p,
            State::PreCopy => self.pre_copy,
            State::PreCopyP2p => self.p2p && self.pre_copy,
            _ => true,
        }
    }

    fn arcs(self) -> impl Iterator<Item = (State, State)> {
        use State::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
        const ALWAYS: [(State, State); 6] = [
            (StopCopy, Stop),
            (Resuming, Stop),
            (Stop, StopCopy),
            (Stop, Resuming),
            (PreCopy, Running),
            (Running, PreCopy),
        ];
        const DIRECT: [(State, State); 3] = [(Running, Stop), (Stop, Running), (PreCopy, StopCopy)];
        const P2P: [(State, State); 9] = [
            (Running, RunningP2p),
            (RunningP2p, Running),
            (RunningP2p, Stop),
            (Stop, RunningP2p),
            (PreCopy, PreCopyP2p),
            (PreCopyP2p, PreCopy),
            (PreCopyP2p, StopCopy),
            (RunningP2p, PreCopyP2p),
            (PreCopyP2p, RunningP2p),
        ];
        let more: &[_] = if self.p2p { &P2P } else { &DIRECT };
        ALWAYS.into_iter().chain(more.iter().copied()).filter(move |(from, to)| self.has(*from) && self.has(*to))
    }

    /// The arcs from one state to another: the shortest way that has no state in its middle in which state is read; but for ways
    /// from one of those to another, on which reading goes on.
    /// `None` where there is no way, or may be none.
    pub fn path(self, from: State, to: State) -> Option<Vec<(State, State)>> {
        // Data that was read after the stop would be followed by data from before it.
        if from == State::StopCopy && matches!(to, State::PreCopy | State::PreCopyP2p) {
            return None;
        }
        if !self.has(from) || !self.has(to) {
            return None;
        }
        let mut queue = VecDeque::from([(from, Vec::new())]);
        let mut seen = vec![from];
        while let Some((at, path)) = queue.pop_front() {
            if at == to {
                return Some(path);
            }
            if at != from && at.is_saving() && !(from.is_saving() && to.is_saving()) {
                continue;
            }
            for (_, next) in self.arcs().filter(|(start, _)| *start == at) {
                if !seen.contains(&next) {
                    seen.push(next);
                    let mut path = path.clone();
                    path.push((at, next));
                    queue.push_back((next, path));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::{State, Ways};
    use State::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

    fn path(ways: Ways, from: State, to: State) -> Option<Vec<State>> {
        ways.path(from, to).map(|arcs| arcs.into_iter().map(|(_, to)| to).collect())
    }

    #[test]
    fn ways_are_the_shortest_without_saving_states_in_their_middle() {
        let ways = Ways { pre_copy: true, p2p: false };
        assert_eq!(path(ways, Running, StopCopy), Some(vec![Stop, StopCopy]));
        assert_eq!(path(ways, PreCopy, Stop), Some(vec![Running, Stop]));
        assert_eq!(path(ways, PreCopy, StopCopy), Some(vec![StopCopy]));
        assert_eq!(path(ways, StopCopy, Running), Some(vec![Stop, Running]));
        assert_eq!(path(ways, Resuming, StopCopy), Some(vec![Stop, StopCopy]));
        assert_eq!(path(ways, StopCopy, Resuming), Some(vec![Stop, Resuming]));
        assert_eq!(path(ways, Running, Running), Some(vec![]));
    }

    #[test]
    fn there_is_no_way_from_stop_copy_back_to_pre_copy_nor_through_error() {
        let ways = Ways { pre_copy: true, p2p: true };
        assert_eq!(path(ways, StopCopy, PreCopy), None);
        assert_eq!(path(ways, StopCopy, PreCopyP2p), None);
        for state in State::ALL {
            assert_eq!(path(ways, Error, state), None);
            assert_eq!(path(ways, state, Error), None);
        }
    }

    #[test]
    fn states_that_a_device_lacks_are_on_no_way() {
        let ways = Ways::default();
        assert_eq!(path(ways, Running, PreCopy), None);
        assert_eq!(path(ways, Running, RunningP2p), None);
        assert_eq!(path(ways, Stop, Running), Some(vec![Running]));
    }

    #[test]
    fn with_p2p_devices_pass_through_it() {
        let ways = Ways { pre_copy: true, p2p: true };
        assert_eq!(path(ways, Running, Stop), Some(vec![RunningP2p, Stop]));
        assert_eq!(path(ways, Resuming, Running), Some(vec![Stop, RunningP2p, Running]));
        assert_eq!(path(ways, PreCopy, StopCopy), Some(vec![PreCopyP2p, StopCopy]));
    }
}
