//! `wherry run` and `wherry receive`: the processes that hold a VM; and `take-over`, by which one of them is replaced;
//! `take-over-executed`, by which one goes on with another program; `wait-for-successor`, what
//! becomes of the first of them if a shell waits for it.
//!
//! Both make the API socket first, serve it from its own thread while the VM is built or awaited, and end with what the
//! service says: the guest has powered off, the user has stopped it, it has moved away. SIGINT, SIGTERM and SIGHUP are a `stop`.
//! A second one ends the process at once.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use wherry_handover::{Channel, Launcher};
use wherry_migration::Journey;
use wherry_migration::ownership::VmId;
use wherry_vmm::api::server::Server;
use wherry_vmm::api::socket::ApiSocket;
use wherry_vmm::api::types::VmState;
use wherry_vmm::config::{Kernel, MachineConfig, PciConfig};
use wherry_vmm::serial::{leave_terminal, restore_terminal};
use wherry_vmm::service::kvm::{self, KvmEngine};
use wherry_vmm::service::{Policy, Service};
use wherry_vmm::update::waiter::{self, WAIT, Waited, Waiter};
use wherry_vmm::update::{self, HostState, Hosting, LAUNCHER, TakenOver, set_signals_held};
use wherry_vmm::vm::DeviceConfig;

use crate::args::{Process, Receive, Run, identity};
use crate::demo::check_kvm;
use crate::{BAD_ARGUMENTS, DID_NOT, IN_DOUBT, records};

/// `wherry run`
pub fn run(options: Run, log: &str) -> Result<u8> {
    let Run { kernel, initrd, cmdline, memory, hugepages, cpus, cpu, name, id, rng, balloon, paused, process } =
        options;
    let config = MachineConfig {
        name,
        vm: match id {
            Some(id) => id,
            None => random_id()?,
        },
        memory,
        hugepages,
        cpus,
        cpu,
        kernel: kernel.map_or(Kernel::Probe, Kernel::Path),
        initrd,
        cmdline,
        serial: process.serial.clone(),
        pci: PciConfig { rng, balloon, ..process.pci() },
    };
    if let Err(error) = config.check() {
        eprintln!("error: {error}");
        return Ok(BAD_ARGUMENTS);
    }
    if matches!(config.kernel, Kernel::Probe)
        && let Err(error) = wherry_guest::params::Params::parse(&config.cmdline)
    {
        eprintln!("error: --cmdline of the probe guest: {error}");
        return Ok(BAD_ARGUMENTS);
    }
    let parent = die_with(process.die_with)?;
    let launcher = launcher(log);
    check_kvm()?;
    // Not a VM that was about to leave, has left, or was about to come here when its process died.
    records::open_and_sweep()?.may_boot(VmId(config.vm)).context("looking whether the VM may be started here")?;

    let host = Host::open(&process, Some(config.clone()), launcher, parent, log)?;
    let guest = kvm::boot(&config).map_err(|e| anyhow::anyhow!("{e}")).context("building the VM")?;
    if let Err(error) = host.service.start(guest, paused)
        && host.service.ending().is_none()
    {
        return Err(error).context("starting the VM");
    }
    Ok(host.wait())
}

/// `wherry receive`
pub fn receive(options: Receive, log: &str) -> Result<u8> {
    let Receive { listen, once, process } = options;
    let parent = die_with(process.die_with)?;
    let launcher = launcher(log);
    check_kvm()?;
    records::open_and_sweep()?;
    let host = Host::open(&process, None, launcher, parent, log)?;
    let devices = DeviceConfig { serial: process.serial.clone(), pci: process.pci() };
    let arrival = kvm::Arrival::listen(&listen, devices)
        .map_err(|e| anyhow::anyhow!("{e}"))
        .with_context(|| format!("listening at {listen}"))?;
    host.service.listen(arrival.address());
    let service = host.service.clone();
    std::thread::Builder::new()
        .name("receive".into())
        .spawn(move || arrival.receive(&service, once))
        .context("starting the receiving thread")?;
    Ok(host.wait())
}

