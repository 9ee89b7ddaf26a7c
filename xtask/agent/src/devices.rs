//! A stock Linux kernel in Wherry with its root on a virtio disk and a network device: it is moved from process to process
//! while a shell writes files and reads them back, `ping` waits for answers and a TCP connection carries data. At the end nothing may
//! be missing from any of them, and the file system must be clean.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use wherry_netlab::Network;

use crate::checks::Checks;
use crate::echo::Echo;
use crate::kernel_log;
use crate::network::{self, GUEST, TAPS};
use crate::ping::Ping;
use crate::serial::Serial;
use crate::wherry::{self, Vmm};

/// The guest is emulated in an emulated machine: seconds become tens of seconds.
const BOOT: Duration = Duration::from_secs(240);
const COMMAND: Duration = Duration::from_secs(120);
const MIGRATION: Duration = Duration::from_secs(240);

const IMAGE: &str = "/lab/root.img";
const ECHO_PORT: u16 = 5000;
/// How memory follows the guest, by turns.
const MODES: [&str; 3] = ["precopy", "hybrid", "postcopy"];
/// Moves of a run that a change is tested with, and of a full one.
const MOVES: [usize; 2] = [3, 12];

/// What must have been done after a move: requests of the disk each way, answers, bytes that came back.
const REQUESTS: u64 = 20;
const ANSWERS: u64 = 10;
const BYTES: u64 = 128 << 10;

/// Writes one file after another, and reads four of them back from the disk each time: dropping the cache has the programs
/// themselves read again, too. Each file has data of its own, or what an older one had would hide what a newer one lost.
const DISK_LOAD: &str = "(n=0; while [ ! -e /tmp/disk.stop ]; do n=$((n+1)); f=/var/data/$((n%4)); \
    dd if=/dev/urandom of=$f bs=64k count=8 conv=fsync 2>/dev/null && sha256sum $f >/tmp/sum.$((n%4)) && \
    echo 3 >/proc/sys/vm/drop_caches && cat /tmp/sum.* | sha256sum -c >/tmp/disk.log 2>&1 || \
    { echo pass $n >/tmp/disk.failed; break; }; \
    echo $n >/tmp/disk.passes; done; echo ended >/tmp/disk.ended) &";

/// Runs everything; true if all of it held.
pub fn run(full: bool) -> bool {
    let moves = MOVES[usize::from(full)];
    let mut names: Vec<String> = ["network", "boot", "root-on-disk", "load"].map(str::to_owned).to_vec();
    for round in 1..=moves {
        let mode = MODES[(round - 1) % MODES.len()];
        names.extend([format!("{mode}-{round}"), format!("goes-on-{round}")]);
    }
    let last = ["ping", "tcp", "disk", "kernel-log", "power-off", "file-system"];
    names.extend(last.map(str::to_owned));
    let mut checks = Checks::plan("", &names);
    // Each failure has been reported by its check.
    let _ = scenario(&mut checks, moves);
    !checks.failed()
}

