//! The command line as clap sees it: names, values and their checks. Nothing is done here.

mod accel;
mod testdma;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use wherry_netlab::Shape;
use wherry_vmm::api::types::UpdateMode;

pub use self::accel::{AccelWrapKey, DeviceAccel, key_kind};
pub use self::testdma::DeviceTestdma;
pub use self::values::{DeviceSpec, identity, size};
use self::values::{
    address, console, cpu_model, device, disk, link, mac, mode, net, plug, raw_disk, serial, side, update_mode,
};

/// Runs virtual machines and moves them, running, from process to process and from host to host.
#[derive(Debug, Parser)]
#[command(
    name = "wherry",
    version,
    max_term_width = 100,
    after_help = "\
Exit status: 0 it happened; 1 it did not, and the VM runs on where it was; 2 bad arguments;
3 in doubt or paused, recoverable.

Try `wherry demo` first: everything in one command."
)]
pub struct Cli {
    /// What to log to stderr: error, warn, info, debug, trace, or a filter such as `wherry_migration=debug`
    #[arg(long, global = true, env = "WHERRY_LOG", default_value = "warn", value_name = "FILTER")]
    pub log: String,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM in this process
    Run(Box<Run>),
    /// Wait for a VM to arrive, and run it in this process
    Receive(Receive),
    /// Move a running VM to another Wherry that waits with `receive`
    Migrate(Migrate),
    /// Cancel the migration under way; the VM stays where it is
    Cancel(Control),
    /// Stop the vCPUs until `resume`
    Pause(Control),
    /// Let a paused VM run
    Resume(Control),
    /// Have a migration under way go on by postcopy: the VM runs at its destination at once, and memory follows
    Switch(Control),
    /// Take up the lost link of a VM whose memory follows it, over another address if need be
    Recover(Recover),
    /// Decide who owns a VM that is in doubt, when the other end is known to be dead or fenced
    Resolve(Resolve),
    /// Show how much RAM a guest with a balloon is left with, or set it
    Balloon(Balloon),
    /// Plug a device into a running VM
    DeviceAdd(DeviceAdd),
    /// Have the guest let a device go, and take it away
    DeviceRemove(DeviceRemove),
    /// Have a new version of this program take a running VM over, with all that it is connected to; or a device that a process
    /// serves, under the VM that uses it
    Update(Update),
    /// Show where a VM, its devices and its migration stand
    Status(Control),
    /// End a VM and its process
    Stop(Stop),
    /// Show it all: the built-in probe guest, moved live several times and verified
    Demo(Demo),
    /// Measure moves, beside raw loopback TCP and, where it is installed, beside QEMU
    Bench(Bench),
    /// Serve one device for the VM of another process, over vhost-user
    Device(Device),
    /// Use the accelerator of this program: list its engines, run a job file on them
    Accel(Accel),
    /// Take over from the process at standard input, which `update` asks for
    #[command(hide = true)]
    TakeOver,
    /// Go on with the VM of the program that this process executed before, which `update --mode exec` asks for
    #[command(hide = true)]
    TakeOverExecuted,
    /// Take over from the device process at standard input, which `update --control` asks for
    #[command(hide = true)]
    TakeOverDevice,
    /// Start programs for the process at standard input
    #[command(hide = true)]
    Launcher,
    /// Wait for the process at standard input, which has the VM that this one had
    #[command(hide = true)]
    WaitForSuccessor,
}

/// Options of `update`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("whose").required(true).args(["api", "control"]))]
pub struct Update {
    /// UNIX socket of the API of the process that holds a VM
    #[arg(long, value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// Control socket of a process that serves a device: the --control of `wherry device`
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// Answer in JSON on stdout
    #[arg(long)]
    pub json: bool,
    /// The program that is to go on [default: what is now at the path of the running one]
    #[arg(long, value_name = "PATH")]
    pub binary: Option<PathBuf>,
    /// In which process it goes on: a new one, or the same one (after a new one has proven that it can; the guest stands still for longer)
    #[arg(long, value_name = "MODE", default_value = "transfer", value_parser = update_mode)]
    pub mode: UpdateMode,
}

