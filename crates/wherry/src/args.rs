//! The command line as clap sees it: names, values and their checks. Nothing is done here.

mod accel;
mod testdma;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use wherry_netlab::Shape;
use wherry_vmm::config::ImageFormat;

pub use self::accel::DeviceAccel;
pub use self::testdma::DeviceTestdma;

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
    /// Show where a VM and its migration stand
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

/// Options of `device blk`.
#[derive(Debug, Args)]
pub struct DeviceBlk {
    /// UNIX socket to listen on
    #[arg(long, value_name = "SOCKET")]
    pub socket: PathBuf,
    /// Disk image, a file or block device; with `,ro` it is only read. It is locked while a guest uses it
    #[arg(long, value_name = "FILE[,ro]", value_parser = raw_disk)]
    pub image: wherry_vmm::config::DiskConfig,
}

/// Options of `device net`.
#[derive(Debug, Args)]
pub struct DeviceNet {
    /// UNIX socket to listen on
    #[arg(long, value_name = "SOCKET")]
    pub socket: PathBuf,
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
    /// A device that another process serves, once for each: vhost-user-blk=SOCKET, vhost-user-net=SOCKET, or vhost-user=SOCKET,id=N
    /// for a virtio device of another type; with `,queues=N` it has so many rings. vfio-user=SOCKET is a whole PCI function. A
    /// receiver needs processes for the same devices in the same order
    #[arg(long, value_name = "KIND=SOCKET", value_parser = device)]
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
        let (mut vhost_user, mut vfio_user) = (Vec::new(), Vec::new());
        for device in &self.device {
            match device {
                DeviceSpec::Vhost(spec) => vhost_user.push(spec.clone()),
                DeviceSpec::VfioUser(socket) => vfio_user.push(socket.clone()),
            }
        }
        let (disks, nets, console) = (self.disk.clone(), self.net.clone(), self.console.clone());
        wherry_vmm::config::PciConfig { disks, nets, console, vhost_user, vfio_user, ..Default::default() }
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
    /// Blackout to stay below, in milliseconds, for all programs
    #[arg(long, value_name = "MS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    pub downtime_limit: u64,
}

/// The longest time a command waits for an answer that takes no work.
pub const ANSWER: Duration = Duration::from_secs(10);

/// Reads a size: digits, then K, M, G or T (powers of 1024), with an optional B or iB.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let suffix = suffix.to_ascii_uppercase();
    let unit = suffix.strip_suffix("IB").or_else(|| suffix.strip_suffix('B')).unwrap_or(&suffix);
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("use a number with K, M, G or T, such as 512M".into()),
    };
    let number: u64 = number.parse().map_err(|_| "use a number with K, M, G or T, such as 512M".to_owned())?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err("must be more than 0".into()),
        Some(bytes) => Ok(bytes),
        None => Err("is too large".into()),
    }
}

/// Reads what a link is like: a round trip in ms or us, and bits per second with K, M or G (powers of 1000).
pub fn link(text: &str) -> Result<Shape, String> {
    let complain = || "use a round trip and bits per second, such as 1ms,1G".to_owned();
    let (time, rate) = text.split_once(',').ok_or_else(complain)?;
    let number = |digits: &str| digits.parse::<u64>().ok().filter(|n| *n <= 1_000_000);
    let round_trip = match time.strip_suffix("ms") {
        Some(ms) => number(ms).map(Duration::from_millis),
        None => time.strip_suffix("us").and_then(number).map(Duration::from_micros),
    };
    let (digits, unit) = match rate.as_bytes().last() {
        Some(b'K' | b'k') => (&rate[..rate.len() - 1], 1000),
        Some(b'M' | b'm') => (&rate[..rate.len() - 1], 1_000_000),
        Some(b'G' | b'g') => (&rate[..rate.len() - 1], 1_000_000_000),
        _ => (rate, 1),
    };
    let rate = number(digits).map(|n| n * unit / 8).filter(|bytes| *bytes > 0);
    Ok(Shape::new(round_trip.ok_or_else(complain)? / 2, rate.ok_or_else(complain)?))
}

