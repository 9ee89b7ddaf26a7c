//! Commands that one request does: pause, resume, balloon, device-add, device-remove, cancel, switch, recover, resolve, update, status, stop.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use wherry_migration::Side;
use wherry_migration::ownership::VmId;
use wherry_migration::progress::{Job, Phase};
use wherry_vmm::api::types::{
    BalloonInfo, BalloonRequest, DeviceAddRequest, DeviceInfo, DeviceRemoveRequest, ErrorCode, RecoverRequest,
    ResolveRequest, StopRequest, UpdateInfo, UpdateMode, UpdateRequest, VmInfo, VmState,
};

use crate::args::{ANSWER, Balloon, Control, DeviceAdd, DeviceRemove, Recover, Resolve, Stop, Update};
use crate::client::{Client, ClientError};
use crate::device::process;
use crate::migrate::{End, intervene};
use crate::{DID_NOT, HAPPENED, IN_DOUBT, records, report, runtime};

/// How long a stop may take: the server gives a journey 15 s to give the VM back.
const STOP: Duration = Duration::from_secs(20);
/// How long plugging a device may take: its process has 5 s for each of some dozen answers, and is asked no more after the first
/// that does not come.
const PLUG: Duration = Duration::from_secs(60);
/// How much longer than the guest may take, unplugging may: the process of the device is let go then.
const LET_GO: Duration = Duration::from_secs(70);

/// What `status --json` prints.
#[derive(Serialize)]
struct Status<'a> {
    #[serde(flatten)]
    info: &'a VmInfo,
    /// The last journey; absent if there was none.
    job: Option<&'a Job>,
    /// The devices on the PCI bus of the VM.
    devices: &'a [DeviceInfo],
}

/// Prints a value as JSON on stdout.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    use std::io::Write;
    let text = serde_json::to_string_pretty(value).context("writing JSON")?;
    // Whoever reads may have gone; that is no error of ours.
    let _ = writeln!(std::io::stdout(), "{text}");
    Ok(())
}

/// Prints text on stdout.
pub fn print(text: &str) {
    use std::io::Write;
    let _ = write!(std::io::stdout(), "{text}");
}

/// `wherry pause`
pub fn pause(options: &Control) -> Result<u8> {
    change(options, "/vm/pause", "pausing the VM")
}

/// `wherry resume`
pub fn resume(options: &Control) -> Result<u8> {
    change(options, "/vm/resume", "resuming the VM")
}

/// `wherry balloon`
pub fn balloon(options: &Balloon) -> Result<u8> {
    let api = &options.control.api;
    let client = Client::new(api);
    let info: BalloonInfo = runtime()?
        .block_on(async {
            match options.size {
                Some(size) => client.put_json("/balloon", &BalloonRequest { size }, ANSWER).await,
                None => client.get("/balloon", ANSWER).await,
            }
        })
        .with_context(|| at("asking for the balloon of the VM", api))?;
    if options.control.json {
        print_json(&info)?;
    } else {
        print(&report::balloon(&info));
    }
    Ok(HAPPENED)
}

/// `wherry device-add`
pub fn device_add(options: &DeviceAdd) -> Result<u8> {
    let api = &options.control.api;
    let request = DeviceAddRequest { device: options.device.clone() };
    let device: DeviceInfo = runtime()?
        .block_on(Client::new(api).put_json("/devices/add", &request, PLUG))
        .with_context(|| at("plugging a device into the VM", api))?;
    if options.control.json {
        print_json(&device)?;
    } else {
        print(&format!("{} is at {}\n", device.name, device.address));
    }
    Ok(HAPPENED)
}

/// `wherry device-remove`
pub fn device_remove(options: &DeviceRemove) -> Result<u8> {
    let api = &options.control.api;
    let request = DeviceRemoveRequest { name: options.name.clone(), timeout_s: Some(options.timeout) };
    let limit = Duration::from_secs(options.timeout) + LET_GO;
    let device: DeviceInfo = runtime()?
        .block_on(Client::new(api).put_json("/devices/remove", &request, limit))
        .with_context(|| at("unplugging a device of the VM", api))?;
    if options.control.json {
        print_json(&device)?;
    } else {
        print(&format!("{} is gone\n", device.name));
    }
    Ok(HAPPENED)
}

