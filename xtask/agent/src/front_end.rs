//! The disk of `wherry device blk` under a front end that nobody here wrote: a stock Linux guest of QEMU with its root on it,
//! moved from one QEMU process to the next while fio verifies what it writes; each process has a back end of its own.
//!
//! This runs on the machine itself, not in an emulated one.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::checks::Checks;
use crate::qemu::{Moved, Parts, Qemu, Way};
use crate::serial::Serial;
use crate::{fio, kernel_log};

const BOOT: Duration = Duration::from_secs(120);
const COMMAND: Duration = Duration::from_secs(120);

/// Runs everything, with so many moves in each way; true if all of it held.
pub fn run(parts: &Parts, moves: usize) -> bool {
    let mut names: Vec<String> = ["boot", "load", "grows"].map(str::to_owned).to_vec();
    for (round, way) in rounds(moves) {
        names.extend([format!("{}-{round}", way.name()), format!("goes-on-{round}")]);
    }
    names.extend(["fio", "fio-read-again", "kernel-log", "power-off", "file-system"].map(str::to_owned));
    let mut checks = Checks::plan("", &names);
    // Each failure has been reported by its check.
    let _ = scenario(&mut checks, parts, moves);
    !checks.failed()
}

/// The moves, numbered from 1.
fn rounds(moves: usize) -> impl Iterator<Item = (usize, Way)> {
    (1..=moves * Way::ALL.len()).zip(Way::ALL.into_iter().cycle())
}

/// The guest, wherever it is.
struct Guest {
    qemu: Qemu,
    serial: Serial,
    /// Lines of the kernel log when the user space was up.
    boot_lines: usize,
}

fn scenario(checks: &mut Checks, parts: &Parts, moves: usize) -> Result<()> {
    let mut guest = checks.check("boot", || boot(parts))?;
    checks.check("load", || fio::start(&mut guest.serial))?;
    checks.check("grows", || grows(&mut guest, parts))?;
    let mut seen: BTreeMap<&str, Vec<Moved>> = BTreeMap::new();
    for (round, way) in rounds(moves) {
        let (next, moved) = checks.check(&format!("{}-{round}", way.name()), || migrate(guest, parts, round, way))?;
        guest = next;
        seen.entry(way.name()).or_default().push(moved);
        checks.check(&format!("goes-on-{round}"), || {
            guest.qemu.back_end_lives()?;
            fio::goes_on(&mut guest.serial)
        })?;
    }
    for (way, seen) in &seen {
        println!("lab: {} moves by {way}: {}", seen.len(), summary(seen));
    }
    checks.check("fio", || fio::ends(&mut guest.serial))?;
    checks.check("fio-read-again", || fio::reads_again(&mut guest.serial))?;
    checks
        .check("kernel-log", || kernel_log::check(&mut guest.serial, guest.boot_lines, fio::KERNEL_WORDS, COMMAND))?;
    checks.check("power-off", || power_off(guest))?;
    checks.check("file-system", || fio::image_is_clean(&parts.image))
}

/// Starts a guest and waits for its user space, which is on the disk.
fn boot(parts: &Parts) -> Result<Guest> {
    let qemu = Qemu::start(parts, "first", false)?;
    let mut serial = Serial::connect(&qemu.serial, COMMAND)?;
    println!("lab: {}", serial.wait_for("INNER READY", BOOT)?);
    // The kernel's own words would come between those of the commands.
    serial.ask("dmesg -n 1", COMMAND)?;
    let mounts = serial.ask("grep ' / ' /proc/mounts", COMMAND)?;
    ensure!(mounts.contains("/dev/vda / ext4 rw"), "the root is {mounts:?}, not ext4 on /dev/vda");
    let lines = serial.ask("dmesg | wc -l", COMMAND)?;
    let boot_lines: usize = lines.trim().parse().with_context(|| format!("a count of lines: {lines:?}"))?;
    ensure!(boot_lines > 50, "the kernel log has {boot_lines} lines, too few to be one");
    Ok(Guest { qemu, serial, boot_lines })
}

/// The image grows, and the guest hears of it.
fn grows(guest: &mut Guest, parts: &Parts) -> Result<()> {
    let image = File::options().write(true).open(&parts.image).context("opening the image")?;
    let bytes = image.metadata().context("looking at the image")?.len() + (1 << 20);
    image.set_len(bytes).context("making the image larger")?;
    guest.qemu.look_again()?;
    let start = Instant::now();
    loop {
        let size = guest.serial.ask("cat /sys/block/vda/size", COMMAND)?;
        if size.trim() == (bytes / 512).to_string() {
            return Ok(());
        }
        ensure!(start.elapsed() < COMMAND, "waited {COMMAND:?} for a disk of {bytes} bytes; it has {size} sectors");
    }
}

/// Moves the guest to a fresh QEMU, whose disk a fresh back end serves from the same image.
fn migrate(guest: Guest, parts: &Parts, round: usize, way: Way) -> Result<(Guest, Moved)> {
    let mut target = Qemu::start(parts, &format!("m{round}"), true)?;
    let Guest { qemu: mut source, serial: old_serial, boot_lines } = guest;
    let moved = source.migrate(&mut target, way)?;
    println!("lab: move {round}, {}: {}", way.name(), summary(&[moved]));
    // What would be missing if it had not been by postcopy at all.
    ensure!((way == Way::Precopy) == (moved.requests == 0), "the destination asked for {} pages", moved.requests);
    source.back_end_lives()?;
    drop((old_serial, source));
    let serial = Serial::connect(&target.serial, COMMAND)?;
    Ok((Guest { qemu: target, serial, boot_lines }, moved))
}

/// What QEMU said of moves: medians and the most.
fn summary(seen: &[Moved]) -> String {
    let figure = |of: fn(&Moved) -> u64| {
        let mut values: Vec<u64> = seen.iter().map(of).collect();
        values.sort_unstable();
        let (median, most) = (values.get(values.len() / 2), values.last());
        let (median, most) = (median.copied().unwrap_or_default(), most.copied().unwrap_or_default());
        if values.len() > 1 { format!("{median} (most {most})") } else { median.to_string() }
    };
    format!(
        "{} ms in all, down for {} ms, {} pages asked for",
        figure(|moved| moved.total_ms),
        figure(|moved| moved.downtime_ms),
        figure(|moved| moved.requests)
    )
}

/// The guest powers off by ACPI, and QEMU ends.
fn power_off(mut guest: Guest) -> Result<()> {
    guest.serial.send("bye\n")?;
    guest.serial.wait_for("INNER BYE", COMMAND)?;
    let status = guest.qemu.ends()?;
    ensure!(status.success(), "QEMU ended with {status} after the guest had powered off");
    guest.qemu.back_end_lives()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_take_turns_and_each_way_has_as_many() {
        let names: Vec<String> = rounds(2).map(|(round, way)| format!("{}-{round}", way.name())).collect();
        let all = ["precopy-1", "postcopy-2", "postcopy-preempt-3", "precopy-4", "postcopy-5", "postcopy-preempt-6"];
        assert_eq!(names, all);
    }

    #[test]
    fn the_figures_of_one_move_are_its_own_and_those_of_many_their_median_and_most() {
        let moved = |of: u64| Moved { total_ms: of, downtime_ms: 10 * of, requests: 100 * of };
        assert_eq!(summary(&[moved(1)]), "1 ms in all, down for 10 ms, 100 pages asked for");
        let seen = [moved(1), moved(9), moved(2)];
        assert_eq!(summary(&seen), "2 (most 9) ms in all, down for 20 (most 90) ms, 200 (most 900) pages asked for");
    }
}