/// Reads 32 hexadecimal digits; hyphens as in a UUID may stand between them.
pub fn identity(text: &str) -> Result<[u8; 16], String> {
    let digits = text.replace('-', "");
    let complain = || "use 32 hexadecimal digits, or a UUID".to_owned();
    if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(complain());
    }
    u128::from_str_radix(&digits, 16).map(u128::to_be_bytes).map_err(|_| complain())
}

fn cpu_model(text: &str) -> Result<wherry_vmm::config::CpuModel, String> {
    text.parse().map_err(|e: wherry_vmm::config::ConfigError| e.to_string())
}

/// Reads a path with options behind it.
fn disk(text: &str) -> Result<wherry_vmm::config::DiskConfig, String> {
    let mut parts = text.split(',');
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("give the path of an image")?;
    let (mut read_only, mut format) = (false, ImageFormat::Raw);
    for option in parts {
        match option {
            "ro" => read_only = true,
            "format=raw" => format = ImageFormat::Raw,
            "format=qcow2" => format = ImageFormat::Qcow2,
            other => return Err(format!("unknown option {other:?}: use ro, format=raw or format=qcow2")),
        }
    }
    Ok(wherry_vmm::config::DiskConfig { path: path.into(), read_only, format })
}

/// Reads a path of a raw image: tables of others are in memory, and a device process that is killed would lose what its guest,
/// which goes on with the next one, takes for written.
fn raw_disk(text: &str) -> Result<wherry_vmm::config::DiskConfig, String> {
    match disk(text)? {
        config if config.format == ImageFormat::Raw => Ok(config),
        _ => Err("only raw images can be served by a process that another one may have to replace".into()),
    }
}

/// Reads the name of a tap device with options behind it.
fn net(text: &str) -> Result<wherry_vmm::config::NetConfig, String> {
    let mut parts = text.split(',');
    let tap = parts.next().filter(|tap| !tap.is_empty()).ok_or("give the name of a tap device")?;
    let mut address = None;
    for option in parts {
        match option.split_once('=') {
            Some(("mac", text)) => address = Some(mac(text)?),
            _ => return Err(format!("unknown option {option:?}: use mac=MAC")),
        }
    }
    Ok(wherry_vmm::config::NetConfig { tap: tap.into(), mac: address })
}

fn mac(text: &str) -> Result<[u8; 6], String> {
    let byte = |part: &str| {
        let whole = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        whole.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    let mac = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
    match mac {
        Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Ok(mac),
        Some(_) => Err(format!("{text} is no address of one device")),
        None => Err(format!("{text:?} is no address: give six pairs of hexadecimal digits with colons between them")),
    }
}

/// A device of another process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// It serves the rings of a virtio device.
    Vhost(wherry_vmm::config::VhostSpec),
    /// It owns a PCI function, and is found at this socket.
    VfioUser(std::path::PathBuf),
}

/// Reads a device of another process.
fn device(text: &str) -> Result<DeviceSpec, String> {
    let (kind, rest) = text.split_once('=').ok_or("use KIND=SOCKET, such as vhost-user-blk=/run/disk.sock")?;
    let mut id = match kind {
        "vfio-user" if rest.is_empty() => return Err("give the socket of a device process".into()),
        "vfio-user" => return Ok(DeviceSpec::VfioUser(rest.into())),
        "vhost-user-blk" => Some(2),
        "vhost-user-net" => Some(1),
        "vhost-user" => None,
        other => {
            let kinds = "vhost-user-blk, vhost-user-net, vhost-user or vfio-user";
            return Err(format!("unknown kind of device {other:?}: use {kinds}"));
        }
    };
    let mut parts = rest.split(',');
    let socket = parts.next().filter(|path| !path.is_empty()).ok_or("give the socket of a back end")?;
    // A network device has one ring each way.
    let mut queues = if kind == "vhost-user-net" { 2 } else { 1 };
    for option in parts {
        let number = |text: &str, most: u16| match text.parse() {
            Ok(number) if (1..=most).contains(&number) => Ok(number),
            _ => Err(format!("{option}: give a number from 1 to {most}")),
        };
        match option.split_once('=') {
            Some(("id", value)) if kind == "vhost-user" => id = Some(number(value, 63)?),
            Some(("queues", value)) if kind != "vhost-user-net" => {
                queues = number(value, wherry_vmm::config::MOST_QUEUES)?
            }
            _ => {
                return Err(format!(
                    "unknown option {option:?} of {kind}: id=N belongs to vhost-user, queues=N to vhost-user and vhost-user-blk"
                ));
            }
        }
    }
    let id = id.ok_or("vhost-user=SOCKET needs the number of its virtio device type: ,id=N")?;
    Ok(DeviceSpec::Vhost(wherry_vmm::config::VhostSpec { socket: socket.into(), id, queues }))
}

