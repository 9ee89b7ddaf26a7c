//! A stock Linux kernel in Wherry: it boots, works on both CPUs, is migrated from process to process while it works,
//! and must not notice.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::checks::Checks;
use crate::kernel_log;
use crate::serial::Serial;
use crate::wherry::{self, Device, Vmm};

/// The guest is emulated in an emulated machine: seconds become tens of seconds.
const BOOT: Duration = Duration::from_secs(120);
const COMMAND: Duration = Duration::from_secs(60);
const MIGRATION: Duration = Duration::from_secs(120);

/// By how many seconds the time that passed in the guest may differ from ours after all migrations.
const CLOCK_SLACK: f64 = 3.0;

/// Counter steps (of 0.1 s) for which the guest works on between two migrations.
const WORK: u64 = 20;

/// Succeeds in the guest while workers of the load are there.
const LOADED: &str = "cat /proc/[0-9]*/comm 2>/dev/null | grep -q stress-ng-vm";

/// How much of everything.
#[derive(Debug, Clone, Copy)]
struct Size {
    memory: &'static str,
    stressors: u32,
    stress_bytes: &'static str,
    data_mib: u32,
    migrations: u32,
}

const SAMPLED: Size = Size { memory: "512M", stressors: 1, stress_bytes: "64M", data_mib: 8, migrations: 3 };
const FULL: Size = Size { memory: "1G", stressors: 2, stress_bytes: "128M", data_mib: 64, migrations: 9 };

/// Runs everything with this kernel; true if all of it held. The label goes before the names of the checks.
pub fn run(full: bool, kernel: &str, label: &str) -> bool {
    let size = if full { FULL } else { SAMPLED };
    let mut names: Vec<String> = ["boot", "smp", "load"].map(str::to_owned).to_vec();
    for round in 1..=size.migrations {
        names.extend([format!("migrate-{round}"), format!("goes-on-{round}")]);
    }
    names.extend(["load-verified", "data", "clock", "hot-plug", "kernel-log", "power-off"].map(str::to_owned));
    let mut checks = Checks::plan(label, &names);
    // Each failure has been reported by its check.
    let _ = scenario(&mut checks, size, kernel);
    !checks.failed()
}

/// The guest, wherever it is, and what is known of it.
#[derive(Debug)]
struct Guest {
    vmm: Vmm,
    serial: Serial,
    ticks: u64,
    started: Instant,
    uptime: f64,
    clocksource: String,
    /// Lines of the kernel log when the user space was up.
    boot_lines: usize,
}

fn scenario(checks: &mut Checks, size: Size, kernel: &str) -> Result<()> {
    let mut guest = checks.check("boot", || boot(size, kernel))?;
    checks.check("smp", || smp(&mut guest.serial))?;
    checks.check("load", || load(&mut guest, size))?;
    for round in 1..=size.migrations {
        guest = checks.check(&format!("migrate-{round}"), || migrate(guest, round))?;
        checks.check(&format!("goes-on-{round}"), || goes_on(&mut guest))?;
    }
    checks.check("load-verified", || load_verified(&mut guest.serial))?;
    checks.check("data", || data(&mut guest.serial))?;
    checks.check("clock", || clock(&mut guest))?;
    checks.check("hot-plug", || hot_plug(&mut guest))?;
    checks.check("kernel-log", || kernel_log::check(&mut guest.serial, guest.boot_lines, &[], COMMAND))?;
    checks.check("power-off", || power_off(guest))
}

/// A function of another process comes, is found and configured by the guest, and goes when the guest has let it go; and once more.
fn hot_plug(guest: &mut Guest) -> Result<()> {
    // Vendor and device, and the first BAR: where memory decoding would find it.
    const LOOK: &str = "for d in /sys/bus/pci/devices/*; do \
         [ \"$(cat $d/vendor):$(cat $d/device)\" = 0x1de5:0x7d3a ] && head -n1 $d/resource; done; true";
    // What its kernel says of that would come between the words of the commands.
    guest.serial.ask("dmesg -n 1", COMMAND)?;
    let device = Device::start(None, "plug", &["testdma"])?;
    device.wait(COMMAND)?;
    let (api, option) = (wherry::path(&guest.vmm.api), format!("vfio-user={}", device.socket.display()));
    for _ in 0..2 {
        wherry::run(&["device-add", "--api", api, &option], COMMAND)?;
        let start = Instant::now();
        let bar = loop {
            let seen = guest.serial.ask(LOOK, COMMAND)?;
            if !seen.trim().is_empty() {
                break seen;
            }
            ensure!(start.elapsed() < COMMAND, "waited {COMMAND:?} for the guest to find what was plugged");
        };
        ensure!(!bar.trim().starts_with("0x0000000000000000"), "its first BAR has no address: {bar}");
        println!("lab: plugged, first BAR {}", bar.trim());
        wherry::run(&["device-remove", "--api", api, "vfio-user0", "--timeout", "60"], 2 * COMMAND)?;
        let left = guest.serial.ask(LOOK, COMMAND)?;
        ensure!(left.trim().is_empty(), "the guest still has what was unplugged: {left}");
    }
    Ok(())
}

