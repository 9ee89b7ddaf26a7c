//! `wherry run` and `wherry receive`: the processes that hold a VM.
//!
//! Both make the API socket first, serve it from its own thread while the VM is built or awaited, and end with what the
//! service says: the guest has powered off, the user has stopped it, it has moved away. SIGINT, SIGTERM and SIGHUP are a `stop`.
//! A second one ends the process at once.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use wherry_migration::ownership::VmId;
use wherry_vmm::api::server::Server;
use wherry_vmm::api::socket::ApiSocket;
use wherry_vmm::api::types::VmState;
use wherry_vmm::config::{Kernel, MachineConfig, PciConfig};
use wherry_vmm::serial::restore_terminal;
use wherry_vmm::service::kvm::{self, KvmEngine};
use wherry_vmm::service::{Policy, Service};
use wherry_vmm::vm::DeviceConfig;

use crate::args::{Process, Receive, Run, identity};
use crate::demo::check_kvm;
use crate::{BAD_ARGUMENTS, DID_NOT, IN_DOUBT, records};

/// `wherry run`
pub fn run(options: Run) -> Result<u8> {
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
    die_with(process.die_with)?;
    check_kvm()?;
    // Not a VM that was about to leave, has left, or was about to come here when its process died.
    records::open_and_sweep()?.may_boot(VmId(config.vm)).context("looking whether the VM may be started here")?;

    let reboot = config.clone();
    let policy = Policy { reboot: Some(Box::new(move || kvm::boot(&reboot))), linger: process.linger };
    let host = Host::open(&process, policy)?;
    let guest = kvm::boot(&config).map_err(|e| anyhow::anyhow!("{e}")).context("building the VM")?;
    if let Err(error) = host.service.start(guest, paused)
        && host.service.ending().is_none()
    {
        return Err(error).context("starting the VM");
    }
    Ok(host.wait())
}

/// `wherry receive`
pub fn receive(options: Receive) -> Result<u8> {
    let Receive { listen, once, process } = options;
    die_with(process.die_with)?;
    check_kvm()?;
    records::open_and_sweep()?;
    let host = Host::open(&process, Policy { reboot: None, linger: process.linger })?;
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

/// A process with a service, an API socket and handlers for signals.
struct Host {
    service: Arc<Service>,
    server: Server,
    socket: ApiSocket,
}

impl Host {
    fn open(process: &Process, policy: Policy) -> Result<Self> {
        let socket = ApiSocket::bind(&process.api)?;
        let service = Service::new(Arc::new(KvmEngine), policy);
        let listener = socket.listener().context("using the API socket")?;
        let server = Server::start(listener, service.clone()).context("starting the API thread")?;
        signals(service.clone())?;
        Ok(Self { service, server, socket })
    }

    /// Waits for the end and gives the exit status.
    fn wait(mut self) -> u8 {
        let ending = self.service.wait_for_end();
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
        ending.status
    }
}

/// Takes SIGINT, SIGTERM and SIGHUP (the terminal is gone) as a request to stop.
fn signals(service: Arc<Service>) -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = crate::runtime()?;
    let (mut interrupt, mut terminate, mut hangup) = {
        let _guard = runtime.enter();
        (
            signal(SignalKind::interrupt()).context("listening for SIGINT")?,
            signal(SignalKind::terminate()).context("listening for SIGTERM")?,
            signal(SignalKind::hangup()).context("listening for SIGHUP")?,
        )
    };
    let work = move || {
        runtime.block_on(async {
            let mut asked = false;
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                if asked {
                    let in_doubt = service.info().state == VmState::InDoubt;
                    eprintln!("error: ended by a second signal while the VM was {}", service.info().state);
                    wherry_socket::remove_all();
                    restore_terminal();
                    std::process::exit(if in_doubt { IN_DOUBT } else { DID_NOT }.into());
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

/// Has the kernel end this process when the one that started it, if it is given, ends.
pub fn die_with(parent: Option<i32>) -> Result<()> {
    let Some(parent) = parent else { return Ok(()) };
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .context("asking to end with the parent process")?;
    // The parent may have gone before the request was made.
    if rustix::process::getppid().map(|p| p.as_raw_nonzero().get()) != Some(parent) {
        bail!("the parent process {parent} is gone");
    }
    Ok(())
}

fn random_id() -> Result<[u8; 16]> {
    use std::io::Read;
    let mut id = [0; 16];
    let mut random = std::fs::File::open("/dev/urandom").context("opening /dev/urandom")?;
    random.read_exact(&mut id).context("reading /dev/urandom")?;
    Ok(id)
}
