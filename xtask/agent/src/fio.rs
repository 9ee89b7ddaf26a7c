//! The load of a guest whose root is on a disk: fio writes, reads back and compares, pass after pass, until it is told to end.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::serial::Serial;

const COMMAND: Duration = Duration::from_secs(240);
/// For a pass, from its start to what it verifies last.
const PASS: Duration = Duration::from_secs(400);

/// Requests each way by which a disk is seen to work.
pub const REQUESTS: u64 = 20;

/// What fio does in one pass: it writes all of its files and reads all of it back, some of it while it writes. Its jobs
/// run side by side: many small requests, few large ones, and a page cache that is often told to write back.
const JOBS: &str = "[global]\\ndirectory=/var/fio\\nrw=randwrite\\nbs=4k\\nverify=crc32c\\nverify_fatal=1\\nverify_backlog=64\\n\
[deep]\\nioengine=io_uring\\ndirect=1\\niodepth=32\\nsize=2M\\nnumjobs=2\\n\
[large]\\nioengine=io_uring\\ndirect=1\\niodepth=4\\nbs=256k\\nsize=8M\\n\
[buffered]\\nioengine=psync\\nsize=2M\\nfsync=16\\n";

/// Words of a kernel log that mean trouble with the disk.
pub const KERNEL_WORDS: &[&str] = &["I/O error", "EXT4-fs error"];

/// Starts it, and waits until it writes.
pub fn start(serial: &mut Serial) -> Result<()> {
    serial.ask(&format!("printf '{JOBS}' >/var/fio/jobs"), COMMAND)?;
    // Each pass with data of its own, or what an earlier one wrote would hide what a later one lost.
    serial.ask(
        "(n=0; while [ ! -e /tmp/fio.stop ]; do n=$((n+1)); \
         fio --eta=never --randseed=$n --output=/tmp/fio.log /var/fio/jobs || { echo $? >/tmp/fio.failed; break; }; \
         echo $n >/tmp/fio.passes; done; echo ended >/tmp/fio.ended) &",
        COMMAND,
    )?;
    let before = requests(serial)?;
    let start = Instant::now();
    while requests(serial)?[1] < before[1] + REQUESTS {
        ensure!(start.elapsed() < COMMAND, "waited {COMMAND:?} for fio to write");
    }
    Ok(())
}

/// It has not ended, as it does when something is wrong.
pub fn still_runs(serial: &mut Serial) -> Result<()> {
    let ended = serial.command("test ! -e /tmp/fio.ended", COMMAND)?.status != 0;
    ensure!(!ended, "fio has ended: {}", serial.ask("cat /tmp/fio.*", COMMAND)?);
    Ok(())
}

/// The disk serves it both ways.
pub fn goes_on(serial: &mut Serial) -> Result<()> {
    let before = requests(serial)?;
    let start = Instant::now();
    loop {
        still_runs(serial)?;
        let now = requests(serial)?;
        let done = [now[0] - before[0], now[1] - before[1]];
        if done.iter().all(|done| *done >= REQUESTS) {
            return Ok(());
        }
        ensure!(
            start.elapsed() < COMMAND,
            "waited {COMMAND:?} for {REQUESTS} reads and writes of the disk (there were {done:?})"
        );
    }
}

/// Reads and writes that the disk has completed.
pub fn requests(serial: &mut Serial) -> Result<[u64; 2]> {
    let text = serial.ask("cat /sys/block/vda/stat", COMMAND)?;
    let fields: Vec<u64> = text.split_whitespace().map_while(|word| word.parse().ok()).collect();
    ensure!(fields.len() > 4, "the statistics of the disk read {text:?}");
    Ok([fields[0], fields[4]])
}

/// Lets it finish its pass.
pub fn ends(serial: &mut Serial) -> Result<()> {
    serial.ask("touch /tmp/fio.stop", COMMAND)?;
    let start = Instant::now();
    while serial.command("test -e /tmp/fio.ended", COMMAND)?.status != 0 {
        ensure!(start.elapsed() < PASS, "waited {PASS:?} for fio to end: {}", serial.ask("cat /tmp/fio.log", COMMAND)?);
    }
    let log = serial.ask("cat /tmp/fio.log", COMMAND)?;
    let failed = serial.command("test ! -e /tmp/fio.failed", COMMAND)?.status != 0;
    ensure!(!failed && !log.contains("verify:"), "fio found something wrong: {log}");
    println!("lab: fio: {} passes, all verified", serial.ask("cat /tmp/fio.passes", COMMAND)?.trim());
    Ok(())
}

/// What the last pass wrote is on the disk, and not only in the guest's cache.
pub fn reads_again(serial: &mut Serial) -> Result<()> {
    serial.ask("sync; echo 3 >/proc/sys/vm/drop_caches", COMMAND)?;
    let log = serial.ask("fio --eta=never --verify_only --randseed=$(cat /tmp/fio.passes) /var/fio/jobs", PASS)?;
    ensure!(log.contains("READ:") && !log.contains("verify:"), "fio found something wrong: {log}");
    Ok(())
}

/// The file system that the guest left on the disk needs no repair.
pub fn image_is_clean(image: &Path) -> Result<()> {
    let output = Command::new("e2fsck").args(["-f", "-n"]).arg(image).output().context("cannot run e2fsck")?;
    let said = String::from_utf8_lossy(&output.stdout);
    println!("lab: {}", said.lines().last().unwrap_or_default());
    ensure!(output.status.success(), "e2fsck -fn: {}: {said}", output.status);
    Ok(())
}