/// Starts a guest and waits for its user space.
fn boot(size: Size, kernel: &str) -> Result<Guest> {
    let vmm = Vmm::start(
        "first",
        &[
            "run",
            "--kernel",
            kernel,
            "--initrd",
            "/lab/inner.cpio",
            "--memory",
            size.memory,
            "--cpus",
            "2",
            "--cmdline",
            "console=ttyS0 panic=-1",
        ],
    )?;
    let mut serial = Serial::connect(&vmm.serial, COMMAND)?;
    let ready = serial.wait_for("INNER READY", BOOT)?;
    println!("lab: {ready}");
    let (started, uptime) = (Instant::now(), uptime(&mut serial)?);
    let clocksource = clocksource(&mut serial)?;
    println!("lab: clock source {clocksource}, {uptime} s since boot");
    let boot_lines = serial.ask("dmesg | wc -l", COMMAND)?;
    let boot_lines: usize = boot_lines.trim().parse().with_context(|| format!("a count of lines: {boot_lines:?}"))?;
    ensure!(boot_lines > 50, "the kernel log has {boot_lines} lines, too few to be one");
    Ok(Guest { vmm, serial, ticks: 0, started, uptime, clocksource, boot_lines })
}

/// Two CPUs are there and both take timer interrupts and run programs.
fn smp(serial: &mut Serial) -> Result<()> {
    let count = serial.ask("nproc", COMMAND)?;
    ensure!(count.trim() == "2", "the guest sees {} CPUs, expected 2", count.trim());
    for cpu in 0..2 {
        // Field 39 of stat is the CPU the process last ran on.
        let seen = serial.ask(&format!("taskset {} sh -c 'cut -d\" \" -f39 /proc/self/stat'", 1 << cpu), COMMAND)?;
        ensure!(seen.trim() == cpu.to_string(), "a program bound to CPU {cpu} ran on {:?}", seen.trim());
    }
    Ok(())
}

/// Starts the memory load, a data set that stays, and a counter that must go on.
fn load(guest: &mut Guest, size: Size) -> Result<()> {
    let serial = &mut guest.serial;
    serial.ask(
        &format!(
            "dd if=/dev/urandom of=/tmp/data bs=1M count={} 2>/dev/null && sha256sum /tmp/data >/tmp/data.sum",
            size.data_mib
        ),
        COMMAND,
    )?;
    serial.ask(
        "(i=0; while :; do i=$((i+1)); echo $i >/tmp/t.new; mv /tmp/t.new /tmp/ticks; usleep 100000; done) &",
        COMMAND,
    )?;
    serial.ask(
        &format!(
            "(stress-ng --vm {} --vm-bytes {} --verify --temp-path /tmp >/tmp/stress.log 2>&1 & \
             pid=$!; echo $pid >/tmp/stress.pid; wait $pid; echo $? >/tmp/stress.status) &",
            size.stressors, size.stress_bytes
        ),
        COMMAND,
    )?;
    let deadline = Instant::now() + COMMAND;
    while serial.command(&format!("{LOADED} && test -s /tmp/ticks"), COMMAND)?.status != 0 {
        if Instant::now() >= deadline {
            bail!("waited {COMMAND:?} for the load to start: {}", serial.ask("cat /tmp/stress.log", COMMAND)?);
        }
    }
    guest.ticks = ticks(&mut guest.serial)?;
    Ok(())
}

/// Moves the guest to a fresh process and returns it there.
fn migrate(guest: Guest, round: u32) -> Result<Guest> {
    let name = format!("d{round}");
    // By turns over TCP and over a UNIX socket.
    let address = if round.is_multiple_of(3) {
        format!("unix:/tmp/{name}.link")
    } else {
        format!("tcp:127.0.0.1:{}", 7000 + round)
    };
    let target = Vmm::start(&name, &["receive", "--listen", &address])?;
    let Guest { vmm: source, serial: old_serial, .. } = guest;
    let start = Instant::now();
    let how: &[&str] = match round % 3 {
        // Checked by hash as well.
        2 => &["--verify"],
        // The guest works on while its memory follows.
        0 => &["--mode", "postcopy"],
        _ => &[],
    };
    let blackout = wherry::migrate(source, &target, &address, how, MIGRATION)?;
    println!("lab: migration {round} took {:.1} s, blackout {blackout} us", start.elapsed().as_secs_f64());
    drop(old_serial);
    let serial = Serial::connect(&target.serial, COMMAND)?;
    Ok(Guest { vmm: target, serial, ..guest })
}