/// Options of `device`.
#[derive(Debug, Args)]
pub struct Device {
    /// Which device.
    #[command(subcommand)]
    pub command: DeviceCommand,
}

/// A device that can be served by a process of its own.
#[derive(Debug, Subcommand)]
pub enum DeviceCommand {
    /// A disk, for `--device vhost-user-blk=SOCKET` or any other vhost-user front end
    Blk(DeviceBlk),
    /// A network device, for `--device vhost-user-net=SOCKET` or any other vhost-user front end
    Net(DeviceNet),
    /// The accelerator, a PCI function for any vfio-user client (docs/accel-abi.md)
    Accel(DeviceAccel),
    /// A PCI function for tests, that does DMA into guest RAM: for any vfio-user client
    Testdma(DeviceTestdma),
}

/// Where a device is served, and where its process is asked to be replaced.
#[derive(Debug, Args)]
pub struct DeviceSockets {
    /// UNIX socket to listen on
    #[arg(long, value_name = "SOCKET")]
    pub socket: PathBuf,
    /// UNIX socket to listen on for `wherry update --control`; without, the process is not replaced under a VM
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// For programs that start this one: end when the process PID, the parent, ends.
    #[arg(long, value_name = "PID", hide = true)]
    pub die_with: Option<i32>,
}

/// Options of `device blk`.
#[derive(Debug, Args)]
pub struct DeviceBlk {
    /// Where it is served.
    #[command(flatten)]
    pub sockets: DeviceSockets,
    /// Disk image, a file or block device; with `,ro` it is only read. It is locked while a guest uses it
    #[arg(long, value_name = "FILE[,ro]", value_parser = raw_disk)]
    pub image: wherry_vmm::config::DiskConfig,
}

/// Options of `device net`.
#[derive(Debug, Args)]
pub struct DeviceNet {
    /// Where it is served.
    #[command(flatten)]
    pub sockets: DeviceSockets,
    /// Tap device
    #[arg(long, value_name = "TAP")]
    pub tap: String,
    /// The guest's address, for front ends that ask for it
    #[arg(long, value_name = "MAC", value_parser = mac)]
    pub mac: [u8; 6],
}

/// Options of `accel`.
#[derive(Debug, Args)]
pub struct Accel {
    /// What to do.
    #[command(subcommand)]
    pub command: AccelCommand,
}

/// What to do with the accelerator.
#[derive(Debug, Subcommand)]
pub enum AccelCommand {
    /// List engines, the workers that serve them here, and what they can do
    Engines(AccelEngines),
    /// Run the steps of a job file, then show results, contexts and how long engines were busy
    #[command(after_help = "\
docs/accel-job.md describes job files; docs/examples/accel-job.toml is one.
Exit status: 0 every step ended as it should; 1 one did not, or not in time; 2 bad arguments or job file.")]
    Run(AccelRun),
    /// Wrap a key with the key of a fleet, for `device accel --key`
    WrapKey(AccelWrapKey),
}

