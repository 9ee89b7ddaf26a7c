//! `wherry demo`: starts the probe guest in a process of its own, moves it live from process to process over loopback
//! TCP, measures from outside what the guest felt, has a new process take it over where it is, and has the guest prove that nothing was
//! lost.

mod accelerator;
pub mod outcome;
pub mod process;
mod relay;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::time::Instant;
use wherry_guest::report::Phase as GuestPhase;
use wherry_guest::snapshot::Snapshot;
use wherry_migration::progress::{Job, Phase};
use wherry_vmm::api::server::is_over;
use wherry_vmm::api::types::{MigrationRequest, Mode, UpdateInfo, UpdateRequest, VmInfo, VmState};

use crate::args::{self, Demo};
use crate::migrate::{End, Show, carry};
use crate::probe::{ProbeRam, WHERRY_RAM, Watcher};
use crate::{DID_NOT, HAPPENED, control, report, runtime};
use accelerator::{Accelerator, Jobs};
use outcome::{Kind, Leg, Outcome, Touched, Update};
use process::Process;
use relay::Relay;

/// How long a process may take to be there.
const START: Duration = Duration::from_secs(20);
/// How long the guest may take to fill its data, or to check all of it.
const WORK: Duration = Duration::from_secs(120);
/// How long the guest works undisturbed between two moves.
const REST: Duration = Duration::from_millis(500);

/// `wherry demo`
pub fn demo(options: &Demo) -> Result<u8> {
    check_kvm()?;
    if options.data >= options.memory {
        bail!("{} of data do not fit into {} of RAM: choose a smaller --data", options.data, options.memory);
    }
    let directory = process::directory("demo")?;
    let outcome = runtime()?.block_on(async {
        tokio::select! {
            // It listens for signals before there is a process to be left behind.
            biased;
            // Leaving ends all processes and removes the directory.
            _ = interrupted() => Ok(None),
            outcome = play(options, directory.path()) => outcome.map(Some),
        }
    })?;
    let Some(outcome) = outcome else {
        eprintln!("interrupted; all processes of the demo have ended");
        return Ok(DID_NOT);
    };
    if options.json {
        control::print_json(&outcome)?;
    } else {
        control::print(&outcome.text());
    }
    Ok(if outcome.ok { HAPPENED } else { DID_NOT })
}

async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// Says what to do when there is no usable KVM.
pub fn check_kvm() -> Result<()> {
    let advice = "Wherry needs KVM: load the module (modprobe kvm_intel or kvm_amd), in a VM switch on nested \
                  virtualisation, in a container pass --device /dev/kvm, and be root or in the group kvm";
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    kvm.map(|_| ()).with_context(|| format!("opening /dev/kvm. {advice}"))
}

