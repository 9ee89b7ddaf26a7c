//! `wherry accel`: the accelerator from the command line, in this process.
//!
//! - [`job`]: job files (`docs/accel-job.md`).
//! - [`descriptor`]: a step of one as a descriptor.
//! - [`mod@run`]: a device, its clients' memory, and the steps run on it.
//! - [`secret`]: files that hold keys.
//! - this file: the commands, and what they print.

mod descriptor;
pub mod job;
mod run;
pub mod secret;

use anyhow::{Context, Result};
use serde::Serialize;
use wherry_accel::abi::{class, opcode};
use wherry_accel::catalogue::{Catalogue, EngineId, Host};
use wherry_accel::device::{ContextInfo, EngineInfo};

use crate::args::{Accel, AccelCommand, AccelEngines, AccelRun};
use crate::{BAD_ARGUMENTS, DID_NOT, HAPPENED, control, report};

/// `wherry accel`
pub fn accel(options: &Accel) -> Result<u8> {
    match &options.command {
        AccelCommand::Engines(options) => engines(options),
        AccelCommand::Run(options) => run(options),
        AccelCommand::WrapKey(options) => secret::wrap(options),
    }
}

/// As many workers as the machine has processors, unless it is said.
pub fn workers(given: Option<u16>) -> usize {
    let processors = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    given.map_or_else(processors, usize::from)
}

/// An engine as it is printed.
#[derive(Serialize)]
struct Engine {
    engine: String,
    class: u16,
    instance: u16,
    /// Who serves it on this host.
    worker: usize,
    operations: Vec<&'static str>,
}

/// Names of the operations of a class, without those that every class has.
fn operations(class: u16) -> Vec<&'static str> {
    let own = |code: u8| opcode::class(code) == Some(Some(class));
    job::OPERATIONS.iter().filter(|(_, code)| own(*code)).map(|(name, _)| *name).collect()
}

fn engines(options: &AccelEngines) -> Result<u8> {
    let catalogue = match &options.job {
        Some(path) => match job::Job::read(path).and_then(|job| job.catalogue()) {
            Ok(catalogue) => catalogue,
            Err(error) => return Ok(refused(&error)),
        },
        None => Catalogue::with_counts(job::USUAL).context("the usual engines")?,
    };
    let binding = Host::uniform(workers(options.workers)).bind(&catalogue).context("dealing engines out to workers")?;
    let list: Vec<Engine> = catalogue
        .engines()
        .iter()
        .zip(binding)
        .map(|(id, worker)| Engine {
            engine: id.to_string(),
            class: id.class,
            instance: id.instance,
            worker,
            operations: operations(id.class),
        })
        .collect();
    if options.json {
        control::print_json(&list)?;
        return Ok(HAPPENED);
    }
    let mut rows = vec![["engine", "worker"].map(String::from).to_vec()];
    rows.extend(list.iter().map(|engine| vec![engine.engine.clone(), engine.worker.to_string()]));
    let mut text = report::table(&rows);
    text.push('\n');
    for (number, name) in class::NAMES.iter().enumerate() {
        text.push_str(&format!("  {name:<9} {}\n", operations(number as u16).join(" ")));
    }
    text.push_str("  all       nop store add timestamp\n");
    control::print(&text);
    Ok(HAPPENED)
}

/// The file, not the run, is at fault.
fn refused(error: &anyhow::Error) -> u8 {
    eprintln!("error: {error:#}");
    BAD_ARGUMENTS
}

fn run(options: &AccelRun) -> Result<u8> {
    let inside = || format!("in the job file {}", options.job.display());
    let plan = job::Job::read(&options.job);
    let plan = plan.and_then(|job| run::Prepared::new(job, options.workers).with_context(inside));
    let prepared = match plan {
        Ok(prepared) => prepared,
        Err(error) => return Ok(refused(&error)),
    };
    let outcome = prepared.run(options)?;
    match options.json {
        true => control::print_json(&outcome)?,
        false => control::print(&outcome.text()),
    }
    Ok(if outcome.good { HAPPENED } else { DID_NOT })
}

/// How a step has ended.
#[derive(Clone, Debug, Serialize)]
pub struct StepOutcome {
    /// Its name.
    pub name: String,
    /// What it did.
    pub operation: String,
    /// Where: context and slot.
    pub context: String,
    pub slot: u32,
    /// Bytes done; of a program, instructions run.
    pub bytes: u64,
    /// The operation's result.
    pub result: u64,
    /// From submission to completion, waiting included.
    pub took_us: u64,
    /// Why it failed: an error of the ABI.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// It ended as it should: well, or with the error that was expected.
    pub good: bool,
    /// How it differs from what was expected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub differs: Option<String>,
}

/// An engine and how long it was busy.
#[derive(Clone, Debug, Serialize)]
pub struct EngineOutcome {
    pub engine: String,
    pub worker: usize,
    pub busy_us: u64,
    pub resets: u64,
}