/// The guest, wherever it is.
#[derive(Debug)]
struct Guest {
    vmm: Vmm,
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

fn scenario(checks: &mut Checks, moves: usize) -> Result<()> {
    let network = checks.check("network", network::make)?;
    let mut guest = checks.check("boot", || boot(&network))?;
    checks.check("root-on-disk", || root_on_disk(&mut guest.serial))?;
    let mut load = checks.check("load", || start(&mut guest.serial, &network))?;
    for round in 1..=moves {
        let mode = MODES[(round - 1) % MODES.len()];
        guest = checks.check(&format!("{mode}-{round}"), || migrate(guest, &network, &load, round, mode))?;
        checks.check(&format!("goes-on-{round}"), || goes_on(&mut guest.serial, &mut load))?;
        gaps(&load, "after it");
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
    checks.check("disk", || disk_verified(&mut guest.serial))?;
    checks.check("kernel-log", || kernel_log(&mut guest))?;
    checks.check("power-off", || power_off(guest))?;
    checks.check("file-system", file_system)
}

/// Starts a guest and waits for its user space.
fn boot(network: &Network) -> Result<Guest> {
    let arguments = [
        "run",
        "--kernel",
        "/lab/vmlinuz",
        "--initrd",
        "/lab/inner-root.cpio",
        "--memory",
        "256M",
        "--cpus",
        "2",
        "--disk",
        IMAGE,
        "--net",
        TAPS[0],
        "--cmdline",
        "console=ttyS0 panic=-1",
    ];
    let vmm = Vmm::start_in(Some(network.left()), "first", &arguments)?;
    let mut serial = Serial::connect(&vmm.serial, COMMAND)?;
    println!("lab: {}", serial.wait_for("INNER READY", BOOT)?);
    // The kernel's own words would come between those of the commands.
    serial.ask("dmesg -n 1", COMMAND)?;
    let lines = serial.ask("dmesg | wc -l", COMMAND)?;
    let boot_lines: usize = lines.trim().parse().with_context(|| format!("a count of lines: {lines:?}"))?;
    ensure!(boot_lines > 50, "the kernel log has {boot_lines} lines, too few to be one");
    Ok(Guest { vmm, serial, boot_lines })
}

/// The root is ext4 on the disk, and can be written.
fn root_on_disk(serial: &mut Serial) -> Result<()> {
    let mounts = serial.ask("grep ' / ' /proc/mounts; cat /sys/block/vda/serial", COMMAND)?;
    println!("lab: root: {}", mounts.trim().replace('\n', ", serial number "));
    ensure!(mounts.contains("/dev/vda / ext4 rw"), "the root is {mounts:?}, not ext4 on /dev/vda");
    Ok(())
}

/// Starts to write and read on the disk, and asks from the other machine for answers.
fn start(serial: &mut Serial, network: &Network) -> Result<Load> {
    serial.ask(DISK_LOAD, COMMAND)?;
    let before = requests(serial)?;
    wait("the disk to be written", || Ok(requests(serial)?[1] >= before[1] + REQUESTS))?;
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
    let arguments = ["receive", "--listen", &address, "--disk", IMAGE, "--net", TAPS[round % TAPS.len()]];
    let target = Vmm::start_in(Some(network.left()), &name, &arguments)?;
    let Guest { vmm: source, serial: old_serial, boot_lines } = guest;
    let start = Instant::now();
    let blackout = wherry::migrate(source, &target, &address, &["--mode", mode], MIGRATION)?;
    println!("lab: move {round}, {mode}, took {:.1} s, blackout {blackout} us", start.elapsed().as_secs_f64());
    gaps(load, "during it");
    drop(old_serial);
    let serial = Serial::connect(&target.serial, COMMAND)?;
    Ok(Guest { vmm: target, serial, boot_lines })
}

/// The disk serves reads and writes, pings are answered, data comes back.
fn goes_on(serial: &mut Serial, load: &mut Load) -> Result<()> {
    let disk = requests(serial)?;
    let (answers, bytes) = (load.ping.heard().answers, load.echo.returned());
    let start = Instant::now();
    loop {
        load.echo.check().context("the TCP connection")?;
        let failed = serial.command("test ! -e /tmp/disk.ended", COMMAND)?.status != 0;
        ensure!(!failed, "the load of the disk has ended: {}", serial.ask("cat /tmp/disk.*", COMMAND)?);
        let now = requests(serial)?;
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

/// Reads and writes that the disk has completed.
fn requests(serial: &mut Serial) -> Result<[u64; 2]> {
    let text = serial.ask("cat /sys/block/vda/stat", COMMAND)?;
    let fields: Vec<u64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
    ensure!(fields.len() > 4, "the statistics of the disk read {text:?}");
    Ok([fields[0], fields[4]])
}

/// All that was written on the disk was read back from it.
fn disk_verified(serial: &mut Serial) -> Result<()> {
    serial.ask("touch /tmp/disk.stop", COMMAND)?;
    wait("the load of the disk to end", || Ok(serial.command("test -e /tmp/disk.ended", COMMAND)?.status == 0))?;
    let failed = serial.command("test ! -e /tmp/disk.failed", COMMAND)?.status != 0;
    ensure!(!failed, "what was written was not read back: {}", serial.ask("cat /tmp/disk.*", COMMAND)?);
    println!("lab: disk: {} files written and read back", serial.ask("cat /tmp/disk.passes", COMMAND)?.trim());
    Ok(())
}

/// The kernel has not complained.
fn kernel_log(guest: &mut Guest) -> Result<()> {
    let log = guest.serial.ask("dmesg", COMMAND)?;
    let mut found = kernel_log::trouble(&log, guest.boot_lines);
    found.extend(log.lines().filter(|line| line.contains("I/O error") || line.contains("EXT4-fs error")));
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

/// The guest powers off by ACPI, and its VMM ends.
fn power_off(mut guest: Guest) -> Result<()> {
    guest.serial.send("bye\n")?;
    guest.serial.wait_for("INNER BYE", COMMAND)?;
    let status = guest.vmm.wait(COMMAND)?;
    ensure!(status.success(), "wherry ended with {status} after the guest had powered off");
    Ok(())
}

/// The file system that the guest left needs no repair.
fn file_system() -> Result<()> {
    let output = Command::new("e2fsck").args(["-f", "-n", IMAGE]).output().context("cannot run e2fsck")?;
    let said = String::from_utf8_lossy(&output.stdout);
    println!("lab: {}", said.lines().last().unwrap_or_default());
    ensure!(output.status.success(), "e2fsck -fn: {}: {said}", output.status);
    Ok(())
}

/// Asks again and again until it holds.
fn wait(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < COMMAND, "waited {COMMAND:?} for {what}");
    }
    Ok(())
}
