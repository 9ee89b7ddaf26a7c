//! Ownership records on a real file system: what is read back, what is refused, what a full disk and a killed process
//! leave behind; and the drivers that write them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use wherry_migration::Side;
use wherry_migration::machine::MachineError;
use wherry_migration::ownership::{
    Attempt, AttemptId, BeginError, Carriage, DestinationDriver, DestinationHost, DestinationInput, DestinationRecord,
    DestinationStage, DestinationState, Incarnation, Message, Notice, SourceDriver, SourceHost, SourceInput,
    SourceRecord, SourceStage, SourceState, StartError, VmId, Word,
};
use wherry_migration::records::{
    BadRecord, Entry, RECORD_BYTES, RECORD_VERSION, RecordError, Records, Stored, decode, encode,
};

const VM: VmId = VmId([0xab; 16]);

fn attempt(epoch: u64) -> Attempt {
    Attempt { vm: VM, epoch, id: AttemptId([epoch as u8; 16]), incarnation: Incarnation([0xee; 16]) }
}

fn source(stage: SourceStage, epoch: u64) -> Stored {
    Stored::Source(SourceRecord { stage, attempt: attempt(epoch), carriage: Carriage::Whole, unsettled: false })
}

fn destination(stage: DestinationStage, epoch: u64) -> Stored {
    Stored::Destination(DestinationRecord { stage, attempt: attempt(epoch), carriage: Carriage::Whole })
}

fn entry(stored: Stored) -> Entry {
    Entry {
        stored,
        peer: "tcp:192.0.2.7:4444".into(),
        boot_id: "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0".into(),
        pid: 4711,
        program: "wherry 0.1.0".into(),
        written: 1_700_000_000,
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// One page of full file system: whoever writes there fails.
fn block(path: &Path) {
    let _ = fs::remove_file(path);
    fs::create_dir(path).unwrap();
}

// The bytes.

#[test]
fn the_records_of_every_released_version_can_still_be_read() {
    let golden = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let unsettled = Stored::Source(SourceRecord {
        stage: SourceStage::Run,
        attempt: attempt(9),
        carriage: Carriage::PagesFollow,
        unsettled: true,
    });
    for (name, stored) in [
        ("ownership-record-v1-source.bin", unsettled),
        ("ownership-record-v1-destination.bin", destination(DestinationStage::NeverRuns, 9)),
    ] {
        let path = golden(name);
        if std::env::var_os("WHERRY_WRITE_GOLDEN").is_some() {
            fs::write(&path, encode(&entry(stored))).unwrap();
        }
        let bytes = fs::read(&path).unwrap();
        assert_eq!(decode(&bytes), Ok(entry(stored)), "{name}");
        assert_eq!(encode(&entry(stored)), bytes, "{name} would be written differently today: that is a new version");
    }
}

#[test]
fn a_record_with_any_byte_changed_is_refused() {
    let good = encode(&entry(source(SourceStage::Run, 3)));
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x41;
        let error = decode(&bad).expect_err("a changed record was accepted");
        if (8..10).contains(&at) {
            assert!(matches!(error, BadRecord::Version(_)), "{error}");
        }
    }
}

#[test]
fn a_record_of_any_other_length_is_refused() {
    let good = encode(&entry(source(SourceStage::Run, 3)));
    for length in [0, 1, 23, 24, 200, RECORD_BYTES - 1] {
        assert_eq!(decode(&good[..length]), Err(BadRecord::Size(length)));
    }
    let mut long = good;
    long.push(0);
    assert_eq!(decode(&long), Err(BadRecord::Size(RECORD_BYTES + 1)));
}

#[test]
fn a_peer_with_an_endless_name_still_fits_the_record() {
    let name = "ü".repeat(100_000);
    let long = Entry { peer: name.clone(), program: name.clone(), boot_id: name, ..entry(source(SourceStage::Run, 3)) };
    let back = decode(&encode(&long)).unwrap();
    assert_eq!(back.stored, long.stored);
    assert!(long.peer.starts_with(&back.peer) && back.peer.len() > 500);
}

#[test]
fn the_document_has_every_word_and_state_and_the_format() {
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/ownership.md")).unwrap();
    let code = |file: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(file)).unwrap();
    let mut names = Vec::new();
    for (file, item) in [
        ("ownership/word.rs", "pub enum Word {"),
        ("ownership/source.rs", "pub enum SourceState {"),
        ("ownership/source.rs", "pub enum SourceStage {"),
        ("ownership/destination.rs", "pub enum DestinationState {"),
        ("ownership/destination.rs", "pub enum DestinationStage {"),
        ("records/format.rs", "struct Saved {"),
    ] {
        let text = code(file);
        let body = text.split_once(item).unwrap().1.split_once("\n}").unwrap().0;
        // Variants and fields: what stands four blanks in and is no attribute, comment or closing brace.
        let of = body.lines().filter_map(|line| line.strip_prefix("    "));
        let of = of.filter(|line| line.starts_with(|c: char| c.is_ascii_alphabetic()));
        names.extend(of.map(|line| line.split([',', '(', ' ', ':']).next().unwrap().to_owned()));
    }
    assert!(names.len() > 50, "{names:?}");
    for name in names {
        assert!(document.contains(&format!("`{name}`")), "docs/ownership.md does not explain {name}");
    }
    let record = encode(&entry(source(SourceStage::Run, 3)));
    assert!(document.contains(&format!("magic `{}`", std::str::from_utf8(&record[..8]).unwrap())));
    assert!(
        document.contains(&format!("### Format, version {RECORD_VERSION}\n\nA file of exactly {RECORD_BYTES} bytes"))
    );
}