/// How long an update may take: building the machine, 60 s, and the switchover.
const UPDATE: Duration = Duration::from_secs(100);

fn change(options: &Control, path: &str, doing: &'static str) -> Result<u8> {
    let info: VmInfo =
        runtime()?.block_on(Client::new(&options.api).put(path, ANSWER)).with_context(|| at(doing, &options.api))?;
    if options.json {
        print_json(&info)?;
    } else {
        print(&format!("the VM is {}\n", info.state));
    }
    Ok(HAPPENED)
}

fn at(doing: &str, api: &Path) -> String {
    format!("{doing} behind {}", api.display())
}

/// `wherry update`
pub fn update(options: &Update) -> Result<u8> {
    let binary = options.binary.as_ref().map(std::path::absolute).transpose().context("finding the program")?;
    let binary = binary.map(|path| path.into_os_string().into_string());
    let Ok(binary) = binary.transpose() else { anyhow::bail!("the path of the program is no text") };
    let request = UpdateRequest { binary, mode: options.mode };
    let (updated, what) = match (&options.api, &options.control) {
        (_, Some(control)) => {
            let updated = process::ask(control, &request, UPDATE);
            (updated.with_context(|| at("updating the process of the device", control))?, "device")
        }
        (Some(api), None) => {
            let client = Client::new(api);
            let updated: Result<UpdateInfo> = runtime()?.block_on(async {
                match client.put_json("/vm/update", &request, UPDATE).await {
                    // Whoever was asked cannot answer any more.
                    Err(ClientError::Broken { .. }) if options.mode == UpdateMode::Exec => executed(&client).await,
                    answer => Ok(answer?),
                }
            });
            (updated.with_context(|| at("updating the VMM", api))?, "VM")
        }
        // Provably impossible: the command line needs one of them.
        (None, None) => anyhow::bail!("whose process is to be replaced?"),
    };
    if options.json {
        print_json(&updated)?;
    } else {
        print(&report::updated(&updated, what));
    }
    Ok(HAPPENED)
}

