//! A stock Linux kernel in Wherry with its root on a virtio disk and a network device: it is moved from process to process
//! while `fio` verifies what it writes, `ping` waits for answers and a TCP connection carries data. At the end nothing may
//! be missing from any of them, and the file system must be clean.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use wherry_netlab::Network;

use crate::checks::Checks;
use crate::echo::Echo;
use crate::fio;
use crate::kernel_log;
use crate::network::{self, GUEST, TAPS};
use crate::ping::Ping;
use crate::serial::Serial;
use crate::wherry::{self, Device, Vmm};

/// The guest is emulated in an emulated machine: seconds become tens of seconds.
const BOOT: Duration = Duration::from_secs(240);
const COMMAND: Duration = Duration::from_secs(240);
const MIGRATION: Duration = Duration::from_secs(300);

/// Two CPUs share one that is emulated twice, with a disk and a network at work: their kernel would take half a minute without
/// a turn for a stall. What hangs for longer is found, here and by the deadlines of the checks.
const CMDLINE: &str = "console=ttyS0 panic=-1 rcupdate.rcu_cpu_stall_timeout=180 watchdog_thresh=60";
const IMAGE: &str = "/lab/root.img";
/// The guest's address on the network where a back end has to be told it.
const MAC: &str = "52:54:00:12:34:56";
const ECHO_PORT: u16 = 5000;
/// How memory follows the guest, by turns.
const MODES: [&str; 3] = ["precopy", "hybrid", "postcopy"];
/// Moves of a run that a change is tested with, and of a full one.
const MOVES: [usize; 2] = [3, 12];

/// What must have been done after a move: requests of the disk each way, answers, bytes that came back.
const REQUESTS: u64 = fio::REQUESTS;
const ANSWERS: u64 = 10;
const BYTES: u64 = 128 << 10;

/// Runs everything; true if all of it held. With `others` the devices are served by processes of their own.
pub fn run(full: bool, others: bool) -> bool {
    let moves = MOVES[usize::from(full)];
    let mut names: Vec<String> = ["network", "boot", "root-on-disk", "load"].map(str::to_owned).to_vec();
    for round in 1..=moves {
        let mode = MODES[(round - 1) % MODES.len()];
        names.extend([format!("{mode}-{round}"), format!("goes-on-{round}")]);
        if is_updated(round, moves) {
            names.extend([format!("update-{round}"), format!("updated-{round}")]);
        }
    }
    let last = ["ping", "tcp", "fio", "fio-read-again", "kernel-log", "power-off", "file-system"];
    names.extend(last.map(str::to_owned));
    let mut checks = Checks::plan("", &names);
    // Each failure has been reported by its check.
    let _ = scenario(&mut checks, moves, others);
    !checks.failed()
}

/// Whether another process takes over after that move: once in a run that a change is tested with, and then the last move is one of a
/// guest that was updated.
fn is_updated(round: usize, moves: usize) -> bool {
    moves > MOVES[0] || round == MOVES[0] - 1
}

/// The guest, wherever it is.
#[derive(Debug)]
struct Guest {
    vmm: Vmm,
    /// Who serves its devices, if that is not the VMM.
    back_ends: Option<BackEnds>,
    serial: Serial,
    /// Lines of the kernel log when the user space was up.
    boot_lines: usize,
}

/// What runs while it moves.
#[derive(Debug)]
struct Load {
    ping: Ping,
    echo: Echo,
}

/// Processes that serve the devices of one VMM; they end with the value.
#[derive(Debug)]
struct BackEnds([Device; 2]);

impl BackEnds {
    /// Starts them, beside the taps.
    fn start(network: &Network, name: &str, tap: &str) -> Result<Self> {
        let start = |kind: &str, arguments: &[&str]| {
            Device::start(Some(network.left()), &format!("{name}.{kind}"), &[&[kind], arguments].concat())
        };
        let this = Self([start("blk", &["--image", IMAGE])?, start("net", &["--tap", tap, "--mac", MAC])?]);
        this.0.iter().try_for_each(|device| device.wait(COMMAND))?;
        Ok(this)
    }
}