// The directory.

#[test]
fn a_record_comes_back_and_nothing_but_it_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut claim = records.claim(VM, Side::Source).unwrap();
    assert!(claim.found().is_none());
    for stage in [SourceStage::Intent, SourceStage::Run, SourceStage::Gone] {
        claim.save(source(stage, 3), "unix:/tmp/x").unwrap();
        let read = records.read(VM, Side::Source).unwrap().unwrap();
        assert_eq!((read.stored, read.peer.as_str(), read.pid), (source(stage, 3), "unix:/tmp/x", std::process::id()));
        assert_eq!(claim.found(), Some(&read));
        assert!(!records.is_from_another_boot(&read));
    }
    drop(claim);
    assert_eq!(names(dir.path()), [format!("{VM}.source")]);
    let mut claim = records.claim(VM, Side::Source).unwrap();
    assert_eq!(claim.found().unwrap().stored, source(SourceStage::Gone, 3));
    claim.clear().unwrap();
    drop(claim);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_damaged_record_is_an_error_and_never_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let path = dir.path().join(format!("{VM}.source"));
    let mut newer = encode(&entry(source(SourceStage::Run, 3)));
    newer[8] = 2;
    let other_role = encode(&entry(destination(DestinationStage::Ran, 3)));
    for bytes in [vec![], vec![0; RECORD_BYTES], b"WHERRYOR".to_vec(), vec![7; 10_000_000], newer, other_role] {
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(records.read(VM, Side::Source), Err(RecordError::Bad { .. })));
        assert!(matches!(records.may_boot(VM), Err(RecordError::Bad { .. })));
        let error = records.claim(VM, Side::Source).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(records.list().unwrap()[0].entry.is_err());
    }
    // Somebody else's record under this name.
    let mut foreign = entry(source(SourceStage::Run, 3));
    let Stored::Source(record) = &mut foreign.stored else { unreachable!() };
    record.attempt.vm = VmId([1; 16]);
    fs::write(&path, encode(&foreign)).unwrap();
    assert!(matches!(records.read(VM, Side::Source), Err(RecordError::Bad { why: BadRecord::Misfiled, .. })));
    // The failed claims have left no lock.
    assert_eq!(names(dir.path()), [format!("{VM}.source")]);
}