/// `wherry take-over`: the process at the other end of the standard input is replaced by this one.
pub fn take_over(log: String) -> Result<u8> {
    let channel = Channel::from_fd(take_stdin()?).context("using standard input as the channel to the old process")?;
    check_kvm()?;
    let program = std::env::current_exe().context("finding this program")?;
    let journey = Journey::new();
    match update::take_over(channel, &journey)? {
        Some(taken) => go_on(taken, program, &journey, log),
        None => Ok(crate::HAPPENED),
    }
}

/// `wherry take-over-executed`: goes on with the VM that this process had when it executed this program.
pub fn take_over_executed(log: String) -> Result<u8> {
    // It was executed from an open file, whose number would be its name otherwise.
    rustix::thread::set_name(c"wherry").context("naming this process")?;
    let queue = Channel::from_fd(take_stdin()?).context("using standard input as the queue of the program before")?;
    let program = std::env::current_exe().context("finding this program")?;
    let journey = Journey::new();
    let taken = update::take_over_executed(queue, &journey)?;
    go_on(taken, program, &journey, log)
}

/// Has the VM that was taken over in the service's hands, until its end.
fn go_on(taken: TakenOver, program: PathBuf, journey: &Journey, log: String) -> Result<u8> {
    // From here on the VM is lost if this process ends: nothing but that is said of what goes wrong.
    wherry_socket::own_adopted();
    let guest = kvm::taken_over(&taken);
    let TakenOver { state, socket, launcher, parent, waiter, .. } = taken;
    if let Some(parent) = &parent {
        watch_parent(parent.clone())?;
    }
    let host = Host::with(socket, state, program, launcher, parent, waiter, log)?;
    if host.hosting.waiter.is_some() {
        let (service, hosting) = (host.service.clone(), host.hosting.clone());
        let listen = move || {
            while hosting.waiter.as_ref().is_some_and(Waiter::await_stop) {
                if let Err(error) = service.stop(false) {
                    eprintln!("error: {error}");
                }
            }
        };
        std::thread::Builder::new()
            .name("waiter".into())
            .spawn(listen)
            .context("starting the thread that listens to the process that a shell waits for")?;
    }
    if let Err(error) = host.service.take_over(guest, kvm::view(journey))
        && host.service.ending().is_none()
    {
        return Err(error).context("taking the VM over");
    }
    Ok(host.wait())
}

/// `wherry launcher`: starts programs for the process at the other end of the standard input.
pub fn serve_launcher() -> Result<u8> {
    wherry_handover::serve(take_stdin()?)?;
    Ok(crate::HAPPENED)
}

/// What standard input is; nothing else reads it from now on.
pub fn take_stdin() -> Result<OwnedFd> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned().context("taking standard input")?;
    let null = std::fs::File::open("/dev/null").context("opening /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("closing standard input")?;
    Ok(stdin)
}

/// Makes the launcher, while this process may still start programs. Without one all runs, and this process cannot be replaced.
pub fn launcher(log: &str) -> Result<Arc<Launcher>, String> {
    // This very program, also when there is another one at its path by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg(LAUNCHER).env("WHERRY_LOG", log);
    let launcher = Launcher::start(command).map_err(|error| error.to_string());
    if let Err(error) = &launcher {
        tracing::warn!(error, "no launcher: this process cannot be replaced by a new version of this program");
    }
    launcher.map(Arc::new)
}

/// A process with a service, an API socket and handlers for signals.
struct Host {
    service: Arc<Service>,
    hosting: Arc<Hosting>,
    server: Server,
    socket: ApiSocket,
}

