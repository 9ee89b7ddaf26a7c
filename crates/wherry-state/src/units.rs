//! All units of a machine, and the steps over them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Saved, Section, StateError, StateFile, StateUnit, UnitError, UnitId};

/// The units of one machine in an order in which each stands after those it depends on.
pub struct Units {
    ordered: Vec<Arc<dyn StateUnit>>,
}

impl fmt::Debug for Units {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ordered.iter().map(|u| u.id().to_string())).finish()
    }
}

/// A step failed in one or more units, or the state does not fit the units.
#[derive(Debug, thiserror::Error)]
pub enum UnitsError {
    /// Units failed; each with its reason, in the order in which they were asked.
    #[error("could not {step} {}", list(.failures))]
    Step {
        /// `stop`, `save`, ...
        step: &'static str,
        /// Who failed, and why.
        failures: Vec<(UnitId, UnitError)>,
    },
    /// The state itself is at fault.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is state for a unit that this machine does not have, or that saves nothing.
    #[error("there is state for unit {0}, which this machine does not have or which takes none")]
    Unclaimed(UnitId),
    /// A unit that saves state was given none.
    #[error("there is no state for unit {0}")]
    Missing(UnitId),
    /// Two units have one id.
    #[error("two units are called {0}")]
    SameId(UnitId),
    /// Units depend on each other in a circle.
    #[error("the dependencies of these units form a circle: {0:?}")]
    Circle(Vec<String>),
}

fn list(failures: &[(UnitId, UnitError)]) -> String {
    failures.iter().map(|(id, e)| format!("{id}: {e}")).collect::<Vec<_>>().join("; ")
}