#[test]
fn a_directory_that_others_can_write_to_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = dir.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(Records::open(&open), Err(RecordError::Directory { .. })));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    assert!(matches!(Records::open(&link), Err(RecordError::Directory { .. })));
    let made = dir.path().join("a/b");
    Records::open(&made).unwrap();
    assert_eq!(fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_reader_never_sees_half_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut claim = records.claim(VM, Side::Source).unwrap();
    claim.save(source(SourceStage::Intent, 5), "xxxxx").unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut seen = std::collections::BTreeSet::new();
            while !done.load(Ordering::Relaxed) {
                let entry = records.read(VM, Side::Source).unwrap().expect("the record vanished");
                assert_eq!(entry.peer.len() as u64 % 100, entry.stored.attempt().epoch % 100);
                seen.insert(entry.stored.attempt().epoch);
            }
            seen.len()
        });
        for epoch in 6..2000 {
            claim.save(source(SourceStage::Run, epoch), &"x".repeat(epoch as usize % 100)).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert!(reader.join().unwrap() > 1);
    });
}

#[test]
fn two_processes_cannot_have_the_same_role_of_a_vm_and_a_killed_one_leaves_it_free() {
    const HOLD: &str = "WHERRY_TEST_HOLD_CLAIM";
    if let Some(dir) = std::env::var_os(HOLD) {
        let records = Records::open(Path::new(&dir)).unwrap();
        let mut claim = records.claim(VM, Side::Destination).unwrap();
        claim.save(destination(DestinationStage::Intent, 4), "me").unwrap();
        println!("claimed");
        // Until killed, or until the parent is gone.
        let _ = std::io::stdin().read(&mut [0]);
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "two_processes_cannot_have_the_same_role_of_a_vm_and_a_killed_one_leaves_it_free",
            "--nocapture",
        ])
        .env(HOLD, dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with("claimed")), "the child ended before it had the claim");

    let records = Records::open(dir.path()).unwrap();
    let error = records.claim(VM, Side::Destination).unwrap_err();
    assert!(matches!(error, RecordError::Held { pid, .. } if pid == child.id()), "{error}");
    // The other role and other VMs are free: source and destination may be on one host.
    records.claim(VM, Side::Source).unwrap();
    records.claim(VmId([1; 16]), Side::Destination).unwrap();

    child.kill().unwrap();
    child.wait().unwrap();
    let mut claim = records.claim(VM, Side::Destination).unwrap();
    assert_eq!(claim.found().unwrap().stored, destination(DestinationStage::Intent, 4));
    claim.clear().unwrap();
    drop(claim);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_claim_passes_from_one_to_the_next_without_two_holders() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let holders = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut had = 0;
                while had < 200 {
                    match records.claim(VM, Side::Source) {
                        Ok(claim) => {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold the claim");
                            had += 1;
                            holders.fetch_sub(1, Ordering::SeqCst);
                            drop(claim);
                        }
                        Err(RecordError::Held { .. }) => std::thread::yield_now(),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(names(dir.path()).is_empty());
}

#[test]
fn a_full_file_system_is_met_by_the_intent_and_not_by_the_run() {
    const FULL: &str = "WHERRY_TEST_TINY_TMPFS";
    if let Some(dir) = std::env::var_os(FULL) {
        return on_a_tiny_file_system(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let unshare = if rustix::process::geteuid().is_root() { "-m" } else { "-rm" };
    let output = Command::new("unshare")
        .args([
            unshare,
            "sh",
            "-c",
            r#"mount -t tmpfs -o size=32k,mode=0700 tmpfs "$WHERRY_TEST_TINY_TMPFS" && exec "$0" "$@""#,
        ])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_full_file_system_is_met_by_the_intent_and_not_by_the_run", "--nocapture"])
        .env(FULL, dir.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn on_a_tiny_file_system(dir: &Path) {
    let records = Records::open(dir).unwrap();
    let mut claim = records.claim(VM, Side::Source).unwrap();
    let ballast = dir.join("ballast");
    let fill = || {
        let mut file = fs::OpenOptions::new().append(true).create(true).open(&ballast).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
    };
    fill();
    let error = claim.save(source(SourceStage::Intent, 3), "peer").unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    assert!(records.read(VM, Side::Source).unwrap().is_none(), "a record is there although saving it failed");

    // Room for one page: a record, but not the next one. That is too little to begin.
    fs::OpenOptions::new().write(true).open(&ballast).unwrap().set_len(4096 * 3).unwrap();
    fill_but_one(dir, &ballast);
    assert!(claim.save(source(SourceStage::Intent, 3), "peer").is_err());
    assert!(records.read(VM, Side::Source).unwrap().is_none());

    fs::remove_file(&ballast).unwrap();
    claim.save(source(SourceStage::Intent, 3), "peer").unwrap();
    fill();
    for stage in [SourceStage::Run, SourceStage::Gone] {
        claim.save(source(stage, 3), "peer").unwrap();
        assert_eq!(records.read(VM, Side::Source).unwrap().unwrap().stored, source(stage, 3));
    }
}

/// Leaves exactly one free page.
fn fill_but_one(dir: &Path, ballast: &Path) {
    let mut file = fs::OpenOptions::new().append(true).open(ballast).unwrap();
    while rustix::fs::statvfs(dir).unwrap().f_bfree > 1 {
        std::io::Write::write_all(&mut file, &[1; 4096]).unwrap();
    }
}

#[test]
fn a_host_must_not_boot_a_vm_that_has_left_or_was_about_to() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    records.may_boot(VM).unwrap();
    for stage in [SourceStage::Intent, SourceStage::Run, SourceStage::Kept, SourceStage::Gone] {
        let mut claim = records.claim(VM, Side::Source).unwrap();
        claim.save(source(stage, 3), "tcp:host:1").unwrap();
        let error = records.may_boot(VM).unwrap_err();
        assert!(
            matches!(error, RecordError::MustNotBoot { .. }) && error.to_string().contains("tcp:host:1"),
            "{error}"
        );
        claim.clear().unwrap();
    }
    for (stage, may) in
        [(DestinationStage::Intent, false), (DestinationStage::Ran, false), (DestinationStage::NeverRuns, true)]
    {
        let mut claim = records.claim(VM, Side::Destination).unwrap();
        claim.save(destination(stage, 3), "x").unwrap();
        assert_eq!(records.may_boot(VM).is_ok(), may, "{stage:?}");
    }
}

#[test]
fn a_durable_intent_is_found_after_the_directory_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (volatile, durable) = (dir.path().join("run"), dir.path().join("lib"));
    let open = || Records::open(&volatile).unwrap().with_durable_intents(&durable).unwrap();
    let mut claim = open().claim(VM, Side::Source).unwrap();
    claim.save(source(SourceStage::Intent, 3), "x").unwrap();
    claim.save(source(SourceStage::Run, 3), "x").unwrap();
    assert_eq!(open().read(VM, Side::Source).unwrap().unwrap().stored, source(SourceStage::Run, 3));
    drop(claim);
    fs::remove_dir_all(&volatile).unwrap();
    assert_eq!(open().read(VM, Side::Source).unwrap().unwrap().stored, source(SourceStage::Intent, 3));
    assert!(open().may_boot(VM).is_err());
    assert_eq!(open().list().unwrap().len(), 1);
    open().claim(VM, Side::Source).unwrap().clear().unwrap();
    assert!(names(&volatile).is_empty() && names(&durable).is_empty());
}

#[test]
fn sweeping_removes_what_is_decided_and_old_and_not_held() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let save = |vm: u8, stage| {
        let vm = VmId([vm; 16]);
        let record =
            SourceRecord { stage, attempt: Attempt { vm, ..attempt(3) }, carriage: Carriage::Whole, unsettled: false };
        let mut claim = records.claim(vm, Side::Source).unwrap();
        claim.save(Stored::Source(record), "x").unwrap();
        claim
    };
    drop((
        save(1, SourceStage::Gone),
        save(2, SourceStage::Run),
        save(3, SourceStage::Kept),
        save(4, SourceStage::Intent),
    ));
    let held = save(5, SourceStage::Gone);
    assert_eq!(records.sweep(Duration::from_secs(3600)).unwrap(), 0);
    assert_eq!(records.sweep(Duration::ZERO).unwrap(), 1);
    drop(held);
    assert_eq!(records.sweep(Duration::ZERO).unwrap(), 1);
    assert_eq!(records.list().unwrap().len(), 3);
}

// The drivers.

#[derive(Default)]
struct Host {
    sent: Vec<Word>,
    did: Vec<&'static str>,
    notices: Vec<Notice>,
    failures: Vec<String>,
    /// Calls that fail.
    broken: Vec<&'static str>,
    /// Where the next record would be written, made unwritable when the locks are touched.
    full: Option<PathBuf>,
}

impl Host {
    fn act(&mut self, what: &'static str) -> Result<(), MachineError> {
        self.did.push(what);
        if (what == "release" || what == "take")
            && let Some(path) = self.full.take()
        {
            block(&path);
        }
        if self.broken.contains(&what) { Err(format!("{what} is broken").into()) } else { Ok(()) }
    }
}

impl SourceHost for Host {
    fn send(&mut self, message: Message) {
        self.sent.push(message.word);
    }
    fn release_locks(&mut self) -> Result<(), MachineError> {
        self.act("release")
    }
    fn resume(&mut self, retake_locks: bool) -> Result<(), MachineError> {
        self.act(if retake_locks { "retake and resume" } else { "resume" })
    }
    fn discard(&mut self) {
        self.did.push("discard");
    }
    fn report(&mut self, notice: Notice) {
        self.notices.push(notice);
    }
    fn failed(&mut self, doing: &'static str, error: MachineError) {
        self.failures.push(format!("{doing}: {error}"));
    }
}

impl DestinationHost for Host {
    fn send(&mut self, message: Message) {
        self.sent.push(message.word);
    }
    fn load(&mut self) -> Option<Result<(), MachineError>> {
        Some(self.act("load"))
    }
    fn take_locks(&mut self) -> Result<(), MachineError> {
        self.act("take")
    }
    fn release_locks(&mut self) -> Result<(), MachineError> {
        self.act("release")
    }
    fn start(&mut self) -> Result<(), StartError> {
        self.act("start").map_err(|source| StartError { ran: false, source })
    }
    fn discard(&mut self) {
        self.did.push("discard");
    }
    fn report(&mut self, notice: Notice) {
        self.notices.push(notice);
    }
    fn failed(&mut self, doing: &'static str, error: MachineError) {
        self.failures.push(format!("{doing}: {error}"));
    }
}

fn hears(word: Word) -> SourceInput {
    SourceInput::Message(Message { attempt: attempt(3), word })
}

fn told(word: Word) -> DestinationInput {
    DestinationInput::Message(Message { attempt: attempt(3), word })
}

fn source_at_offer(records: &Records, host: &mut Host) -> SourceDriver {
    let mut driver = SourceDriver::begin(records.claim(VM, Side::Source).unwrap(), attempt(3), "peer", host).unwrap();
    driver.feed(SourceInput::Stopped, host);
    assert_eq!(driver.feed(SourceInput::Offer(Carriage::Whole), host), SourceState::Offered);
    driver
}

fn ready_destination(records: &Records, host: &mut Host) -> DestinationDriver {
    let claim = records.claim(VM, Side::Destination).unwrap();
    let mut driver = DestinationDriver::begin(claim, attempt(3), "peer", host).unwrap();
    assert_eq!(driver.feed(told(Word::Offer(Carriage::Whole)), host), DestinationState::Ready);
    driver
}

#[test]
fn both_drivers_carry_a_vm_over_and_each_records_before_it_speaks() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let (mut here, mut there) = (Host::default(), Host::default());
    let mut source_driver = source_at_offer(&records, &mut here);
    let mut destination_driver = ready_destination(&records, &mut there);
    assert_eq!(there.sent, [Word::Ready]);
    assert_eq!(source_driver.feed(hears(Word::Ready), &mut here), SourceState::RunRecorded);
    assert_eq!(records.read(VM, Side::Source).unwrap().unwrap().stored, source(SourceStage::Run, 3));
    assert_eq!(here.sent, [Word::Offer(Carriage::Whole), Word::Run]);
    assert_eq!(destination_driver.feed(told(Word::Run), &mut there), DestinationState::Running);
    assert_eq!(records.read(VM, Side::Destination).unwrap().unwrap().stored, destination(DestinationStage::Ran, 3));
    assert_eq!(there.did, ["load", "take", "start"]);
    assert_eq!(source_driver.feed(hears(Word::Running), &mut here), SourceState::Gone);
    assert_eq!(here.did, ["release", "discard"]);
    assert!(source_driver.is_over() && !destination_driver.is_over());
    destination_driver.feed(told(Word::Confirm), &mut there);
    assert!(destination_driver.is_over());
    drop((source_driver, destination_driver));
    // The old host remembers that the VM has left; the new one is its ordinary home.
    assert_eq!(names(dir.path()), [format!("{VM}.source")]);
}

#[test]
fn nothing_begins_when_the_intent_cannot_be_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    for side in ["source", "destination"] {
        block(&dir.path().join(format!("{VM}.{side}.spare")));
    }
    let mut host = Host::default();
    let claim = records.claim(VM, Side::Source).unwrap();
    let error = SourceDriver::begin(claim, attempt(3), "peer", &mut host).unwrap_err();
    assert!(matches!(error, BeginError::NotRecorded(_)), "{error}");
    assert!(host.did.is_empty() && host.sent.is_empty());
    let claim = records.claim(VM, Side::Destination).unwrap();
    let error = DestinationDriver::begin(claim, attempt(3), "peer", &mut host).unwrap_err();
    assert!(matches!(error, BeginError::NotRecorded(_)), "{error}");
    assert!(records.list().unwrap().is_empty());
}