fn serial(text: &str) -> Result<wherry_vmm::config::SerialTarget, String> {
    use wherry_vmm::config::SerialTarget;
    match text.split_once(':') {
        None if text == "stdio" => Ok(SerialTarget::Stdio),
        None if text == "null" => Ok(SerialTarget::Null),
        Some(("file", path)) if !path.is_empty() => Ok(SerialTarget::File(path.into())),
        Some(("socket", path)) if !path.is_empty() => Ok(SerialTarget::Socket(path.into())),
        _ => Err("use stdio, file:PATH, socket:PATH or null".into()),
    }
}

fn console(text: &str) -> Result<wherry_vmm::config::ConsoleTarget, String> {
    use wherry_vmm::config::ConsoleTarget;
    match text.split_once(':') {
        Some(("unix", path)) if !path.is_empty() => Ok(ConsoleTarget::Socket(path.into())),
        Some(("pty", path)) if !path.is_empty() => Ok(ConsoleTarget::Pty(path.into())),
        Some(("file", path)) if !path.is_empty() => Ok(ConsoleTarget::File(path.into())),
        _ => Err("use unix:PATH, pty:LINK or file:PATH".into()),
    }
}

/// Checks the form of an address; whether somebody is there is found out later.
fn address(text: &str) -> Result<String, String> {
    text.parse::<wherry_stream::Endpoint>().map_err(|e| e.to_string())?;
    Ok(text.to_owned())
}

fn mode(text: &str) -> Result<Mode, String> {
    match text {
        "precopy" => Ok(Mode::Precopy),
        "postcopy" => Ok(Mode::Postcopy),
        "hybrid" => Ok(Mode::Hybrid),
        _ => Err("use precopy, postcopy or hybrid".into()),
    }
}

fn side(text: &str) -> Result<wherry_migration::Side, String> {
    match text {
        "source" => Ok(wherry_migration::Side::Source),
        "destination" => Ok(wherry_migration::Side::Destination),
        _ => Err("use source or destination".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_suffixes_and_nonsense_is_refused() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64k"), Ok(64 << 10));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("4GiB"), Ok(4 << 30));
        assert_eq!(size("2TB"), Ok(2 << 40));
        for bad in ["", "M", "1.5G", "-1", "0", "1X", "99999999999999999999", "99999999T", "1 G"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_link_is_a_round_trip_and_a_rate() {
        assert_eq!(link("1ms,1G"), Ok(Shape::new(Duration::from_micros(500), 125_000_000)));
        assert_eq!(link("80us,8000"), Ok(Shape::new(Duration::from_micros(40), 1000)));
        for bad in
            ["", "1ms", ",1G", "1,1G", "1ms,", "1ms,G", "1ms,7", "1ms,0", "-1ms,1G", "9999999ms,1G", "1ms,\u{e9}"]
        {
            assert!(link(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_identity_is_32_digits_or_a_uuid() {
        let id = identity("00112233445566778899aabbccddeeff").unwrap();
        assert_eq!((id[0], id[15]), (0, 0xff));
        assert_eq!(identity("00112233-4455-6677-8899-aabbccddeeff"), Ok(id));
        assert!(identity("0011").is_err() && identity("g0112233445566778899aabbccddeeff").is_err());
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

    #[test]
    fn serial_targets_and_addresses_are_checked() {
        assert!(serial("stdio").is_ok() && serial("file:/x").is_ok() && serial("socket:/x").is_ok());
        assert!(serial("file:").is_err() && serial("tty").is_err());
        assert!(console("unix:/x").is_ok() && console("pty:/x").is_ok() && console("file:/x").is_ok());
        assert!(console("pty").is_err() && console("unix:").is_err() && console("/x").is_err());
        assert!(address("tcp:localhost:4000").is_ok() && address("unix:/x").is_ok());
        assert!(address("localhost:4000").is_err() && address("tcp:localhost").is_err() && address("unix:").is_err());
    }
}
