//! The ownership records of this host, where a VM has no process any more: `wherry resolve --id`, and what `run` asks
//! before it boots and forgets at the end.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use wherry_migration::Side;
use wherry_migration::machine::MachineError;
use wherry_migration::ownership::{
    DestinationDriver, DestinationHost, DestinationInput, Message, Notice, SourceDriver, SourceHost, SourceInput,
    StartError, VmId,
};
use wherry_migration::records::Records;

/// How long the record of a VM that has left is kept: as long as somebody may start it here by mistake.
const OLD: Duration = Duration::from_secs(7 * 24 * 3600);

/// Opens the records of this host.
pub fn open() -> Result<Records> {
    let directory = wherry_migration::default_records();
    Records::open(&directory).with_context(|| format!("opening the ownership records in {}", directory.display()))
}

/// Opens them and removes those that nobody will ask for any more.
pub fn open_and_sweep() -> Result<Records> {
    let records = open()?;
    match records.sweep(OLD) {
        Ok(0) => {}
        Ok(removed) => tracing::info!(removed, "removed old ownership records"),
        // Somebody else's record that cannot be read is no reason not to run this VM.
        Err(error) => tracing::warn!(%error, "old ownership records were not removed"),
    }
    Ok(records)
}

/// Removes the records of a VM that its owner has ended here: it is dead, and no other side has it.
pub fn forget(vm: VmId) {
    let Ok(records) = open() else { return };
    for side in [Side::Source, Side::Destination] {
        if matches!(records.read(vm, side), Ok(None)) {
            continue;
        }
        if let Err(error) = records.claim(vm, side).and_then(|mut claim| claim.clear()) {
            tracing::warn!(%error, "the ownership record of a VM that has ended stays");
        }
    }
}

/// Decides a VM whose process died while it changed hands. Answers what was done, in words.
pub fn resolve(vm: VmId, side: Side) -> Result<String> {
    let records = open()?;
    let mut found = false;
    for role in [Side::Source, Side::Destination] {
        let claim = records.claim(vm, role).with_context(|| format!("looking at the record of VM {vm}"))?;
        let mut host = NoVm::default();
        match role {
            Side::Source => {
                let Some(mut driver) = SourceDriver::restarted(claim) else { continue };
                driver.feed(SourceInput::Resolve(side), &mut host);
            }
            Side::Destination => {
                let Some(mut driver) = DestinationDriver::restarted(claim) else { continue };
                driver.feed(DestinationInput::Resolve(side), &mut host);
            }
        }
        if let Some(error) = host.failure {
            bail!("resolving VM {vm}: {error}");
        }
        found = true;
    }
    if !found {
        bail!("resolving VM {vm}: {} has no record of it; it may be started here", records.directory().display());
    }
    Ok(match records.may_boot(vm) {
        Ok(()) => format!("VM {vm} is decided: it may be started here"),
        Err(_) => format!("VM {vm} is decided: it is the other side's and will not be started here"),
    })
}

/// A host process that has no VM: it can only write records.
#[derive(Default)]
struct NoVm {
    failure: Option<String>,
}

impl NoVm {
    fn nothing_here<T>(&mut self) -> Result<T, MachineError> {
        Err("there is no VM in this process".into())
    }

    fn note(&mut self, doing: &'static str, error: &MachineError) {
        self.failure.get_or_insert_with(|| format!("{doing}: {error}"));
    }
}

impl SourceHost for NoVm {
    fn send(&mut self, _: Message) {}
    fn release_locks(&mut self) -> Result<(), MachineError> {
        self.nothing_here()
    }
    fn resume(&mut self, _: bool) -> Result<(), MachineError> {
        self.nothing_here()
    }
    fn discard(&mut self) {}
    fn report(&mut self, notice: Notice) {
        tracing::info!(?notice, "ownership");
    }
    fn failed(&mut self, doing: &'static str, error: MachineError) {
        self.note(doing, &error);
    }
}

impl DestinationHost for NoVm {
    fn send(&mut self, _: Message) {}
    fn load(&mut self) -> Option<Result<(), MachineError>> {
        Some(self.nothing_here())
    }
    fn take_locks(&mut self) -> Result<(), MachineError> {
        self.nothing_here()
    }
    fn release_locks(&mut self) -> Result<(), MachineError> {
        self.nothing_here()
    }
    fn start(&mut self) -> Result<(), StartError> {
        self.nothing_here().map_err(|source| StartError { ran: false, source })
    }
    fn discard(&mut self) {}
    fn report(&mut self, notice: Notice) {
        tracing::info!(?notice, "ownership");
    }
    fn failed(&mut self, doing: &'static str, error: MachineError) {
        self.note(doing, &error);
    }
}