/// Options of `accel engines`.
#[derive(Debug, Args)]
pub struct AccelEngines {
    /// List the engines of this job file's device rather than the usual ones
    #[arg(value_name = "JOB")]
    pub job: Option<PathBuf>,
    /// Workers that serve the engines [default: as many as processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: Option<u16>,
    /// Answer in JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// Options of `accel run`.
#[derive(Debug, Args)]
pub struct AccelRun {
    /// The job file
    #[arg(value_name = "JOB")]
    pub job: PathBuf,
    /// Workers that serve the engines [default: as the job file says, else as many as processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: Option<u16>,
    /// When all steps are submitted, stop the device wherever they are, and go on with its saved state in another
    /// device with so many workers
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub move_to: Option<u16>,
    /// Give up when the steps have not ended after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub timeout: u64,
    /// Show contexts and busy times on stderr twice a second meanwhile
    #[arg(long)]
    pub watch: bool,
    /// Answer in JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Linux bzImage, or any ELF with a PVH entry; without it the built-in probe guest runs
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line (of the probe guest: its parameters, such as `data=512M rate=50M`)
    #[arg(long, value_name = "STRING", default_value = "", allow_hyphen_values = true)]
    pub cmdline: String,
    /// RAM, such as 512M or 4G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Back RAM with 2 MiB huge pages
    #[arg(long)]
    pub hugepages: bool,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// What the guest's CPUs are: `host`, or a level that more hosts have, for migration between different ones:
    /// x86-64-v2, x86-64-v3, x86-64-v4
    #[arg(long, value_name = "MODEL", default_value = "host", value_parser = cpu_model)]
    pub cpu: wherry_vmm::config::CpuModel,
    /// Name of the VM
    #[arg(long, value_name = "NAME", default_value = "vm")]
    pub name: String,
    /// Identity of the VM: 32 hexadecimal digits. Give the same at every start of the same VM, and Wherry refuses to
    /// start it while it may run elsewhere [default: random]
    #[arg(long, value_name = "ID", value_parser = identity)]
    pub id: Option<[u8; 16]>,
    /// Give the guest a source of random numbers
    #[arg(long)]
    pub rng: bool,
    /// Give the guest a balloon: memory that it puts there, or reports as free, goes back to this host, and a migration leaves
    /// out what it does not use
    #[arg(long)]
    pub balloon: bool,
    /// Build the VM, but leave it paused until `wherry resume`
    #[arg(long)]
    pub paused: bool,
    /// Where the API and the serial port are.
    #[command(flatten)]
    pub process: Process,
}

/// Options of every process that holds a VM.
#[derive(Debug, Args)]
pub struct Process {
    /// UNIX socket to make for the API
    #[arg(long, value_name = "SOCKET")]
    pub api: PathBuf,
    /// Disk image, a file or block device, once for each disk; with `,ro` it is only read, with `,format=qcow2` it is not raw.
    /// A receiver needs the same disks in the same order
    #[arg(long, value_name = "FILE[,ro][,format=FORMAT]", value_parser = disk)]
    pub disk: Vec<wherry_vmm::config::DiskConfig>,
    /// Tap device for a network device, once for each; with `,mac=AA:BB:CC:DD:EE:FF` the guest's address [default: from the
    /// identity of the VM]. A receiver needs as many in the same order, and takes the addresses that the VM has
    #[arg(long, value_name = "TAP[,mac=MAC]", value_parser = net)]
    pub net: Vec<wherry_vmm::config::NetConfig>,
    /// Give the guest a virtio console, connected to unix:PATH (a socket is made), pty:LINK (a pseudo-terminal is made, and a
    /// symbolic link to it) or file:PATH (output is appended). A receiver needs one if the VM has one
    #[arg(long, value_name = "TARGET", value_parser = console)]
    pub console: Option<wherry_vmm::config::ConsoleTarget>,
    /// A device that somebody else has, once for each. vfio=ADDRESS is a PCI function of this host that is bound to vfio-pci, such as
    /// vfio=0000:3b:00.1. The others are served by other processes: vhost-user-blk=SOCKET, vhost-user-net=SOCKET, or vhost-user=SOCKET,id=N
    /// for a virtio device of another type; with `,queues=N` it has so many rings. vfio-user=SOCKET is a whole PCI function. A
    /// receiver needs the same devices in the same order
    #[arg(long, value_name = "KIND=PLACE", value_parser = device)]
    pub device: Vec<DeviceSpec>,
    /// Where the serial port leads: stdio, file:PATH, socket:PATH or null
    #[arg(long, value_name = "TARGET", default_value = "stdio", value_parser = serial)]
    pub serial: wherry_vmm::config::SerialTarget,
    /// After the VM has moved away, stay and answer `status` until `stop`
    #[arg(long)]
    pub linger: bool,
    /// For programs that start this one: end when the process PID, the parent, ends.
    #[arg(long, value_name = "PID", hide = true)]
    pub die_with: Option<i32>,
}

impl Process {
    /// What the devices of its VM on the PCI bus are connected to, without those that need nothing of this host.
    pub fn pci(&self) -> wherry_vmm::config::PciConfig {
        let (mut vhost_user, mut functions) = (Vec::new(), Vec::new());
        for device in &self.device {
            match device {
                DeviceSpec::Vhost(spec) => vhost_user.push(spec.clone()),
                DeviceSpec::Function(source) => functions.push(source.clone()),
            }
        }
        let (disks, nets, console) = (self.disk.clone(), self.net.clone(), self.console.clone());
        wherry_vmm::config::PciConfig { disks, nets, console, vhost_user, functions, ..Default::default() }
    }
}

/// Options of `receive`.
#[derive(Debug, Args)]
pub struct Receive {
    /// Where to wait: tcp:HOST:PORT (port 0: any free one, shown by `status`) or unix:PATH
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub listen: String,
    /// Wait for one VM only: exit with status 1 if it does not arrive
    #[arg(long)]
    pub once: bool,
    /// Where the API and the serial port are.
    #[command(flatten)]
    pub process: Process,
}

/// How memory is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// All of it before the switchover
    Precopy,
    /// The switchover first; memory follows while the guest runs at the destination
    Postcopy,
    /// Precopy, and postcopy if it does not converge
    Hybrid,
}