impl Host {
    fn open(
        process: &Process,
        reboot: Option<MachineConfig>,
        launcher: Result<Arc<Launcher>, String>,
        parent: Option<Arc<OwnedFd>>,
        log: &str,
    ) -> Result<Self> {
        let socket = ApiSocket::bind(&process.api)?;
        let program = std::env::current_exe().context("finding this program")?;
        let api = std::path::absolute(&process.api).context("finding the API socket")?;
        Self::with(
            socket,
            HostState { api, linger: process.linger, reboot },
            program,
            launcher,
            parent,
            None,
            log.to_owned(),
        )
    }

    fn with(
        socket: ApiSocket,
        state: HostState,
        program: PathBuf,
        launcher: Result<Arc<Launcher>, String>,
        parent: Option<Arc<OwnedFd>>,
        waiter: Option<Waiter>,
        log: String,
    ) -> Result<Self> {
        let listener = || socket.listener().context("using the API socket");
        let reboot = state.reboot.clone();
        let reboot = reboot.map(|config| Box::new(move || kvm::boot(&config)) as wherry_vmm::service::Reboot);
        let policy = Policy { reboot, linger: state.linger };
        let hosting = Hosting::new(state, program, listener()?, launcher, parent, waiter, log)
            .context("noting what outlives the process")?;
        let service = Service::new(Arc::new(KvmEngine { hosting: Some(hosting.clone()) }), policy);
        let server = Server::start(listener()?, service.clone()).context("starting the API thread")?;
        signals(service.clone(), hosting.clone())?;
        Ok(Self { service, hosting, server, socket })
    }

    /// Waits for the end and gives the exit status.
    fn wait(mut self) -> u8 {
        let ending = self.service.wait_for_end();
        if ending.replaced {
            // What others would find here is the new process's.
            wherry_socket::forget_all();
            leave_terminal();
            self.server.stop();
            eprintln!("{}", ending.message);
            return match self.hosting.waits() {
                Some(socket) => become_waiter(socket),
                None => ending.status,
            };
        }
        self.server.stop();
        drop(self.socket);
        // The machine ends with the process, without being dropped.
        wherry_socket::remove_all();
        restore_terminal();
        let info = self.service.info();
        if info.state == VmState::Stopped
            && let Some(id) = info.vm.and_then(|vm| identity(&vm.id).ok())
        {
            records::forget(VmId(id));
        }
        if ending.status == 0 {
            eprintln!("{}", ending.message);
        } else {
            eprintln!("error: {}", ending.message);
        }
        if let Some(waiter) = &self.hosting.waiter {
            waiter.ended(ending.status);
        }
        ending.status
    }
}

/// The signals that ask for a stop.
struct StopSignals([tokio::signal::unix::Signal; 3]);

