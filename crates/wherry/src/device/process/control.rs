//! The control socket of a device's process: one question, one answer, in parcels of [`wherry_handover::Channel`].
//!
//! ```text
//!   wherry update --control          the process
//!     |---- UPDATE: JSON, which program ->|   starts it, hands over
//!     |<--- UPDATED: JSON ----------------|   ends
//!     |<--- REFUSED: why not -------------|   serves on
//! ```

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use prost::Message;
use wherry_handover::{Channel, Registry, Rest};
use wherry_migration::update::UpdateError;
use wherry_migration::{Cause, Journey};
use wherry_vmm::api::types::{UpdateInfo, UpdateMode, UpdateRequest};
use wherry_vmm::update::{ReplaceError, Replaced, start_and_hand_over};

use super::machine::{DeviceMachine, Unit};
use super::{Control, SavedProcess, TAKE_OVER};
use crate::{DID_NOT, HAPPENED};

const UPDATE: u16 = 1;
const UPDATED: u16 = 2;
const REFUSED: u16 = 3;

/// How long a client may take to ask, and to take its answer.
const ASK: Duration = Duration::from_secs(5);

/// Asks the process behind a control socket to be replaced.
pub fn ask(path: &Path, request: &UpdateRequest, limit: Duration) -> Result<UpdateInfo> {
    let stream = UnixStream::connect(path).map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "is the device's process running, and is this its --control?",
            io::ErrorKind::ConnectionRefused => "its process is gone",
            _ => "it cannot be used",
        };
        anyhow::Error::new(error).context(format!("the control socket {}: {hint}", path.display()))
    })?;
    let mut channel = Channel::new(stream)?;
    let deadline = Instant::now() + limit;
    channel.send(UPDATE, &serde_json::to_vec(request)?, &[], deadline)?;
    let answer = channel.receive(deadline, Duration::ZERO).context("waiting for the process's answer")?;
    match answer.tag {
        UPDATED => serde_json::from_slice(&answer.body).context("reading the process's answer"),
        REFUSED => bail!("{}", String::from_utf8_lossy(&answer.body)),
        tag => bail!("the process answered with the unknown tag {tag}"),
    }
}

/// Serves the control socket from a thread of its own.
pub fn start(control: Control, registry: Arc<Registry>, saved: SavedProcess, (unit, rest): (Unit, Rest)) -> Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let machine = DeviceMachine::new(unit, rest, registry)?;
    let serving = Serving { control, saved, program, machine };
    let work = move || {
        loop {
            match serving.control.listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = serving.serve(stream) {
                        tracing::warn!("a client of the control socket: {error:#}");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, "the control socket; it is tried again");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    };
    std::thread::Builder::new().name("control".into()).spawn(work).context("starting the thread `control`")?;
    Ok(())
}

struct Serving {
    control: Control,
    saved: SavedProcess,
    program: PathBuf,
    machine: Arc<DeviceMachine>,
}

impl Serving {
    fn serve(&self, stream: UnixStream) -> Result<()> {
        let mut channel = Channel::new(stream)?;
        let parcel = channel.receive(Instant::now() + ASK, Duration::ZERO)?;
        let answer = |tag, body: &[u8]| channel.send(tag, body, &[], Instant::now() + ASK);
        if parcel.tag != UPDATE {
            return Ok(answer(REFUSED, format!("this process does not know of the tag {}", parcel.tag).as_bytes())?);
        }
        let request: UpdateRequest = match serde_json::from_slice(&parcel.body) {
            Ok(request) => request,
            Err(error) => return Ok(answer(REFUSED, format!("reading what is asked for: {error}").as_bytes())?),
        };
        if request.mode != UpdateMode::Transfer {
            return Ok(answer(REFUSED, b"the process of a device is replaced by another one only (--mode transfer)")?);
        }
        let program = request.binary.map_or_else(|| self.program.clone(), PathBuf::from);
        let (said, status) = match self.replace(&program) {
            Ok(Replaced { pid, job }) => match &job.error {
                None => (answer(UPDATED, &serde_json::to_vec(&UpdateInfo { pid, job })?), Some(HAPPENED)),
                Some(error) => (answer(REFUSED, error.as_bytes()), Some(DID_NOT)),
            },
            Err(error) => {
                let lost = matches!(error, ReplaceError::Update(UpdateError::Stuck { .. } | UpdateError::Lost(_)));
                (answer(REFUSED, why(&error).as_bytes()), lost.then_some(DID_NOT))
            }
        };
        if let Err(error) = &said {
            tracing::warn!(%error, "whoever asked for the update is not told what came of it");
        }
        if let Some(status) = status {
            // What others find here is the new process's.
            wherry_socket::forget_all();
            eprintln!("another process has taken the device over");
            std::process::exit(status.into());
        }
        Ok(())
    }

    fn replace(&self, program: &Path) -> Result<Replaced, ReplaceError> {
        let launcher = self.control.launcher.as_ref().map_err(|why| ReplaceError::NoLauncher(why.clone()))?;
        let (host, journey) = (self.saved.encode_to_vec(), Journey::new());
        // Nobody is started in vain.
        wherry_migration::update::check(&*self.machine)?;
        start_and_hand_over(launcher, (program, TAKE_OVER), self.machine.clone(), host, &journey)
    }
}

/// What is said to an operator: of a device where the journey speaks of a VM.
fn why(error: &ReplaceError) -> String {
    const ON: &str = "the device is served as before";
    let runs = |cause: &Cause| match cause {
        Cause::CannotKeep(reasons) => format!("the device cannot be handed over now: {}", reasons.join("; ")),
        cause => format!("the update failed and {ON}: {cause}"),
    };
    match error {
        ReplaceError::Update(UpdateError::RunsHere(cause)) => runs(cause),
        ReplaceError::Ended { error: UpdateError::RunsHere(cause), ended } => format!("{} ({ended})", runs(cause)),
        ReplaceError::Update(UpdateError::Refused(reasons)) => {
            format!("the new process refused the device, which is served as before: {}", reasons.join("; "))
        }
        ReplaceError::NoLauncher(_) | ReplaceError::Launch(_) | ReplaceError::Channel(_) => format!("{error}; {ON}"),
        error => error.to_string(),
    }
}