impl Units {
    /// Orders the units by their dependencies; among those that are free, the order given is kept.
    pub fn new(units: Vec<Arc<dyn StateUnit>>) -> Result<Self, UnitsError> {
        let mut waiting = units;
        let mut seen = std::collections::BTreeSet::new();
        for unit in &waiting {
            if !seen.insert(unit.id()) {
                return Err(UnitsError::SameId(unit.id()));
            }
        }
        let mut ordered = Vec::with_capacity(waiting.len());
        while !waiting.is_empty() {
            let names: std::collections::BTreeSet<String> = waiting.iter().map(|u| u.id().name).collect();
            let (ready, blocked): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|u| !u.depends_on().iter().any(|name| names.contains(*name)));
            if ready.is_empty() {
                return Err(UnitsError::Circle(blocked.iter().map(|u| u.id().to_string()).collect()));
            }
            ordered.extend(ready);
            waiting = blocked;
        }
        Ok(Self { ordered })
    }

    /// The units, each after those it depends on.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<dyn StateUnit>> {
        self.ordered.iter()
    }

    /// Id and schema of every unit, for the handshake.
    pub fn schemas(&self) -> Vec<(UnitId, u32)> {
        self.ordered.iter().map(|u| (u.id(), u.schema())).collect()
    }

    /// Drains all units; see [`StateUnit::drain`].
    pub fn drain(&self, limit: Duration) -> Result<(), UnitsError> {
        let deadline = Instant::now() + limit;
        self.each("drain", self.ordered.iter().rev(), |u| u.drain(deadline))
    }

    /// Takes a drain back.
    pub fn undrain(&self) -> Result<(), UnitsError> {
        self.each("undrain", self.ordered.iter(), |u| u.undrain())
    }

    /// Brings all units to rest, those that others depend on last. All are told first and waited for afterwards, so
    /// that the time does not add up. On an error the caller must `start` to undo what has stopped.
    pub fn stop(&self, limit: Duration) -> Result<(), UnitsError> {
        let deadline = Instant::now() + limit;
        self.each("stop", self.ordered.iter().rev(), |u| u.begin_stop())?;
        self.each("stop", self.ordered.iter().rev(), |u| u.finish_stop(deadline))
    }

    /// Saves all units.
    pub fn save(&self) -> Result<StateFile, UnitsError> {
        let mut sections = Vec::with_capacity(self.ordered.len());
        self.each("save", self.ordered.iter(), |u| {
            if let Saved::Section(section) = u.save()? {
                sections.push(section);
            }
            Ok(())
        })?;
        let file = StateFile { sections };
        file.check()?;
        Ok(file)
    }

    /// Restores all units. Every section must be claimed and every unit with a schema must get its section; this is
    /// checked before the first unit is touched.
    pub fn restore(&self, file: &StateFile) -> Result<(), UnitsError> {
        file.check()?;
        let mut sections: BTreeMap<UnitId, &Section> = file.sections.iter().map(|s| (s.id(), s)).collect();
        let mut plan = Vec::with_capacity(sections.len());
        for unit in self.ordered.iter().filter(|u| u.schema() > 0) {
            let section = sections.remove(&unit.id()).ok_or_else(|| UnitsError::Missing(unit.id()))?;
            plan.push((unit, section));
        }
        if let Some(id) = sections.into_keys().next() {
            return Err(UnitsError::Unclaimed(id));
        }
        for (unit, section) in plan {
            // The first failure ends it: what depends on a unit must not be restored over its ruins.
            unit.restore(section).map_err(|e| UnitsError::Step { step: "restore", failures: vec![(unit.id(), e)] })?;
        }
        Ok(())
    }

    /// Starts all units, those that others depend on first.
    pub fn start(&self) -> Result<(), UnitsError> {
        self.each("start", self.ordered.iter(), |u| u.start())
    }

    fn each<'a>(
        &'a self,
        step: &'static str,
        units: impl Iterator<Item = &'a Arc<dyn StateUnit>>,
        mut f: impl FnMut(&dyn StateUnit) -> Result<(), UnitError>,
    ) -> Result<(), UnitsError> {
        let failures: Vec<_> = units.filter_map(|u| f(&**u).err().map(|e| (u.id(), e))).collect();
        if failures.is_empty() { Ok(()) } else { Err(UnitsError::Step { step, failures }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SavedState;
    use std::sync::Mutex;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Value {
        #[prost(uint32, tag = "1")]
        value: u32,
    }
    impl SavedState for Value {
        const SCHEMA: u32 = 1;
    }

    struct Fake {
        id: UnitId,
        needs: &'static [&'static str],
        schema: u32,
        fail: Option<&'static str>,
        log: Arc<Mutex<Vec<String>>>,
    }

    impl Fake {
        fn note(&self, step: &'static str) -> Result<(), UnitError> {
            self.log.lock().unwrap().push(format!("{step} {}", self.id.name));
            if self.fail == Some(step) { Err(UnitError::failed("as told")) } else { Ok(()) }
        }
    }

    impl StateUnit for Fake {
        fn id(&self) -> UnitId {
            self.id.clone()
        }
        fn depends_on(&self) -> &[&str] {
            self.needs
        }
        fn schema(&self) -> u32 {
            self.schema
        }
        fn drain(&self, _: Instant) -> Result<(), UnitError> {
            self.note("drain")
        }
        fn undrain(&self) -> Result<(), UnitError> {
            self.note("undrain")
        }
        fn begin_stop(&self) -> Result<(), UnitError> {
            self.note("begin")
        }
        fn finish_stop(&self, _: Instant) -> Result<(), UnitError> {
            self.note("finish")
        }
        fn save(&self) -> Result<Saved, UnitError> {
            self.note("save")?;
            Ok(if self.schema == 0 { Saved::Nothing } else { Saved::Section(Value { value: 1 }.to_section(&self.id)) })
        }
        fn restore(&self, section: &Section) -> Result<(), UnitError> {
            Value::from_section(section)?;
            self.note("restore")
        }
        fn start(&self) -> Result<(), UnitError> {
            self.note("start")
        }
    }

    type Log = Arc<Mutex<Vec<String>>>;

    fn machine(fail: Option<&'static str>) -> (Units, Log) {
        let log = Log::default();
        let unit = |name: &str, needs, schema, fail| -> Arc<dyn StateUnit> {
            Arc::new(Fake { id: UnitId::new(name, 0), needs, schema, fail, log: log.clone() })
        };
        let units = vec![
            unit("disk", &["bus", "absent"], 1, fail),
            unit("vcpu", &["irqchip"], 1, None),
            unit("irqchip", &[], 1, None),
            unit("bus", &["irqchip"], 0, fail),
        ];
        (Units::new(units).unwrap(), log)
    }

    #[test]
    fn stop_runs_against_the_dependencies_and_start_along_them() {
        let (units, log) = machine(None);
        units.stop(Duration::from_secs(1)).unwrap();
        units.start().unwrap();
        let log = log.lock().unwrap();
        let at = |entry: &str| log.iter().position(|l| l == entry).unwrap();
        assert!(at("begin disk") < at("begin bus") && at("begin bus") < at("begin irqchip"));
        assert!(at("begin irqchip") < at("finish disk"), "all are told before any is waited for");
        assert!(at("start irqchip") < at("start bus") && at("start bus") < at("start disk"));
    }

    #[test]
    fn failures_are_collected_by_unit_name() {
        let (units, _) = machine(Some("finish"));
        let error = units.stop(Duration::from_secs(1)).unwrap_err().to_string();
        assert_eq!(error, "could not stop disk[0]: as told; bus[0]: as told");
    }

    #[test]
    fn state_that_is_left_over_missing_or_twice_refuses_before_any_unit_is_touched() {
        let (units, log) = machine(None);
        let good = units.save().unwrap();
        assert_eq!(good.sections.len(), 3);
        log.lock().unwrap().clear();

        let mut extra = good.clone();
        extra.sections.push(Value { value: 1 }.to_section(&UnitId::new("ghost", 0)));
        assert!(matches!(units.restore(&extra), Err(UnitsError::Unclaimed(id)) if id.name == "ghost"));
        let mut missing = good.clone();
        missing.sections.retain(|s| s.unit != "vcpu");
        assert!(matches!(units.restore(&missing), Err(UnitsError::Missing(id)) if id.name == "vcpu"));
        let mut twice = good.clone();
        twice.sections.push(good.sections[0].clone());
        assert!(matches!(units.restore(&twice), Err(UnitsError::State(StateError::Twice(_)))));
        let mut stateless = good.clone();
        stateless.sections.push(Value { value: 1 }.to_section(&UnitId::new("bus", 0)));
        assert!(matches!(units.restore(&stateless), Err(UnitsError::Unclaimed(id)) if id.name == "bus"));
        assert!(log.lock().unwrap().is_empty());

        units.restore(&good).unwrap();
    }

    #[test]
    fn a_circle_of_dependencies_and_equal_ids_are_refused() {
        let log = Log::default();
        let unit = |name: &str, needs| -> Arc<dyn StateUnit> {
            Arc::new(Fake { id: UnitId::new(name, 0), needs, schema: 1, fail: None, log: log.clone() })
        };
        assert!(matches!(Units::new(vec![unit("a", &["b"]), unit("b", &["a"])]), Err(UnitsError::Circle(_))));
        assert!(matches!(Units::new(vec![unit("a", &[]), unit("a", &[])]), Err(UnitsError::SameId(_))));
    }
}
