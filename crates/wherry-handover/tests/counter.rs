//! The example `counter`, as its clients see it: it is replaced under them, by itself, by programs that fail, and again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Cargo builds the examples of a crate beside its tests.
fn counter() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.parent().unwrap().parent().unwrap().join("examples/counter")
}

fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = wait_for("the server to listen", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(BufReader::new(stream))
    }

    fn say(&mut self, line: &str) {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn ask(&mut self, line: &str) -> String {
        self.say(line);
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    /// The next number, and which process gave it.
    fn next(&mut self) -> (u64, u32) {
        let answer = self.ask("next");
        let (count, pid) = answer.split_once(" from ").unwrap();
        (count.parse().unwrap(), pid.parse().unwrap())
    }
}

/// The first server; at the end, whoever serves by then is killed.
struct Server {
    child: Child,
    path: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut client = Client::connect(&self.path);
        let (_, pid) = client.next();
        if pid == self.child.id() {
            let _ = self.child.kill();
        } else {
            let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        let _ = self.child.wait();
    }
}

fn serve(dir: &Path) -> Server {
    let path = dir.join("s");
    let child = Command::new(counter()).arg(&path).stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    Server { child, path }
}

/// How many processes run this very program with this word.
fn processes(exe: &Path, word: &str) -> usize {
    let mut found = 0;
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(cmdline) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let mut words = cmdline.split(|byte| *byte == 0);
        let program = words.next().unwrap_or_default();
        found += usize::from(program == exe.as_os_str().as_encoded_bytes() && words.next() == Some(word.as_bytes()));
    }
    found
}

#[test]
fn a_server_is_replaced_under_its_clients_again_and_again_and_gives_no_number_twice() {
    let dir = tempfile::tempdir().unwrap();
    // A copy, so that its processes can be told from those of other tests.
    let program = dir.path().join("counter");
    std::fs::copy(counter(), &program).unwrap();
    let path = dir.path().join("s");
    let child = Command::new(&program).arg(&path).stdin(Stdio::null()).spawn().unwrap();
    let mut server = Server { child, path: path.clone() };
    let (mut one, mut other) = (Client::connect(&path), Client::connect(&path));
    let (mut count, mut pid) = one.next();
    assert_eq!((count, other.next()), (1, (2, pid)));
    count += 1;
    for _ in 0..20 {
        one.say(&format!("replace {}", program.display()));
        let (next, by) = other.next();
        // It was asked before or after; then it is asked again.
        let (next, by) = if by == pid {
            count = next;
            wait_for("another process to answer", || {
                let (next, by) = other.next();
                count = count.max(next - 1);
                (by != pid).then_some((next, by))
            })
        } else {
            (next, by)
        };
        assert_eq!(next, count + 1);
        assert_ne!(by, pid);
        (count, pid) = (next, by);
        assert_eq!(one.next(), (count + 1, pid));
        count += 1;
    }
    assert!(server.child.wait().unwrap().success(), "the first one has ended well");
    assert_eq!(processes(&program, "launcher"), 1, "all were started by the first one's launcher");
    wait_for("all but one to end", || (processes(&program, "successor") == 1).then_some(()));
    drop((one, other, server));
    wait_for("the launcher to end with the last one", || (processes(&program, "launcher") == 0).then_some(()));
}

#[test]
fn whatever_the_successor_does_the_old_one_serves_on_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(dir.path());
    let mut client = Client::connect(&server.path);
    let (count, pid) = client.next();
    let text = dir.path().join("text");
    std::fs::write(&text, "no program").unwrap();
    let script = dir.path().join("script");
    std::fs::write(&script, "no program").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for (program, hint) in [
        (Path::new("/nonexistent/program"), "No such file"),
        (&text, "denied"),
        (&script, "format"),
        (Path::new("/bin/false"), "exit status: 1"),
    ] {
        let answer = client.ask(&format!("replace {}", program.display()));
        assert!(answer.starts_with(&format!("still {pid}")) && answer.contains(hint), "{hint}: {answer}");
    }
    assert_eq!(client.next(), (count + 1, pid));
}