/// What a VMM is told of its devices.
fn devices(back_ends: Option<&BackEnds>, tap: &str) -> Vec<String> {
    let arguments = match back_ends {
        None => [("--disk", IMAGE.to_owned()), ("--net", tap.to_owned())],
        Some(BackEnds([blk, net])) => [
            ("--device", format!("vhost-user-blk={}", blk.socket.display())),
            ("--device", format!("vhost-user-net={}", net.socket.display())),
        ],
    };
    arguments.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
}

fn scenario(checks: &mut Checks, moves: usize, others: bool) -> Result<()> {
    let network = checks.check("network", network::make)?;
    let mut guest = checks.check("boot", || boot(&network, others))?;
    checks.check("root-on-disk", || root_on_disk(&mut guest.serial))?;
    let mut load = checks.check("load", || start(&mut guest.serial, &network))?;
    for round in 1..=moves {
        let mode = MODES[(round - 1) % MODES.len()];
        guest = checks.check(&format!("{mode}-{round}"), || migrate(guest, &network, &load, round, mode))?;
        checks.check(&format!("goes-on-{round}"), || goes_on(&mut guest.serial, &mut load))?;
        gaps(&load, "after it");
        if is_updated(round, moves) {
            checks.check(&format!("update-{round}"), || update(&mut guest, &load))?;
            checks.check(&format!("updated-{round}"), || goes_on(&mut guest.serial, &mut load))?;
            gaps(&load, "after it");
        }
    }
    let Load { ping, echo } = load;
    checks.check("ping", || {
        let heard = ping.heard();
        println!("lab: ping: {} answers, {} lost, {} twice", heard.answers, heard.lost(), heard.duplicates);
        ensure!(heard.lost() < heard.answers, "more requests were lost ({heard:?}) than answered");
        Ok(())
    })?;
    checks.check("tcp", || {
        println!("lab: TCP: {} bytes went to the guest and came back", echo.finish()?);
        Ok(())
    })?;
    drop(ping);
    checks.check("fio", || fio::ends(&mut guest.serial))?;
    checks.check("fio-read-again", || fio::reads_again(&mut guest.serial))?;
    checks
        .check("kernel-log", || kernel_log::check(&mut guest.serial, guest.boot_lines, fio::KERNEL_WORDS, COMMAND))?;
    checks.check("power-off", || power_off(guest))?;
    checks.check("file-system", || fio::image_is_clean(Path::new(IMAGE)))
}

/// Starts a guest and waits for its user space.
fn boot(network: &Network, others: bool) -> Result<Guest> {
    let back_ends = others.then(|| BackEnds::start(network, "first", TAPS[0])).transpose()?;
    let devices = devices(back_ends.as_ref(), TAPS[0]);
    let mut arguments = vec![
        "run",
        "--kernel",
        "/lab/vmlinuz",
        "--initrd",
        "/lab/inner-root.cpio",
        "--memory",
        "256M",
        "--cpus",
        "2",
        "--cmdline",
        CMDLINE,
    ];
    arguments.extend(devices.iter().map(String::as_str));
    let vmm = Vmm::start_in(Some(network.left()), "first", &arguments)?;
    let mut serial = Serial::connect(&vmm.serial, COMMAND)?;
    println!("lab: {}", serial.wait_for("INNER READY", BOOT)?);
    // The kernel's own words would come between those of the commands.
    serial.ask("dmesg -n 1", COMMAND)?;
    let lines = serial.ask("dmesg | wc -l", COMMAND)?;
    let boot_lines: usize = lines.trim().parse().with_context(|| format!("a count of lines: {lines:?}"))?;
    ensure!(boot_lines > 50, "the kernel log has {boot_lines} lines, too few to be one");
    Ok(Guest { vmm, back_ends, serial, boot_lines })
}

/// The root is ext4 on the disk, and can be written.
fn root_on_disk(serial: &mut Serial) -> Result<()> {
    let mounts = serial.ask("grep ' / ' /proc/mounts; cat /sys/block/vda/serial", COMMAND)?;
    println!("lab: root: {}", mounts.trim().replace('\n', ", serial number "));
    ensure!(mounts.contains("/dev/vda / ext4 rw"), "the root is {mounts:?}, not ext4 on /dev/vda");
    Ok(())
}