impl From<Mode> for wherry_vmm::api::types::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Precopy => Self::Precopy,
            Mode::Postcopy => Self::Postcopy,
            Mode::Hybrid => Self::Hybrid,
        }
    }
}

/// Options of `migrate`.
#[derive(Debug, Args)]
pub struct Migrate {
    /// Which VM, and how to report.
    #[command(flatten)]
    pub control: Control,
    /// Where to: tcp:HOST:PORT or unix:PATH, where a `wherry receive` waits
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub to: String,
    /// How memory is carried
    #[arg(long, default_value = "hybrid", value_parser = mode)]
    pub mode: Mode,
    /// Data channels [default: chosen from the cores of both hosts]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub channels: Option<u32>,
    /// Blackout to stay below, in milliseconds [default: 5]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    pub downtime_limit: Option<u64>,
    /// Most bytes per second on the wire while the guest runs, such as 100M; pages it waits for are not held back
    /// [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub bandwidth: Option<u64>,
    /// Seconds after which a precopy that does not converge is given up, or a hybrid switches [default: 900]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: Option<u64>,
    /// Hash all RAM and state at the stop and before the start, and refuse to run on a difference (lengthens the
    /// blackout)
    #[arg(long)]
    pub verify: bool,
    /// Postcopy: free memory here as it is sent. A link that is lost then cannot be taken up, and the VM is lost with it
    #[arg(long, conflicts_with = "verify")]
    pub release: bool,
}

/// Options of every command to a process that is there.
#[derive(Debug, Args)]
pub struct Control {
    /// UNIX socket of the API
    #[arg(long, value_name = "SOCKET")]
    pub api: PathBuf,
    /// Answer in JSON on stdout
    #[arg(long)]
    pub json: bool,
}

/// Options of `balloon`.
#[derive(Debug, Args)]
pub struct Balloon {
    /// Which process, and how to report.
    #[command(flatten)]
    pub control: Control,
    /// RAM that the guest is to be left with, such as 512M; it follows in its own time
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub size: Option<u64>,
}

/// Options of `device-add`.
#[derive(Debug, Args)]
pub struct DeviceAdd {
    /// Which process, and how to report.
    #[command(flatten)]
    pub control: Control,
    /// A function that another process owns, vfio-user=SOCKET, or one of this host, vfio=ADDRESS
    #[arg(value_name = "KIND=PLACE", value_parser = plug)]
    pub device: String,
}

/// Options of `device-remove`.
#[derive(Debug, Args)]
pub struct DeviceRemove {
    /// Which process, and how to report.
    #[command(flatten)]
    pub control: Control,
    /// What the device is called: see `wherry status`
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Seconds that the guest has to let it go
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub timeout: u64,
}

/// Options of `recover`.
#[derive(Debug, Args)]
pub struct Recover {
    /// Which end, and how to report.
    #[command(flatten)]
    pub control: Control,
    /// At the source: where the destination is from now on [default: where it was]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub to: Option<String>,
    /// At the destination: where to wait for the source from now on
    #[arg(long, value_name = "ADDRESS", value_parser = address, conflicts_with = "to")]
    pub listen: Option<String>,
}