async fn play(options: &Demo, directory: &Path) -> Result<Outcome> {
    let competition = outcome::competition();
    let say = |text: &str| {
        if !options.json {
            eprintln!("{text}");
        }
    };
    say(&format!(
        "starting the probe guest: {} RAM, {} of data, {}/s of it rewritten",
        report::bytes(options.memory),
        report::bytes(options.data),
        report::bytes(options.rate)
    ));
    let (memory, cpus) = (options.memory.to_string(), options.cpus.to_string());
    let mut cmdline = format!("data={} rate={}", options.data, options.rate);
    let mut accelerator = beside(options, directory, 0).await?;
    if accelerator.is_some() {
        cmdline = format!("{cmdline} {}", accelerator::LOAD);
    }
    let mut workers: Vec<u16> = accelerator.iter().map(|it| it.workers).collect();
    let arguments = ["run", "--name", "demo", "--memory", &memory, "--cpus", &cpus, "--cmdline", &cmdline];
    let mut here = Process::start(directory, "0", &with_device(&arguments, &device_of(accelerator.as_ref())))?;
    let mut ram = ram_of(&here.wait_for(&[VmState::Running], START).await?)?;
    let begun = Instant::now();
    wait_for(&ram, "fill its data", |s| s.phase() >= GuestPhase::Running).await?;
    say(&format!("the guest has filled its data in {:.1} s and works", begun.elapsed().as_secs_f32()));

    let can_follow = wherry_fault::Userfault::open().map(drop);
    if let Err(error) = &can_follow {
        say(&format!("no move has memory follow the guest: {error}"));
    }
    let mut legs = Vec::new();
    for number in 1..=options.legs {
        tokio::time::sleep(REST).await;
        let kind = kind_of(options, number, can_follow.is_ok());
        let mode = match (options.mode, kind) {
            (Some(mode), _) => mode.into(),
            (None, Kind::Postcopy | Kind::Cut) => Mode::Postcopy,
            (None, Kind::Plain | Kind::Hashed) => Mode::default(),
        };
        let next = beside(options, directory, number).await?;
        let device = device_of(next.as_ref());
        let arguments = with_device(&["receive", "--once", "--listen", "tcp:127.0.0.1:0"], &device);
        let mut there = Process::start(directory, &number.to_string(), &arguments)?;
        let moving = Move { number, mode, kind, downtime_limit_ms: None, quiet: options.json };
        let leg = travel(&moving, &mut here, &mut there, &ram).await?;
        ram = ram_of(&there.wait_for(&[VmState::Running], START).await?)?;
        check(&ram, number)?;
        let left = here.wait_for_end(START).await?;
        if !left.success() {
            bail!("the process the VM left ended with {left}: {}", here.log_text());
        }
        say(&format!(
            "move {number} of {}{}: {} in {}, blackout {}",
            options.legs,
            kind.remark(),
            report::bytes(leg.job.data_processed),
            report::time(leg.whole_us),
            report::time(leg.blackout_us)
        ));
        legs.push(leg);
        here = there;
        // The one that the VM has left ends.
        accelerator = next;
        workers.extend(accelerator.iter().map(|it| it.workers));
    }

    let update = match &accelerator {
        None => {
            tokio::time::sleep(REST).await;
            let (update, _) = renew(&mut here, &ram).await?;
            say(&format!("a new process has taken the VM over: blackout {}", report::time(update.blackout_us)));
            Some(update)
        }
        // The connection to its process cannot be kept yet.
        Some(_) => None,
    };
    let on_the_way = ram.snapshot()?.context("the guest's report has vanished")?.pages_verified();
    say("the guest checks all of its data once more");
    ram.ask_to_finish().context("asking the guest to finish")?;
    let end = wait_for(&ram, "check its data", |s| s.phase() >= GuestPhase::Finished).await?;
    let complaint = complaint(&end);
    let mut outcome = Outcome {
        memory: options.memory,
        data: options.data,
        rate: options.rate,
        cpus: options.cpus,
        legs,
        blackout_median_us: 0,
        blackout_max_us: 0,
        total_median_us: 0,
        pages_dirtied: end.pages_dirtied(),
        pages_verified: on_the_way,
        data_pages: end.data_pages,
        errors: end.verify_errors(),
        clock_backwards: end.cpus.iter().map(|c| c.tsc_backwards).sum(),
        update,
        accelerator: Jobs::of(&end, workers),
        competition,
        ok: complaint.is_none(),
        complaint,
    };
    outcome.sum_up();
    Ok(outcome)
}

/// The accelerator for the VM at a place, if there is to be one.
async fn beside(options: &Demo, directory: &Path, place: u32) -> Result<Option<Accelerator>> {
    match options.accel {
        true => Accelerator::start(directory, place, START).await.map(Some),
        false => Ok(None),
    }
}

fn device_of(accelerator: Option<&Accelerator>) -> Vec<String> {
    accelerator.map(|it| it.arguments().to_vec()).unwrap_or_default()
}

fn with_device<'a>(arguments: &[&'a str], device: &'a [String]) -> Vec<&'a str> {
    arguments.iter().copied().chain(device.iter().map(String::as_str)).collect()
}

/// What one move is to be.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    /// From 1.
    pub number: u32,
    /// How memory is carried.
    pub mode: Mode,
    /// What is special about it.
    pub kind: Kind,
    /// Blackout to stay below; `None`: the default.
    pub downtime_limit_ms: Option<u64>,
    /// Show no progress.
    pub quiet: bool,
}

