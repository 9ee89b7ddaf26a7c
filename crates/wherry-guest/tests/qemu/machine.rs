//! A QEMU process that runs the probe, and its RAM.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use wherry_guest::PROBE_ELF;
use wherry_guest::report::{REPORT_GPA, REPORT_SIZE};
use wherry_guest::snapshot::Snapshot;

/// Longest wait for anything: an emulated guest on a busy machine is slow.
const DEADLINE: Duration = Duration::from_secs(120);

/// Among the arguments of a machine: without KVM, even where it is there.
pub const EMULATED: &str = "emulated";

/// A running machine; ended with its files when dropped.
pub struct Machine {
    qemu: Child,
    files: tempfile::TempDir,
    ram: File,
    /// RAM below 4 GiB, in bytes; the rest of the memfd is from 4 GiB on.
    low: u64,
}

impl Machine {
    /// Starts the probe with this command line in a machine that has `low_mib` of its RAM below 4 GiB, the rest above.
    /// `None` without QEMU.
    pub fn start_split(cpus: u32, memory_mib: u32, low_mib: u32, line: &str) -> Option<Self> {
        Self::start_with(cpus, memory_mib, low_mib, line, &[])
    }

    /// The same, with more arguments.
    pub fn start_with(cpus: u32, memory_mib: u32, low_mib: u32, line: &str, more: &[&str]) -> Option<Self> {
        let files = tempfile::tempdir().unwrap();
        let kernel = files.path().join("probe.elf");
        std::fs::write(&kernel, PROBE_ELF).unwrap();
        let kvm = !more.contains(&EMULATED) && File::options().read(true).write(true).open("/dev/kvm").is_ok();
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", if kvm { "kvm" } else { "tcg" }])
            .args(["-machine", &format!("q35,memory-backend=ram,max-ram-below-4g={low_mib}M")])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-object", &format!("memory-backend-memfd,id=ram,size={memory_mib}M,share=on")])
            .args(["-m", &format!("{memory_mib}M"), "-smp", &cpus.to_string()])
            .arg("-kernel")
            .arg(kernel)
            .args(["-append", line])
            .args(["-serial", &format!("file:{}", files.path().join("serial").display())])
            .args(more.iter().filter(|word| **word != EMULATED))
            .args(["-qmp", &format!("unix:{},server=on,wait=off", files.path().join("monitor").display())])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut qemu = match qemu {
            Ok(qemu) => qemu,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => panic!("cannot start qemu-system-x86_64: {error}"),
        };
        let started = Instant::now();
        let ram = loop {
            if let Some(ram) = find_ram(&qemu) {
                break ram;
            }
            if started.elapsed() > DEADLINE || qemu.try_wait().unwrap().is_some() {
                let _ = qemu.kill();
                let _ = qemu.wait();
                panic!("QEMU has no RAM memfd");
            }
            pause();
        };
        Some(Self { qemu, files, ram, low: u64::from(low_mib) << 20 })
    }

    /// Reads guest RAM.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) {
        self.ram.read_exact_at(bytes, self.offset(gpa)).unwrap();
    }

    /// Writes guest RAM.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.ram.write_all_at(bytes, self.offset(gpa)).unwrap();
    }

    /// Where in the memfd a guest physical address is.
    fn offset(&self, gpa: u64) -> u64 {
        const HIGH: u64 = 4 << 30;
        if gpa < HIGH { gpa } else { gpa - HIGH + self.low }
    }

    /// A 64-bit word of guest RAM.
    pub fn word(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// The report pages, once the probe runs.
    pub fn snapshot(&self) -> Option<Snapshot> {
        let mut bytes = vec![0; REPORT_SIZE as usize];
        self.read(REPORT_GPA, &mut bytes);
        Snapshot::decode(&bytes).ok()
    }

    /// Everything the guest printed.
    pub fn serial(&self) -> String {
        std::fs::read_to_string(self.files.path().join("serial")).unwrap_or_default()
    }

    /// Writes a dword of the configuration space of a device of bus 0, behind the guest's back.
    pub fn write_config(&self, device: u32, offset: u32, value: u32) {
        let mut monitor = UnixStream::connect(self.files.path().join("monitor")).unwrap();
        monitor.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut answers = BufReader::new(monitor.try_clone().unwrap()).lines();
        let mut ask = |command: &str| {
            monitor.write_all(format!("{command}\n").as_bytes()).unwrap();
            let answer = answers.by_ref().map(|line| line.expect("waited in vain for QEMU's monitor"));
            // Events and its greeting come in between.
            let answer = answer.into_iter().find(|line| line.contains("\"return\"") || line.contains("\"error\""));
            let answer = answer.expect("QEMU's monitor was closed");
            assert!(answer.contains("{\"return\""), "{command}: {answer}");
        };
        ask(r#"{"execute": "qmp_capabilities"}"#);
        let address = 1 << 31 | device << 11 | offset;
        for (port, value) in [(0xcf8, address), (0xcfc, value)] {
            ask(&format!(
                r#"{{"execute": "human-monitor-command", "arguments": {{"command-line": "o /w {port:#x} {value:#x}"}}}}"#
            ));
        }
    }

    /// Waits until the report says what is expected.
    pub fn wait(&self, what: &str, mut enough: impl FnMut(&Snapshot) -> bool) -> Snapshot {
        let started = Instant::now();
        loop {
            let snapshot = self.snapshot();
            if let Some(snapshot) = snapshot.clone().filter(|snapshot| enough(snapshot)) {
                return snapshot;
            }
            assert!(
                started.elapsed() < DEADLINE,
                "waited in vain for {what}; serial:\n{}\nreport: {snapshot:#?}",
                self.serial()
            );
            pause();
        }
    }

    /// Waits until the guest has printed a text.
    pub fn wait_serial(&self, what: &str, text: &str) {
        let started = Instant::now();
        while !self.serial().contains(text) {
            assert!(started.elapsed() < DEADLINE, "waited in vain for {what}; serial:\n{}", self.serial());
            pause();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The memfd that backs the guest's RAM.
fn find_ram(qemu: &Child) -> Option<File> {
    let directory = std::fs::read_dir(format!("/proc/{}/fd", qemu.id())).ok()?;
    let path = directory.filter_map(Result::ok).map(|entry| entry.path()).find(|path| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("memfd:memory-backend-memfd"))
    })?;
    let ram = File::options().read(true).write(true).open(path).ok()?;
    // It is sized a moment after it is made.
    (ram.metadata().ok()?.len() > REPORT_GPA + REPORT_SIZE).then_some(ram)
}

fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}
