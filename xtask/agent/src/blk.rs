//! The disk of a guest of Wherry and that of one of QEMU, side by side: the same kernel, the same root, the same file as the
//! disk that is measured, the same fio in the guest, both VMMs on KVM in the same machine, in turn.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::checks::Checks;
use crate::serial::Serial;
use crate::wherry::Vmm;

const BOOT: Duration = Duration::from_secs(240);
const COMMAND: Duration = Duration::from_secs(180);

/// The root of each guest, and what is measured: in the machine's memory, so that no medium is in the way.
const ROOT: &str = "/lab/root.img";
const ROOT_OF_QEMU: &str = "/tmp/root-of-qemu.img";
const FILE: &str = "/tmp/measured.img";
const FILE_MIB: u64 = 64;
/// How often each job runs under each VMM, and for how many seconds.
const ROUNDS: usize = 3;
const SECONDS: u32 = 5;

/// A job: its name, what fio is told, and whether it writes.
struct Job {
    name: &'static str,
    fio: &'static str,
    writes: bool,
}

const JOBS: [Job; 5] = [
    Job { name: "read-4k-one", fio: "--rw=randread --bs=4k --iodepth=1", writes: false },
    Job { name: "write-4k-one", fio: "--rw=randwrite --bs=4k --iodepth=1", writes: true },
    Job { name: "read-4k-many", fio: "--rw=randread --bs=4k --iodepth=32", writes: false },
    Job { name: "write-4k-many", fio: "--rw=randwrite --bs=4k --iodepth=32", writes: true },
    Job { name: "read-256k", fio: "--rw=read --bs=256k --iodepth=4", writes: false },
];

/// What fio says of one run.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Figures {
    /// Requests a second.
    iops: f64,
    /// From submission to completion, in microseconds.
    mean_us: f64,
    p99_us: f64,
}

/// Runs everything; true if all of it could be measured.
pub fn run() -> bool {
    let names = ["boot-wherry", "boot-qemu"].into_iter().chain(JOBS.iter().map(|job| job.name));
    let mut checks = Checks::plan("", &names.map(str::to_owned).collect::<Vec<_>>());
    // Each failure has been reported by its check.
    let _ = scenario(&mut checks);
    !checks.failed()
}