#[test]
fn a_run_that_cannot_be_recorded_is_never_sent_and_the_vm_goes_on_at_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut host = Host { full: Some(dir.path().join(format!("{VM}.source.spare"))), ..Host::default() };
    let mut driver = source_at_offer(&records, &mut host);
    assert_eq!(driver.feed(hears(Word::Ready), &mut host), SourceState::Kept { settled: false });
    assert_eq!(host.did, ["release", "retake and resume"]);
    assert_eq!(host.sent, [Word::Offer(Carriage::Whole), Word::Abort]);
    assert!(host.failures[0].starts_with("writing the ownership record"), "{:?}", host.failures);
}

#[test]
fn a_destination_that_cannot_record_that_it_runs_does_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut host = Host { full: Some(dir.path().join(format!("{VM}.destination.spare"))), ..Host::default() };
    let mut driver = ready_destination(&records, &mut host);
    assert_eq!(driver.feed(told(Word::Run), &mut host), DestinationState::Declined);
    assert_eq!(host.sent, [Word::Ready, Word::NotRun]);
    assert_eq!(host.did, ["load", "take", "release"]);
    assert_eq!(driver.feed(told(Word::Abort), &mut host), DestinationState::NeverRuns);
    assert_eq!(host.did.last(), Some(&"discard"));
}