/// Waits for the program that was executed in the process behind an API socket to have the VM.
async fn executed(client: &Client) -> Result<UpdateInfo> {
    let lost = "the process has ended while it executed the new program, and the VM with it";
    let deadline = tokio::time::Instant::now() + ANSWER;
    loop {
        // Clients that come early wait, or are answered before the VM is there.
        let job: Job = client.get("/migration", ANSWER).await.context(lost)?;
        if (job.mode.as_str(), job.role.as_str(), job.phase) == ("update", "destination", Phase::Done) {
            let info: VmInfo = client.get("/vm", ANSWER).await.context(lost)?;
            return Ok(UpdateInfo { pid: info.pid, job });
        }
        if tokio::time::Instant::now() >= deadline {
            anyhow::bail!(
                "the connection broke before the answer, and what came of it is unknown: see `wherry status`"
            );
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// `wherry status`
pub fn status(options: &Control) -> Result<u8> {
    let client = Client::new(&options.api);
    let (info, job, devices): (VmInfo, Job, Vec<DeviceInfo>) = runtime()?
        .block_on(async {
            let devices = match client.get("/devices", ANSWER).await {
                // A process of an older version.
                Err(ClientError::Refused { code: ErrorCode::NotFound, .. }) => Vec::new(),
                devices => devices?,
            };
            Ok::<_, ClientError>((client.get("/vm", ANSWER).await?, client.get("/migration", ANSWER).await?, devices))
        })
        .with_context(|| at("asking for the status of the VM", &options.api))?;
    if options.json {
        print_json(&Status { info: &info, job: (job.phase != Phase::None).then_some(&job), devices: &devices })?;
    } else {
        print(&report::status(&info, &devices, &job));
    }
    Ok(if info.state == VmState::InDoubt || job.phase == Phase::Paused { IN_DOUBT } else { HAPPENED })
}

/// `wherry cancel`: asks, and waits until it is known what came of it.
pub fn cancel(options: &Control) -> Result<u8> {
    let client = Client::new(&options.api);
    let end = runtime()?.block_on(intervene(&client, "/migration/cancel", &serde_json::json!({})));
    let job = last_word(end.with_context(|| at("cancelling the migration", &options.api))?)?;
    finish(options.json, &job, job.phase == Phase::Cancelled)
}

/// `wherry switch`: asks, and waits until the migration is over.
pub fn switch(options: &Control) -> Result<u8> {
    let client = Client::new(&options.api);
    let end = runtime()?.block_on(intervene(&client, "/migration/switch", &serde_json::json!({})));
    let job = last_word(end.with_context(|| at("switching to postcopy", &options.api))?)?;
    finish(options.json, &job, job.phase == Phase::Done)
}

/// `wherry recover`: takes up the link, and waits until the migration is over. At the destination it only says where to
/// wait.
pub fn recover(options: &Recover) -> Result<u8> {
    let api = &options.control.api;
    let client = Client::new(api);
    let request = RecoverRequest { to: options.to.clone(), listen: options.listen.clone() };
    if options.listen.is_some() {
        let job: Job = runtime()?
            .block_on(client.put_json("/migration/recover", &request, ANSWER))
            .with_context(|| at("recovering the migration", api))?;
        if options.control.json {
            print_json(&job)?;
        } else {
            print("the source is waited for there; have it come with `wherry recover --to`\n");
        }
        return Ok(HAPPENED);
    }
    let end = runtime()?.block_on(intervene(&client, "/migration/recover", &request));
    let job = last_word(end.with_context(|| at("recovering the migration", api))?)?;
    finish(options.control.json, &job, job.phase == Phase::Done)
}

/// `wherry resolve`: decides, and waits until it is known what came of it.
pub fn resolve(options: &Resolve) -> Result<u8> {
    let Some(api) = &options.api else { return resolve_record(options) };
    let client = Client::new(api);
    let request = ResolveRequest { side: options.side };
    let end = runtime()?.block_on(intervene(&client, "/migration/resolve", &request));
    let job = last_word(end.with_context(|| at("resolving the migration", api))?)?;
    // As source: the migration ends without a move. As destination: it ends with one.
    let wanted = match options.side {
        Side::Source => matches!(job.phase, Phase::Failed | Phase::Cancelled),
        Side::Destination => job.phase == Phase::Done,
    };
    finish(options.json, &job, wanted)
}

fn resolve_record(options: &Resolve) -> Result<u8> {
    let id = options.id.context("give --api or --id")?;
    let done = records::resolve(VmId(id), options.side)?;
    if options.json {
        print_json(&serde_json::json!({ "resolved": done }))?;
    } else {
        print(&format!("{done}\n"));
    }
    Ok(HAPPENED)
}

fn last_word(end: End) -> Result<Job> {
    match end {
        End::Over(job) => Ok(job),
        End::Vanished(_, error) => Err(error).context("waiting for what comes of it"),
    }
}

fn finish(json: bool, job: &Job, wanted: bool) -> Result<u8> {
    if json {
        print_json(job)?;
    } else {
        print(&report::journey(job));
    }
    Ok(match job.phase {
        _ if wanted => HAPPENED,
        Phase::InDoubt | Phase::Paused => IN_DOUBT,
        _ => DID_NOT,
    })
}

/// `wherry stop`: answers when the process is gone, so that its name can be used again.
pub fn stop(options: &Stop) -> Result<u8> {
    let Stop { control: options, force } = options;
    let client = Client::new(&options.api);
    let stopped: Result<VmInfo, String> = runtime()?.block_on(async {
        let info = match client.put_json::<VmInfo>("/vm/stop", &StopRequest { force: *force }, STOP).await {
            // The only state in which a stop is refused.
            Err(ClientError::Refused { code: ErrorCode::WrongState, message }) => return Ok(Err(message)),
            info => info.with_context(|| at("stopping the VM", &options.api))?,
        };
        let deadline = tokio::time::Instant::now() + ANSWER;
        while !matches!(client.get::<VmInfo>("/vm", ANSWER).await, Err(e) if e.is_gone()) {
            if tokio::time::Instant::now() >= deadline {
                anyhow::bail!(
                    "the VM has ended, but its process {} is still there after {} s",
                    info.pid,
                    ANSWER.as_secs()
                );
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        anyhow::Ok(Ok(info))
    })?;
    let info = match stopped {
        Ok(info) => info,
        Err(message) => {
            eprintln!("error: {message}");
            return Ok(IN_DOUBT);
        }
    };
    if options.json {
        print_json(&info)?;
    } else {
        print(&format!("the VM is {}\n", info.state));
    }
    Ok(HAPPENED)
}