/// The guest answers on its serial port, its counter runs, both CPUs take interrupts, the load is still there.
fn goes_on(guest: &mut Guest) -> Result<()> {
    let answer = guest.serial.ask("echo alive", COMMAND)?;
    ensure!(answer.contains("alive"), "the shell answered {answer:?}");
    let before = timer_interrupts(&mut guest.serial)?;
    let deadline = Instant::now() + COMMAND;
    loop {
        let now = ticks(&mut guest.serial)?;
        let interrupts = timer_interrupts(&mut guest.serial)?;
        if now >= guest.ticks + WORK && interrupts.iter().zip(&before).all(|(now, before)| now > before) {
            guest.ticks = now;
            break;
        }
        if Instant::now() >= deadline {
            bail!(
                "waited {COMMAND:?} for the counter to go on from {} (it is {now}) and for timer interrupts on both CPUs ({before:?}, now {interrupts:?})",
                guest.ticks
            );
        }
    }
    smp(&mut guest.serial)?;
    let load = guest.serial.command(&format!("test ! -e /tmp/stress.status && {LOADED}"), COMMAND)?;
    ensure!(load.status == 0, "the load has ended: {}", guest.serial.ask("cat /tmp/stress.*", COMMAND)?);
    Ok(())
}

/// Ends the load and asks whether all that it wrote was read back.
fn load_verified(serial: &mut Serial) -> Result<()> {
    serial.ask("kill -INT $(cat /tmp/stress.pid)", COMMAND)?;
    let deadline = Instant::now() + COMMAND;
    while serial.command("test -s /tmp/stress.status", COMMAND)?.status != 0 {
        if Instant::now() >= deadline {
            bail!("waited {COMMAND:?} for stress-ng to end: {}", serial.ask("cat /tmp/stress.log", COMMAND)?);
        }
    }
    let log = serial.ask("cat /tmp/stress.log /tmp/stress.status", COMMAND)?;
    for line in log.lines() {
        println!("lab: {line}");
    }
    let status = log.trim().lines().last().unwrap_or_default().trim();
    ensure!(status == "0", "stress-ng ended with status {status}");
    ensure!(!log.contains("fail:") && log.contains("completed"), "stress-ng found corruption");
    Ok(())
}

/// The data set is what it was.
fn data(serial: &mut Serial) -> Result<()> {
    serial.ask("sha256sum -c /tmp/data.sum", COMMAND)?;
    Ok(())
}

/// The guest's time has passed like ours, by the same clock source.
fn clock(guest: &mut Guest) -> Result<()> {
    let ours = guest.started.elapsed().as_secs_f64();
    let theirs = uptime(&mut guest.serial)? - guest.uptime;
    println!("lab: {ours:.1} s passed here, {theirs:.1} s in the guest");
    ensure!(
        (ours - theirs).abs() <= CLOCK_SLACK,
        "{ours:.1} s passed, and {theirs:.1} s in the guest: more than {CLOCK_SLACK} s apart"
    );
    let source = clocksource(&mut guest.serial)?;
    ensure!(source == guest.clocksource, "the clock source was {}, now it is {source}", guest.clocksource);
    Ok(())
}

/// The guest powers off by ACPI, and its VMM ends.
fn power_off(mut guest: Guest) -> Result<()> {
    guest.serial.send("bye\n")?;
    guest.serial.wait_for("INNER BYE", COMMAND)?;
    guest.vmm.end(COMMAND).context("the guest has powered off")
}

fn ticks(serial: &mut Serial) -> Result<u64> {
    let text = serial.ask("cat /tmp/ticks", COMMAND)?;
    text.trim().parse().with_context(|| format!("the counter reads {text:?}"))
}

fn uptime(serial: &mut Serial) -> Result<f64> {
    let text = serial.ask("cut -d' ' -f1 /proc/uptime", COMMAND)?;
    text.trim().parse().with_context(|| format!("the uptime reads {text:?}"))
}

fn clocksource(serial: &mut Serial) -> Result<String> {
    let text = serial.ask("cat /sys/devices/system/clocksource/clocksource0/current_clocksource", COMMAND)?;
    Ok(text.trim().to_owned())
}

/// Local timer interrupts of each CPU.
fn timer_interrupts(serial: &mut Serial) -> Result<Vec<u64>> {
    let text = serial.ask("grep LOC: /proc/interrupts", COMMAND)?;
    let counts: Vec<u64> = text.split_whitespace().skip(1).map_while(|word| word.parse().ok()).collect();
    ensure!(counts.len() == 2, "local timer interrupts of two CPUs, in {text:?}");
    Ok(counts)
}