#[test]
fn a_copy_that_cannot_run_is_kept_until_the_source_has_the_vm_or_an_operator_gives_it_life() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut host = Host { broken: vec!["take"], ..Host::default() };
    let mut driver = ready_destination(&records, &mut host);
    assert_eq!(driver.feed(told(Word::Run), &mut host), DestinationState::Declined);
    assert!(!host.did.contains(&"discard"));
    // The source has died. As long as its locks are held, the operator cannot help either; then they run out.
    assert_eq!(driver.feed(DestinationInput::Resolve(Side::Destination), &mut host), DestinationState::Declined);
    assert_eq!(driver.feed(told(Word::Run), &mut host), DestinationState::Declined, "the promise holds");
    host.broken.clear();
    assert_eq!(driver.feed(DestinationInput::Resolve(Side::Destination), &mut host), DestinationState::Running);
}

#[test]
fn a_vm_that_cannot_be_resumed_is_stuck_and_whole_until_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut host = Host { broken: vec!["resume"], ..Host::default() };
    let mut driver = source_at_offer(&records, &mut host);
    assert_eq!(driver.feed(SourceInput::LinkLost, &mut host), SourceState::Resuming { settled: false });
    assert!(host.notices.contains(&Notice::Stuck) && !host.sent.contains(&Word::Abort));
    host.broken.clear();
    assert_eq!(driver.feed(SourceInput::Abort, &mut host), SourceState::Kept { settled: false });
    assert_eq!(host.sent.last(), Some(&Word::Abort));
}