/// Starts fio, which repeats its pass until it is told to end, and asks from the other machine for answers.
fn start(serial: &mut Serial, network: &Network) -> Result<Load> {
    fio::start(serial)?;
    serial.ask(&format!("ifconfig eth0 {GUEST} netmask 255.255.255.252 up"), COMMAND)?;
    serial.ask(&format!("(nc -ll -p {ECHO_PORT} -e cat) &"), COMMAND)?;
    let features = serial.ask("cat /sys/class/net/eth0/device/features", COMMAND)?;
    println!("lab: network device with features {}", features.trim());
    let ping = Ping::start(network.right(), GUEST)?;
    let address: SocketAddr = format!("{GUEST}:{ECHO_PORT}").parse()?;
    wait("the guest to listen", || Ok(serial.command("netstat -ltn | grep -q :5000", COMMAND)?.status == 0))?;
    let mut load = Load { ping, echo: Echo::start(network.right(), address)? };
    goes_on(serial, &mut load)?;
    gaps(&load, "before any move");
    Ok(load)
}

/// Says how long nothing came back since this was last said.
fn gaps(load: &Load, when: &str) {
    println!("lab: {when}: largest gap of ping {:?}, of TCP {:?}", load.ping.take_gap(), load.echo.take_gap());
}

/// Moves the guest to a fresh process on the same image and the other tap.
fn migrate(guest: Guest, network: &Network, load: &Load, round: usize, mode: &str) -> Result<Guest> {
    let name = format!("d{round}");
    let address = format!("unix:/tmp/{name}.link");
    let tap = TAPS[round % TAPS.len()];
    let next = guest.back_ends.as_ref().map(|_| BackEnds::start(network, &name, tap)).transpose()?;
    let devices = devices(next.as_ref(), tap);
    let mut arguments = vec!["receive", "--listen", &address];
    arguments.extend(devices.iter().map(String::as_str));
    let target = Vmm::start_in(Some(network.left()), &name, &arguments)?;
    // Those of the source go with it, not before.
    let Guest { vmm: source, back_ends: _before, serial: old_serial, boot_lines } = guest;
    let start = Instant::now();
    let blackout = wherry::migrate(source, &target, &address, &["--mode", mode], MIGRATION)?;
    println!("lab: move {round}, {mode}, took {:.1} s, blackout {blackout} us", start.elapsed().as_secs_f64());
    gaps(load, "during it");
    drop(old_serial);
    let serial = Serial::connect(&target.serial, COMMAND)?;
    Ok(Guest { vmm: target, back_ends: next, serial, boot_lines })
}

/// Another process takes the guest over, with its disk, its tap or their back ends, and its serial port, to which we stay connected.
fn update(guest: &mut Guest, load: &Load) -> Result<()> {
    let start = Instant::now();
    let blackout = guest.vmm.update(MIGRATION)?;
    println!("lab: update took {:.1} s, blackout {blackout} us", start.elapsed().as_secs_f64());
    gaps(load, "during it");
    Ok(())
}

/// The disk serves reads and writes, pings are answered, data comes back.
fn goes_on(serial: &mut Serial, load: &mut Load) -> Result<()> {
    let disk = fio::requests(serial)?;
    let (answers, bytes) = (load.ping.heard().answers, load.echo.returned());
    let start = Instant::now();
    loop {
        load.echo.check().context("the TCP connection")?;
        fio::still_runs(serial)?;
        let now = fio::requests(serial)?;
        let done = [now[0] - disk[0], now[1] - disk[1]];
        let (answered, returned) = (load.ping.heard().answers - answers, load.echo.returned() - bytes);
        if done.iter().all(|done| *done >= REQUESTS) && answered >= ANSWERS && returned >= BYTES {
            return Ok(());
        }
        if start.elapsed() >= COMMAND {
            bail!(
                "waited {COMMAND:?} for {REQUESTS} reads and writes of the disk (there were {done:?}), {ANSWERS} answers to \
                 ping ({answered}) and {BYTES} bytes of TCP ({returned})"
            );
        }
    }
}

/// The guest powers off by ACPI, and its VMM ends.
fn power_off(mut guest: Guest) -> Result<()> {
    guest.serial.send("bye\n")?;
    guest.serial.wait_for("INNER BYE", COMMAND)?;
    guest.vmm.end(COMMAND).context("the guest has powered off")
}

/// Asks again and again until it holds.
fn wait(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < COMMAND, "waited {COMMAND:?} for {what}");
    }
    Ok(())
}