/// Options of `stop`.
#[derive(Debug, Args)]
pub struct Stop {
    /// Which process, and how to report.
    #[command(flatten)]
    pub control: Control,
    /// Also if what it holds may be the only copy of a VM, or memory that a VM elsewhere still needs
    #[arg(long)]
    pub force: bool,
}

/// Options of `resolve`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["api", "id"]))]
pub struct Resolve {
    /// UNIX socket of the API of the process that has the VM in doubt
    #[arg(long, value_name = "SOCKET")]
    pub api: Option<PathBuf>,
    /// Identity of a VM whose process has died on this host while it changed hands
    #[arg(long, value_name = "ID", value_parser = identity)]
    pub id: Option<[u8; 16]>,
    /// Answer in JSON on stdout
    #[arg(long)]
    pub json: bool,
    /// Who owns the VM from now on
    #[arg(long = "as", value_name = "END", value_parser = side)]
    pub side: wherry_migration::Side,
}

/// Options of `demo`.
#[derive(Debug, Args)]
pub struct Demo {
    /// Answer in JSON on stdout
    #[arg(long)]
    pub json: bool,
    /// RAM of the guest
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Data that the guest keeps in RAM
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size)]
    pub data: u64,
    /// Bytes that the guest writes per second
    #[arg(long, value_name = "BYTES", default_value = "50M", value_parser = size)]
    pub rate: u64,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// How often the guest moves
    #[arg(long, value_name = "N", default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub legs: u32,
    /// Ask every migration for `--verify`: longer blackouts
    #[arg(long, conflicts_with = "mode")]
    pub verify: bool,
    /// Give the guest an accelerator, in a process of its own, that moves along to others with more or fewer workers: longer
    /// blackouts
    #[arg(long)]
    pub accel: bool,
    /// How memory is carried, in all moves alike [default: shows different ones]
    #[arg(long, value_parser = mode)]
    pub mode: Option<Mode>,
}

/// Whom to measure beside Wherry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// `qemu-system-x86_64`, with one stream and with multifd
    Qemu,
}

/// Options of `bench`.
#[derive(Debug, Args)]
pub struct Bench {
    /// Answer in JSON on stdout
    #[arg(long)]
    pub json: bool,
    /// Measure this program in turn with Wherry
    #[arg(long, value_name = "PEER")]
    pub vs: Option<Peer>,
    /// How often each thing is measured
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// RAM of the guest
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Data that the guest keeps in RAM, and size of the image for the engine alone
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = size)]
    pub data: u64,
    /// Bytes that the guest writes per second
    #[arg(long, value_name = "BYTES", default_value = "50M", value_parser = size)]
    pub rate: u64,
    /// Move over a link of its own that is so slow instead of loopback: round trip and bits per second, such as
    /// 1ms,1G. Needs root and `ip`
    #[arg(long, value_name = "TIME,RATE", value_parser = link, conflicts_with = "vs")]
    pub link: Option<Shape>,
    /// Measure the accelerator instead: its engines beside the crates called directly, latency, workers, fairness
    #[arg(long, conflicts_with_all = ["vs", "link"])]
    pub accel: bool,
    /// Measure what a disk adds to the blackout instead: one of the VM's process, and one of another
    #[arg(long, conflicts_with_all = ["vs", "link", "accel"])]
    pub disk: bool,
    /// Measure live updates instead, by memory, vCPUs and vectors; with --vs qemu, beside its cpr-transfer
    #[arg(long, conflicts_with_all = ["link", "accel", "disk"])]
    pub update: bool,
    /// Blackout to stay below, in milliseconds, for all programs
    #[arg(long, value_name = "MS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub downtime_limit: u64,
}

/// The longest time a command waits for an answer that takes no work.
pub const ANSWER: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_mode_that_is_none_is_refused() {
        let parsed = |mode: &str| {
            let args = ["wherry", "migrate", "--api", "s", "--to", "tcp:h:1", "--mode", mode];
            Cli::try_parse_from(args)
        };
        for mode in ["precopy", "postcopy", "hybrid"] {
            assert!(parsed(mode).is_ok(), "{mode}");
        }
        assert_eq!(parsed("teleport").unwrap_err().exit_code(), 2);
    }
}