/// One move, watched from outside.
pub async fn travel(moving: &Move, here: &mut Process, there: &mut Process, ram: &ProbeRam) -> Result<Leg> {
    let Move { number, mode, kind, downtime_limit_ms, quiet } = *moving;
    let (from_pid, to_pid) = (here.pid(), there.pid());
    let doing = || format!("move {number}, from process {from_pid} to process {to_pid}");
    let listen = there
        .wait_for(&[VmState::Listening], START)
        .await?
        .listen
        .context("the receiver does not say where it listens")?;
    measure_anew(ram).await?;
    let size = ram.size();
    let watcher = Watcher::start(ram.again()?, move || ProbeRam::find(to_pid, WHERRY_RAM, |r| r.size() == size))
        .context("starting the watcher")?;
    let relay = match kind {
        Kind::Cut => Some(Relay::before(&listen).await?),
        _ => None,
    };
    let request = MigrationRequest {
        to: relay.as_ref().map_or(listen, |relay| relay.address().to_owned()),
        mode,
        channels: None,
        downtime_limit_ms,
        bandwidth: None,
        timeout_s: None,
        verify: kind == Kind::Hashed,
        release: false,
    };
    let begun = Instant::now();
    let carried = carry(&here.client, &request, Show::bar_only(quiet));
    let end = match &relay {
        None => carried.await.with_context(doing)?,
        Some(relay) => {
            let (end, cut) = tokio::join!(carried, cut_and_mend(relay, here, there));
            cut.with_context(doing)?;
            end.with_context(doing)?
        }
    };
    let whole = begun.elapsed();
    let job = match end {
        End::Over(job) if job.phase == Phase::Done => job,
        End::Over(job) => {
            bail!("{}: {}: {}", doing(), report::phase(job.phase), job.error.unwrap_or_else(|| here.log_text()))
        }
        End::Vanished(_, error) => bail!("{}: {error}: {}", doing(), here.log_text()),
    };
    let gap = watcher.finish(START).with_context(doing)?;
    let total = gap.at.saturating_duration_since(begun.into_std());
    let info = there.wait_for(&[VmState::Running], START).await?;
    // The largest gap may be the blackout itself, which the guest only knows once it works again.
    let arrived = ram_of(&info)?;
    let beat = arrived.heartbeat(0)?;
    wait_for(&arrived, "go on", |s| s.cpus.first().is_some_and(|c| c.heartbeat > beat + 1)).await?;
    let snapshot = arrived.snapshot()?.context("the guest's report has vanished on the way")?;
    let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    let waited = job.postcopy.as_ref().map_or(0, |p| p.faults.saturating_sub(p.local));
    Ok(Leg {
        number,
        from_pid,
        to_pid,
        kind,
        total_us: us(total),
        whole_us: us(whole),
        blackout_us: us(gap.blackout),
        blackout_uncertain_us: us(gap.uncertain),
        guest_gap_us: snapshot.largest_gap_ns() / 1000,
        touches: Touched::of(&snapshot, waited),
        job,
    })
}

/// Has a new process of this very program take the VM over from the one that holds it. What it reports is given beside.
pub async fn renew(holder: &mut Process, ram: &ProbeRam) -> Result<(Update, Job)> {
    let from_pid = holder.pid();
    let doing = || format!("updating process {from_pid}");
    measure_anew(ram).await?;
    let begun = Instant::now();
    let done: UpdateInfo =
        holder.client.put_json("/vm/update", &UpdateRequest::default(), WORK).await.with_context(doing)?;
    let whole = begun.elapsed();
    holder.was_replaced(done.pid, START).await.with_context(doing)?;
    let info = holder.wait_for(&[VmState::Running], START).await?;
    if info.pid != done.pid {
        bail!("{}: process {} was to have the VM, and process {} answers", doing(), done.pid, info.pid);
    }
    let beat = ram.heartbeat(0)?;
    wait_for(ram, "go on", |s| s.cpus.first().is_some_and(|c| c.heartbeat > beat + 1)).await?;
    let snapshot = ram.snapshot()?.context("the guest's report has vanished in the update")?;
    let update = Update {
        from_pid,
        to_pid: done.pid,
        whole_us: u64::try_from(whole.as_micros()).unwrap_or(u64::MAX),
        blackout_us: done.job.downtime_us,
        guest_gap_us: snapshot.largest_gap_ns() / 1000,
    };
    Ok((update, done.job))
}