/// A slot and what was done in it.
#[derive(Clone, Debug, Serialize)]
pub struct SlotOutcome {
    pub slot: usize,
    pub engines: String,
    pub submitted: u64,
    pub completed: u64,
    pub busy_us: u64,
}

/// A context.
#[derive(Clone, Debug, Serialize)]
pub struct ContextOutcome {
    pub name: String,
    pub priority: i32,
    pub banned: bool,
    pub slots: Vec<SlotOutcome>,
}

/// What came of a job.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Every step ended as it should.
    pub good: bool,
    pub took_us: u64,
    pub workers: usize,
    /// The state that moved to another device half-way, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moved_bytes: Option<usize>,
    pub steps: Vec<StepOutcome>,
    pub contexts: Vec<ContextOutcome>,
    pub engines: Vec<EngineOutcome>,
}

impl EngineOutcome {
    fn of(info: &EngineInfo) -> Self {
        Self {
            engine: EngineId::to_string(&info.id),
            worker: info.worker,
            busy_us: info.busy / 1000,
            resets: info.resets,
        }
    }
}

impl ContextOutcome {
    fn of(info: &ContextInfo, name: String) -> Self {
        let slot = |(number, slot): (usize, &wherry_accel::device::SlotInfo)| SlotOutcome {
            slot: number,
            engines: slot.what.clone(),
            submitted: slot.submitted,
            completed: slot.completed,
            busy_us: slot.runtime / 1000,
        };
        let slots = info.slots.iter().enumerate().map(slot).collect();
        Self { name, priority: info.priority, banned: info.banned, slots }
    }
}

/// Contexts and engines, for a person. Of contexts, slots that were used.
fn figures(contexts: &[ContextOutcome], engines: &[EngineOutcome], took_us: u64) -> String {
    let mut rows = vec![["context", "slot", "engines", "submitted", "completed", "busy"].map(String::from).to_vec()];
    for context in contexts {
        let mut name = match context.priority {
            0 => context.name.clone(),
            priority => format!("{} (priority {priority})", context.name),
        };
        if context.banned {
            name.push_str(" BANNED");
        }
        for slot in context.slots.iter().filter(|slot| slot.submitted > 0) {
            rows.push(vec![
                std::mem::take(&mut name),
                slot.slot.to_string(),
                slot.engines.clone(),
                slot.submitted.to_string(),
                slot.completed.to_string(),
                report::time(slot.busy_us),
            ]);
        }
        if !name.is_empty() {
            rows.push(vec![name, "-".into(), "nothing submitted".into()]);
        }
    }
    let mut text = report::table(&rows);
    text.push('\n');
    let mut rows = vec![["engine", "worker", "busy", "of the time", "resets"].map(String::from).to_vec()];
    for engine in engines {
        rows.push(vec![
            engine.engine.clone(),
            engine.worker.to_string(),
            report::time(engine.busy_us),
            format!("{:.0} %", 100.0 * engine.busy_us as f64 / took_us.max(1) as f64),
            engine.resets.to_string(),
        ]);
    }
    text.push_str(&report::table(&rows));
    text
}

impl Outcome {
    /// For a person.
    fn text(&self) -> String {
        let mut rows =
            vec![["step", "operation", "slot", "bytes", "result", "took", "outcome"].map(String::from).to_vec()];
        for step in &self.steps {
            let errno = step.error.as_deref().map(|error| error.split(':').next().unwrap_or(error));
            let outcome = match (step.good, errno) {
                (true, None) => "done".into(),
                (true, Some(errno)) => format!("{errno}, as expected"),
                (false, Some(errno)) => format!("FAILED: {errno}"),
                (false, None) => "DIFFERS".into(),
            };
            rows.push(vec![
                step.name.clone(),
                step.operation.clone(),
                format!("{} {}", step.context, step.slot),
                // What a program did is counted in instructions.
                if step.operation == "run" { format!("{} run", step.bytes) } else { report::bytes(step.bytes) },
                format!("{} ({:#x})", step.result, step.result),
                report::time(step.took_us),
                outcome,
            ]);
        }
        let mut text = report::table(&rows);
        text.push('\n');
        text.push_str(&figures(&self.contexts, &self.engines, self.took_us));
        if let Some(bytes) = self.moved_bytes {
            let (bytes, workers) = (report::bytes(bytes as u64), self.workers);
            text.push_str(&format!("\nMoved half-way to another device, workers: {workers}, state: {bytes}.\n"));
        }
        let bad: Vec<_> = self.steps.iter().filter(|step| !step.good).collect();
        for step in &bad {
            for why in [&step.error, &step.differs].into_iter().flatten() {
                text.push_str(&format!("\nstep {:?}: {why}", step.name));
            }
        }
        let bad = bad.len();
        text.push_str(&match self.good {
            true => format!("\n{} steps in {}, all as expected.\n", self.steps.len(), report::time(self.took_us)),
            false => format!("\n{bad} of {} steps did not end as expected.\n", self.steps.len()),
        });
        text
    }
}
