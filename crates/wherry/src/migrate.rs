//! `wherry migrate`: starts an outgoing migration, shows it and waits for its end.
//!
//! The events are opened before the request, so that nothing is missed however short the journey is. If they break
//! off, the job is asked for instead. Ctrl-C cancels the migration and waits for what comes of that.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;
use wherry_migration::progress::{Job, Phase, Round};
use wherry_vmm::api::server::is_over;
use wherry_vmm::api::types::{MigrationRequest, PhaseEvent};

use crate::args::{ANSWER, Migrate};
use crate::client::{Client, ClientError, Events};
use crate::{DID_NOT, HAPPENED, IN_DOUBT, control, report, runtime};

/// How long a journey may be in doubt or paused before this command leaves it so. The source goes on trying.
const DOUBT: Duration = Duration::from_secs(10);

/// `wherry migrate`
pub fn migrate(options: &Migrate) -> Result<u8> {
    let client = Client::new(&options.control.api);
    let request = MigrationRequest {
        to: options.to.clone(),
        mode: options.mode.into(),
        channels: options.channels,
        downtime_limit_ms: options.downtime_limit,
        bandwidth: options.bandwidth,
        timeout_s: options.timeout,
        verify: options.verify,
        release: options.release,
    };
    let show = Show::new(options.control.json);
    let end = runtime()?
        .block_on(carry(&client, &request, show))
        .with_context(|| format!("migrating the VM behind {} to {}", options.control.api.display(), options.to))?;
    let job = match end {
        End::Over(job) => job,
        End::Vanished(job, error) => {
            let what = match job.phase {
                Phase::Postcopy | Phase::Paused => {
                    "The VM runs there, and lacks what had not followed yet: it is lost unless that was nothing"
                }
                _ => "Its VM is gone with it unless the other end has taken it over",
            };
            eprintln!(
                "error: the process that was migrating the VM to {} has gone in phase {}: {error}. {what}: ask there with \
                 `wherry status`",
                options.to,
                report::phase(job.phase)
            );
            return Ok(IN_DOUBT);
        }
    };
    if options.control.json {
        control::print_json(&job)?;
    } else {
        control::print(&report::journey(&job));
    }
    Ok(match job.phase {
        Phase::Done => HAPPENED,
        Phase::Cancelled | Phase::Failed => {
            eprintln!(
                "error: migrating to {}: {}",
                options.to,
                job.error.as_deref().unwrap_or("it was cancelled; the VM runs on where it was")
            );
            DID_NOT
        }
        Phase::Paused => {
            eprintln!(
                "error: the VM runs at {}, and the link was lost before all of its memory was there ({}). Both ends keep \
                 what they have and go on trying; `wherry recover` tries at once, over another address if need be",
                job.peer,
                job.error.as_deref().unwrap_or("the reason is not known")
            );
            IN_DOUBT
        }
        _ => {
            eprintln!(
                "error: the VM is in doubt: {}. `wherry status` at both ends tells more; decide with `wherry resolve` \
                 only when the other end is known to be dead",
                job.error.as_deref().unwrap_or("the other end has not answered")
            );
            IN_DOUBT
        }
    })
}

/// How a watched journey ended.
pub enum End {
    /// As the job says; or in doubt for too long.
    Over(Job),
    /// The process has gone, with the job as last seen.
    Vanished(Job, ClientError),
}

/// Mode of the job of a live update.
const UPDATE: &str = "update";

/// Starts a journey and follows it to its end.
pub async fn carry(client: &Client, request: &MigrationRequest, show: Show) -> Result<End, ClientError> {
    let events = client.events(ANSWER).await?;
    // The events tell how an earlier journey ended, too.
    let earlier = client.get::<Job>("/migration", ANSWER).await?.attempt;
    let started = client.put_json("/migration", request, ANSWER).await?;
    let interrupts = signal(SignalKind::interrupt()).ok();
    // Updates are jobs, too, and have no number.
    let is_ours = |job: &Job| (earlier.is_empty() || job.attempt != earlier) && job.mode != UPDATE;
    follow(client, events, started, is_ours, show, interrupts).await
}

/// Has something done to the journey under way, and follows it to its end.
pub async fn intervene(client: &Client, path: &str, body: &impl serde::Serialize) -> Result<End, ClientError> {
    let events = client.events(ANSWER).await?;
    let job: Job = client.put_json(path, body, ANSWER).await?;
    let attempt = job.attempt.clone();
    follow(client, events, job, |job| job.attempt == attempt, Show::bar_only(true), None).await
}