/// Cuts the link while memory follows the guest, and mends it when both ends have felt that.
async fn cut_and_mend(relay: &Relay, here: &Process, there: &Process) -> Result<()> {
    let until = async |process: &Process, phase: Phase| {
        let deadline = Instant::now() + START;
        loop {
            let job: Job = process.client.get("/migration", args::ANSWER).await?;
            if job.phase == phase {
                return Ok(());
            }
            if Instant::now() >= deadline || is_over(job.phase) {
                bail!("process {} did not come to phase {}", process.pid(), report::phase(phase));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    until(there, Phase::Postcopy).await?;
    until(here, Phase::Postcopy).await?;
    relay.cut();
    until(there, Phase::Paused).await?;
    until(here, Phase::Paused).await?;
    relay.mend();
    Ok(())
}

/// What is shown in which move: at the end one in which memory follows, one in which the link is lost meanwhile, and one
/// that is hashed; unless the user chose.
fn kind_of(options: &Demo, number: u32, can_follow: bool) -> Kind {
    let left = options.legs - number;
    match (options.mode, left) {
        (Some(_), _) => Kind::Plain,
        _ if options.verify => Kind::Hashed,
        (None, 0) if number > 1 => Kind::Hashed,
        (None, 1) if number > 2 && can_follow => Kind::Cut,
        (None, 2) if number > 1 && can_follow => Kind::Postcopy,
        _ => Kind::Plain,
    }
}

/// Has the guest forget the gaps and touches that it has measured.
pub async fn measure_anew(ram: &ProbeRam) -> Result<()> {
    let reset = ram.reset_gaps().context("asking the guest to measure its gaps anew")?;
    wait_for(ram, "measure its gaps anew", |s| s.cpus.iter().all(|c| c.reset_seen == reset)).await.map(|_| ())
}

/// Opens the guest's lowest RAM block from outside.
pub fn ram_of(info: &VmInfo) -> Result<ProbeRam> {
    let vm = info.vm.as_ref().context("the process does not say which VM it has")?;
    let block = vm.blocks.iter().find(|b| b.guest_base == 0).context("the VM has no RAM at address 0")?;
    ProbeRam::open(info.pid, block.fd)
        .with_context(|| format!("opening the guest's RAM, descriptor {} of process {}", block.fd, info.pid))
}

/// Waits until the guest reports something; ends at once when it reports a failure.
pub async fn wait_for(ram: &ProbeRam, what: &str, done: impl Fn(&Snapshot) -> bool) -> Result<Snapshot> {
    let deadline = Instant::now() + WORK;
    loop {
        if let Some(snapshot) = ram.snapshot()?
            && (done(&snapshot) || snapshot.failure.is_some())
        {
            return match &snapshot.failure {
                Some(_) if snapshot.verify_errors() == 0 => {
                    bail!("the guest was to {what} and failed: {}", complaint(&snapshot).unwrap_or_default())
                }
                _ => Ok(snapshot),
            };
        }
        if Instant::now() >= deadline {
            bail!("the guest was to {what} and has not done so within {} s", WORK.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// What is wrong with the guest, if anything.
fn complaint(snapshot: &Snapshot) -> Option<String> {
    let mut text = Vec::new();
    if let Some(failure) = &snapshot.failure {
        text.push(format!("vCPU {}: {}", failure.cpu, failure.message));
    }
    if snapshot.verify_errors() > 0 {
        text.push(format!("the guest has found {} wrong pages", snapshot.verify_errors()));
    }
    let backwards: u64 = snapshot.cpus.iter().map(|c| c.tsc_backwards).sum();
    if backwards > 0 {
        text.push(format!("the guest's clock went backwards {backwards} times"));
    }
    (!text.is_empty()).then(|| text.join("; "))
}

fn check(ram: &ProbeRam, number: u32) -> Result<()> {
    let snapshot = ram.snapshot()?.with_context(|| format!("the guest's report has vanished in move {number}"))?;
    match complaint(&snapshot) {
        Some(complaint) => bail!("after move {number}: {complaint}"),
        None => Ok(()),
    }
}