impl StopSignals {
    fn new(runtime: &tokio::runtime::Runtime) -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let _guard = runtime.enter();
        Ok(Self([
            signal(SignalKind::interrupt()).context("listening for SIGINT")?,
            signal(SignalKind::terminate()).context("listening for SIGTERM")?,
            signal(SignalKind::hangup()).context("listening for SIGHUP")?,
        ]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// How often a stop is asked for that has not come about.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// This process was replaced, and a shell waits for it: gives up all that it has, and waits for the end of the VM.
fn become_waiter(socket: OwnedFd) -> u8 {
    let socket = match socket.try_clone() {
        // Whatever was the VM's here goes at once, as if the process had ended: descriptors, memory, threads.
        Ok(stdin) => {
            // One that comes in between would end it, and the shell would go on.
            if let Err(error) = set_signals_held(true) {
                tracing::warn!(%error, "holding signals back");
            }
            let error = Command::new("/proc/self/exe").arg(WAIT).stdin(Stdio::from(stdin)).exec();
            tracing::warn!(%error, "this process keeps what it has while it waits for the VM");
            socket
        }
        Err(_) => socket,
    };
    wait_at(socket).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        DID_NOT
    })
}

/// `wherry wait-for-successor`: ends as the process that has the VM does, at the other end of the standard input.
pub fn wait_for_successor() -> Result<u8> {
    wait_at(take_stdin()?)
}

fn wait_at(socket: OwnedFd) -> Result<u8> {
    let runtime = crate::runtime()?;
    let mut wishes = StopSignals::new(&runtime)?;
    set_signals_held(false).context("listening for signals that have come")?;
    let ask = socket.try_clone().context("using the socket to the process that has the VM")?;
    let work = move || {
        runtime.block_on(async {
            wishes.next().await;
            // An error: it has ended, and that is noticed where it is waited for.
            while waiter::ask_to_stop(&ask).is_ok() {
                tokio::time::sleep(ASK_AGAIN).await;
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(work).context("starting the thread for signals")?;
    match waiter::wait(&socket).context("waiting for the process that has the VM")? {
        Waited::Ended(status) => Ok(status),
        Waited::Silent => {
            eprintln!("error: the process that had the VM has ended without a word, and the VM with it");
            Ok(DID_NOT)
        }
    }
}

/// Takes SIGINT, SIGTERM and SIGHUP (the terminal is gone) as a request to stop.
fn signals(service: Arc<Service>, hosting: Arc<Hosting>) -> Result<()> {
    let runtime = crate::runtime()?;
    let mut wishes = StopSignals::new(&runtime)?;
    // Those that have come while one program executed another.
    set_signals_held(false).context("listening for signals that have come")?;
    let work = move || {
        runtime.block_on(async {
            let mut asked = false;
            loop {
                wishes.next().await;
                hosting.stop_wanted.store(true, Ordering::SeqCst);
                tracing::info!("a signal asks for a stop");
                if asked {
                    let in_doubt = service.info().state == VmState::InDoubt;
                    eprintln!("error: ended by a second signal while the VM was {}", service.info().state);
                    wherry_socket::remove_all();
                    restore_terminal();
                    let status = if in_doubt { IN_DOUBT } else { DID_NOT };
                    if let Some(waiter) = &hosting.waiter {
                        waiter.ended(status);
                    }
                    std::process::exit(status.into());
                }
                asked = true;
                let service = service.clone();
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = service.stop(false) {
                        eprintln!("error: {error}. A second signal ends the process all the same");
                    }
                });
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(work).context("starting the thread for signals")?;
    Ok(())
}

/// Has the kernel end this process when the one that started it, if it is given, ends. A pidfd of that one, for a successor, which is
/// not its child.
pub fn die_with(parent: Option<i32>) -> Result<Option<Arc<OwnedFd>>> {
    let Some(parent) = parent else { return Ok(None) };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("asking to end with the parent process")?;
    let pidfd = Pid::from_raw(parent).and_then(|parent| pidfd_open(parent, PidfdFlags::empty()).ok());
    // The parent may have gone before the request was made.
    if rustix::process::getppid().map(|p| p.as_raw_nonzero().get()) != Some(parent) {
        bail!("the parent process {parent} is gone");
    }
    Ok(Some(Arc::new(pidfd.context("opening a pidfd of the parent process")?)))
}

/// Has this process end when another one has ended, as the kernel would end its child.
pub fn watch_parent(parent: Arc<OwnedFd>) -> Result<()> {
    std::thread::Builder::new()
        .name("parent".into())
        .spawn(move || end_with(&parent))
        .context("starting the thread that watches the parent process")?;
    Ok(())
}

/// Waits for the end of another process, and ends this one.
fn end_with(parent: &OwnedFd) {
    use rustix::event::{PollFd, PollFlags, poll};
    loop {
        match poll(&mut [PollFd::new(parent, PollFlags::IN)], None) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => break,
            Err(error) => return tracing::error!(%error, "waiting for the end of the parent process"),
        }
    }
    if let Err(error) = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL) {
        tracing::error!(%error, "ending with the parent process");
    }
}

fn random_id() -> Result<[u8; 16]> {
    use std::io::Read;
    let mut id = [0; 16];
    let mut random = std::fs::File::open("/dev/urandom").context("opening /dev/urandom")?;
    random.read_exact(&mut id).context("reading /dev/urandom")?;
    Ok(id)
}