#[test]
fn a_restarted_host_finds_the_records_and_decides_nothing_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut host = Host::default();
    let claim = records.claim(VM, Side::Source).unwrap();
    assert!(SourceDriver::restarted(claim).is_none());
    let mut driver = source_at_offer(&records, &mut host);
    driver.feed(hears(Word::Ready), &mut host);
    drop(driver);

    let mut host = Host::default();
    let mut driver = SourceDriver::restarted(records.claim(VM, Side::Source).unwrap()).unwrap();
    assert_eq!(driver.state(), SourceState::DiedCommitted);
    driver.feed(hears(Word::Ready), &mut host);
    assert_eq!(host.sent, [Word::Run], "the run was recorded: it stands");
    assert!(records.may_boot(VM).is_err());
    assert_eq!(driver.feed(SourceInput::Resolve(Side::Source), &mut host), SourceState::Free);
    records.may_boot(VM).unwrap();
}

#[test]
fn a_source_that_takes_the_vm_back_by_resolution_has_an_epoch_above_the_destinations() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut host = Host::default();
    let mut driver = source_at_offer(&records, &mut host);
    assert_eq!(driver.owner().epoch(), 2);
    driver.feed(hears(Word::Ready), &mut host);
    assert_eq!(driver.feed(SourceInput::LinkLost, &mut host), SourceState::InDoubt);
    assert_eq!(driver.feed(SourceInput::Resolve(Side::Source), &mut host), SourceState::Kept { settled: false });
    assert_eq!(driver.owner().epoch(), 4);
    assert_eq!(host.did, ["release", "retake and resume"]);
    // It was not dead after all: it is told, and both say so.
    driver.feed(hears(Word::Running), &mut host);
    assert_eq!(host.notices.last(), Some(&Notice::Conflict(Side::Destination)));
    drop(driver);
    // The next attempt does not forget that copy.
    let claim = records.claim(VM, Side::Source).unwrap();
    let mut driver = SourceDriver::begin(claim, attempt(5), "peer", &mut host).unwrap();
    assert_eq!(driver.feed(SourceInput::Abort, &mut host), SourceState::Kept { settled: true });
    assert!(records.may_boot(VM).is_err());
}

#[test]
fn an_undecided_attempt_keeps_a_later_one_from_beginning_unless_the_vm_has_moved_on() {
    let dir = tempfile::tempdir().unwrap();
    let records = Records::open(dir.path()).unwrap();
    let mut host = Host::default();
    let mut begin = |epoch| {
        let claim = records.claim(VM, Side::Source).unwrap();
        SourceDriver::begin(claim, attempt(epoch), "peer", &mut host)
    };
    let save = |stage| records.claim(VM, Side::Source).unwrap().save(source(stage, 3), "other").unwrap();
    for stage in [SourceStage::Intent, SourceStage::Run, SourceStage::Gone] {
        save(stage);
        let error = begin(3).unwrap_err();
        assert!(matches!(&error, BeginError::Undecided(_)) && error.to_string().contains("other"), "{error}");
        begin(4).unwrap();
    }
    // Kept: the VM is here, and may try again; but the record outlives that attempt.
    save(SourceStage::Kept);
    let mut driver = begin(3).unwrap();
    driver.feed(SourceInput::Abort, &mut Host::default());
    assert_eq!(driver.state(), SourceState::Kept { settled: true });
    drop(driver);
    assert!(records.may_boot(VM).is_err());
}