fn scenario(checks: &mut Checks) -> Result<()> {
    std::fs::copy(ROOT, ROOT_OF_QEMU).context("copying the root")?;
    std::fs::write(FILE, vec![0x5a; (FILE_MIB << 20) as usize]).context("making the file that is measured")?;
    let (_wherry, mut of_wherry) = checks.check("boot-wherry", boot_wherry)?;
    let (_qemu, mut of_qemu) = checks.check("boot-qemu", boot_qemu)?;
    println!("lab: {:14} {:>32} {:>32}   Wherry, of QEMU", "", "Wherry: 1/s, mean, p99", "QEMU: 1/s, mean, p99");
    for job in &JOBS {
        checks.check(job.name, || {
            let mut seen = [Vec::new(), Vec::new()];
            for _ in 0..ROUNDS {
                for (serial, seen) in [&mut of_wherry, &mut of_qemu].into_iter().zip(&mut seen) {
                    seen.push(measure(serial, job)?);
                }
            }
            let [wherry, qemu] = seen.map(|seen| medians(&seen));
            let show = |f: Figures| format!("{:.0}, {:.0} us, {:.0} us", f.iops, f.mean_us, f.p99_us);
            println!(
                "lab: {:14} {:>32} {:>32}   requests {:.2}, mean latency {:.2}, p99 {:.2}",
                job.name,
                show(wherry),
                show(qemu),
                wherry.iops / qemu.iops,
                wherry.mean_us / qemu.mean_us,
                wherry.p99_us / qemu.p99_us
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// A Wherry whose guest has both disks.
fn boot_wherry() -> Result<(Vmm, Serial)> {
    let arguments = [
        "run",
        "--kernel",
        "/lab/vmlinuz",
        "--initrd",
        "/lab/inner-root.cpio",
        "--memory",
        "256M",
        "--cpus",
        "1",
        "--disk",
        ROOT,
        "--disk",
        FILE,
        "--cmdline",
        "console=ttyS0 panic=-1",
    ];
    let vmm = Vmm::start("wherry", &arguments)?;
    let serial = ready(&vmm.serial)?;
    Ok((vmm, serial))
}

/// A QEMU that runs; it ends with the value.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU whose guest has the same. Its disk is served as it is at its best: by a thread of its own, with io_uring.
fn boot_qemu() -> Result<(Qemu, Serial)> {
    let serial = PathBuf::from("/tmp/qemu.serial");
    let drive = |id: &str, file: &str| {
        format!("file={file},id={id},if=none,format=raw,cache=writeback,aio=io_uring,file.locking=off")
    };
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-L", "/lab/qemu", "-accel", "kvm", "-cpu", "host", "-machine", "q35", "-m", "256", "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-kernel", "/lab/vmlinuz", "-initrd", "/lab/inner-root.cpio"])
        .args(["-append", "console=ttyS0 panic=-1", "-object", "iothread,id=io"])
        .args(["-drive", &drive("root", ROOT_OF_QEMU), "-device", "virtio-blk-pci,drive=root,iothread=io"])
        .args(["-drive", &drive("measured", FILE)])
        .args(["-device", "virtio-blk-pci,drive=measured,iothread=io,num-queues=1"])
        .args(["-chardev", &format!("socket,id=serial,path={},server=on,wait=off", serial.display())])
        .args(["-serial", "chardev:serial"]);
    let qemu = Qemu(command.stdin(Stdio::null()).spawn().context("cannot start QEMU")?);
    let serial = ready(&serial)?;
    Ok((qemu, serial))
}

/// The shell of a guest that has booted from its disk.
fn ready(serial: &Path) -> Result<Serial> {
    let mut serial = Serial::connect(serial, COMMAND)?;
    println!("lab: {}", serial.wait_for("INNER READY", BOOT)?);
    // The kernel's own words would come between those of fio.
    serial.ask("dmesg -n 1", COMMAND)?;
    let size = serial.ask("cat /sys/block/vdb/size", COMMAND)?;
    ensure!(size.trim() == (FILE_MIB << 11).to_string(), "the second disk has {} sectors", size.trim());
    Ok(serial)
}

fn measure(serial: &mut Serial, job: &Job) -> Result<Figures> {
    let command = format!(
        "fio --name={} --filename=/dev/vdb --direct=1 --ioengine=io_uring --time_based --runtime={SECONDS} \
         --ramp_time=1 --eta=never --minimal {}",
        job.name, job.fio
    );
    let said = serial.ask(&command, COMMAND)?;
    figures(&said, job.writes).with_context(|| format!("fio said {said:?}"))
}

/// The figures in a line of fio's terse output, version 3: the fields of reads begin at 5, those of writes at 46.
fn figures(terse: &str, writes: bool) -> Result<Figures> {
    let line = terse.lines().find(|line| line.starts_with("3;")).context("no line of terse output")?;
    let fields: Vec<&str> = line.trim().split(';').collect();
    let start = if writes { 46 } else { 5 };
    let number = |at: usize| -> Result<f64> {
        let field = fields.get(start + at).with_context(|| format!("there is no field {}", start + at))?;
        field.parse().with_context(|| format!("field {} is {field:?}", start + at))
    };
    ensure!(fields.get(4) == Some(&"0"), "it failed");
    let percentile = fields.iter().skip(start + 12).take(20).find_map(|field| field.strip_prefix("99.000000%="));
    let p99_us = percentile.context("no 99th percentile")?.parse().context("the 99th percentile")?;
    let figures = Figures { iops: number(2)?, mean_us: number(10)?, p99_us };
    ensure!(figures.iops > 0.0 && figures.mean_us > 0.0, "nothing was measured: {figures:?}");
    Ok(figures)
}

fn medians(seen: &[Figures]) -> Figures {
    let median = |of: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = seen.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Figures { iops: median(|f| f.iops), mean_us: median(|f| f.mean_us), p99_us: median(|f| f.p99_us) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fio 3.33 said of a job that wrote.
    const WROTE: &str = "3;fio-3.33;x;0;0;0;0;0;0;0;0;0.000000;0.000000;0;0;0.000000;0.000000;1.000000%=0;5.000000%=0;\
        10.000000%=0;20.000000%=0;30.000000%=0;40.000000%=0;50.000000%=0;60.000000%=0;70.000000%=0;80.000000%=0;\
        90.000000%=0;95.000000%=0;99.000000%=0;99.500000%=0;99.900000%=0;99.950000%=0;99.990000%=0;0%=0;0%=0;0%=0;0;0;\
        0.000000;0.000000;0;0;0.000000%;0.000000;0.000000;1023528;1022505;255626;1001;0;0;0.000000;0.000000;0;32439;\
        2.742089;137.451172;1.000000%=1;5.000000%=1;10.000000%=1;20.000000%=1;30.000000%=1;40.000000%=1;50.000000%=1;\
        60.000000%=1;70.000000%=1;80.000000%=1;90.000000%=2;95.000000%=2;99.000000%=3;99.500000%=3;99.900000%=33;\
        99.950000%=88;99.990000%=358;0%=0;0%=0;0%=0;0;32439;2.827167;137.452740;992636;992636;97.078841%;992636.000000";

    #[test]
    fn the_figures_are_found_in_what_fio_says() {
        let said = format!("fio: looks around\n{WROTE}\n");
        let wrote = figures(&said, true).unwrap();
        assert_eq!(wrote, Figures { iops: 255_626.0, mean_us: 2.742_089, p99_us: 3.0 });
        assert!(figures(&said, false).is_err(), "it has not read");
        assert!(figures("fio: cannot open /dev/vdb\n", true).is_err());
        assert!(figures(&WROTE.replacen("x;0;0", "x;0;5", 1), true).is_err(), "it failed");
    }

    #[test]
    fn the_median_is_taken_of_each_figure_alone() {
        let seen = [(1.0, 9.0), (3.0, 2.0), (2.0, 5.0)].map(|(iops, us)| Figures { iops, mean_us: us, p99_us: us });
        assert_eq!(medians(&seen), Figures { iops: 2.0, mean_us: 5.0, p99_us: 5.0 });
    }
}