/// Follows a journey by events that were opened before it was asked for, so that nothing is missed: not even the end
/// of a process that goes with its VM. The first of `interrupts` cancels it.
async fn follow(
    client: &Client,
    mut events: Events,
    mut last: Job,
    is_ours: impl Fn(&Job) -> bool,
    mut show: Show,
    mut interrupts: Option<Signal>,
) -> Result<End, ClientError> {
    let mut doubt: Option<Instant> = None;
    loop {
        tokio::select! {
            job = next_job(&mut events, &mut show) => match job {
                Some(job) if is_ours(&job) => last = job,
                Some(_) => continue,
                None => match client.get::<Job>("/migration", ANSWER).await {
                    Ok(job) => {
                        last = job;
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    Err(error) if is_over(last.phase) => {
                        tracing::debug!(%error, "the process ended after its last word");
                    }
                    Err(error) => return Ok(End::Vanished(last, error)),
                },
            },
            Some(()) = interrupt(&mut interrupts) => {
                interrupts = None;
                show.line("cancelling the migration");
                if let Err(error) = client.put::<Job>("/migration/cancel", ANSWER).await {
                    show.line(&format!("it can no longer be cancelled: {error}"));
                }
            }
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
        }
        if is_over(last.phase) {
            show.end();
            return Ok(End::Over(last));
        }
        match (last.phase, doubt) {
            (Phase::InDoubt | Phase::Paused, None) => doubt = Some(Instant::now() + DOUBT),
            (Phase::InDoubt | Phase::Paused, Some(limit)) if Instant::now() >= limit => {
                show.end();
                return Ok(End::Over(last));
            }
            (Phase::InDoubt | Phase::Paused, Some(_)) => {}
            _ => doubt = None,
        }
    }
}

/// The next Ctrl-C; never, if nobody listens for it.
async fn interrupt(signals: &mut Option<Signal>) -> Option<()> {
    match signals {
        Some(signals) => signals.recv().await,
        None => std::future::pending().await,
    }
}

/// The next job that the events tell, and all that they tell before it shown.
async fn next_job(events: &mut Events, show: &mut Show) -> Option<Job> {
    loop {
        let event = events.next().await?;
        match event.name.as_str() {
            "phase" => {
                if let Ok(phase) = serde_json::from_str::<PhaseEvent>(&event.data) {
                    show.phase(&phase);
                }
            }
            "round" => {
                if let Ok(round) = serde_json::from_str::<Round>(&event.data) {
                    show.round(&round);
                }
            }
            "job" => {
                if let Ok(job) = serde_json::from_str::<Job>(&event.data) {
                    show.job(&job);
                    return Some(job);
                }
            }
            _ => {}
        }
    }
}

/// What the user sees meanwhile, on stderr: a live bar in a terminal, plain lines elsewhere, nothing beside JSON.
pub struct Show {
    bar: Option<ProgressBar>,
    lines: bool,
    phase: Phase,
}

impl Show {
    /// As it suits stderr.
    pub fn new(json: bool) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self { bar: None, lines: !json, phase: Phase::None };
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{prefix:>12} [{bar:30}] {percent:>3}%  {msg}");
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("=> "));
        }
        Self { bar: Some(bar), lines: false, phase: Phase::None }
    }

    /// A live bar in a terminal, nothing elsewhere.
    pub fn bar_only(json: bool) -> Self {
        Self { lines: false, ..Self::new(json) }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if self.lines => eprintln!("{text}"),
            None => {}
        }
    }

    fn phase(&mut self, event: &PhaseEvent) {
        if self.phase != event.phase {
            self.phase = event.phase;
            if self.bar.is_none() && !is_over(event.phase) && event.phase != Phase::None {
                self.line(&format!("phase {}", report::phase(event.phase)));
            }
        }
    }

    fn round(&mut self, round: &Round) {
        if self.bar.is_none() {
            self.line(&format!(
                "round {}: {} pages, {} zero, {} in {} ({}), {} pages/s dirtied, blackout would be {}",
                round.number,
                round.pages,
                round.zero_pages,
                report::bytes(round.bytes),
                report::time(round.duration_us),
                report::rate(round.bytes, round.duration_us),
                round.dirty_rate,
                report::time(round.predicted_downtime_us)
            ));
        }
    }

    fn job(&mut self, job: &Job) {
        let Some(bar) = &self.bar else { return };
        bar.set_length((job.data_processed + job.data_remaining).max(1));
        bar.set_position(job.data_processed);
        bar.set_prefix(report::phase(job.phase));
        if let Some(p) = job.postcopy.as_ref().filter(|_| job.phase == Phase::Postcopy) {
            // The source hears of the faults only when all is over; it knows what they make the destination ask for.
            let faults = match p.faults {
                0 => String::new(),
                n => format!("  {n} page faults, 99 % within {}", report::time(p.fault_p99_us)),
            };
            let left = report::bytes(p.remaining_bytes);
            bar.set_message(format!(
                "{left} left  {} requests, {} pages answered{faults}",
                p.requests, p.pages_answered
            ));
            return;
        }
        let throttle = match job.auto_converge_throttle {
            0 => String::new(),
            percent => format!("  vCPUs slowed by {percent} %"),
        };
        bar.set_message(format!(
            "round {}  {} left  {}/s  dirtied {}/s{throttle}",
            job.memory_iteration,
            report::bytes(job.memory_remaining),
            report::bytes(job.memory_bps),
            report::bytes(job.memory_dirty_rate.saturating_mul(job.memory_page_size)),
        ));
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
