//! A server that counts, and that replaces itself under its clients: connections stay, and no number is given twice.
//!
//! ```text
//! counter PATH        serves the UNIX socket PATH: `next` answers the next number, `replace PROGRAM` has PROGRAM go on
//! counter successor   takes over from the process at its standard input
//! counter launcher    starts programs for the process at its standard input
//! ```

use std::error::Error;
use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use wherry_handover::{Channel, KeptId, Launcher, Registry, RunWord, Who};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Parcels: a descriptor, whose name is the body; all of the state; "it runs".
const KEPT: u16 = 1;
const STATE: u16 = 2;
const RUNS: u16 = 3;
const ATTEMPT: u32 = 1;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

struct Server {
    registry: Arc<Registry>,
    launcher: Launcher,
    listener: Arc<UnixListener>,
    clients: Vec<Arc<UnixStream>>,
    count: u64,
}

impl Server {
    fn new(registry: Arc<Registry>, launcher: Launcher, path: &Path) -> Result<Self> {
        let id = KeptId::new("listener", 0);
        let listener =
            registry.obtain::<_, std::io::Error>(id, |fd| Ok(UnixListener::from(fd)), || UnixListener::bind(path))?;
        let mut server = Self { registry, launcher, listener, clients: Vec::new(), count: 0 };
        while let Some(client) = server.registry.claim(&KeptId::new("client", server.clients.len() as u32)) {
            server.add(client.into())?;
        }
        Ok(server)
    }

    fn add(&mut self, client: UnixStream) -> Result<()> {
        self.clients.push(self.registry.add(KeptId::new("client", self.clients.len() as u32), client)?);
        Ok(())
    }

    /// Serves until somebody else does.
    fn run(mut self) -> Result<()> {
        loop {
            let mut fds = vec![PollFd::new(&*self.listener, PollFlags::IN)];
            fds.extend(self.clients.iter().map(|client| PollFd::new(&**client, PollFlags::IN)));
            poll(&mut fds, None)?;
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            for client in self.clients.clone().iter().zip(&ready[1..]).filter_map(|(c, ready)| ready.then_some(c)) {
                // A request comes in one piece: a real server would carry half ones over, too.
                let mut line = [0; 4096];
                let bytes = (&**client).read(&mut line)?;
                let line = String::from_utf8_lossy(&line[..bytes]);
                match line.trim_end().split_once(' ') {
                    None if line.starts_with("next") => {
                        self.count += 1;
                        let answer = format!("{} from {}\n", self.count, std::process::id());
                        (&**client).write_all(answer.as_bytes())?;
                    }
                    Some(("replace", program)) => match self.replace(Path::new(program)) {
                        Ok(()) => return Ok(()),
                        Err(error) => {
                            let answer = format!("still {}: {error}\n", std::process::id());
                            (&**client).write_all(answer.as_bytes())?;
                        }
                    },
                    _ => {}
                }
            }
            if ready[0] {
                let (client, _) = self.listener.accept()?;
                self.add(client)?;
            }
        }
    }

    /// Has another program go on. An error: it does not, and this one does.
    fn replace(&mut self, program: &Path) -> Result<()> {
        let (channel, theirs) = Channel::pair()?;
        let launched = self.launcher.launch(program, &["successor".into()], theirs.as_fd())?;
        drop(theirs);
        let word = RunWord::create()?;
        let answer = self.give(channel, &word);
        if matches!(word.look(), Who::Offered(_)) && word.take_back(ATTEMPT).is_ok() || word.look() == Who::Owner {
            // Whatever it does, it will not run any more.
            let ended = self.launcher.ended(launched.pid, Instant::now() + Duration::from_millis(500));
            let ended = ended.map_or_else(|| "it was left alone".into(), |ended| ended.to_string());
            return Err(format!("{} did not go on ({answer:?}); {ended}", program.display()).into());
        }
        Ok(())
    }

    fn give(&self, mut channel: Channel, word: &RunWord) -> Result<()> {
        channel.send(KEPT, b"word 0", &[word.as_fd()], soon())?;
        channel.send(KEPT, b"launcher 0", &[self.launcher.socket()?.as_fd()], soon())?;
        for entry in self.registry.list() {
            let name = format!("{} {}", entry.id.name, entry.id.index);
            channel.send(KEPT, name.as_bytes(), &[entry.as_fd()], soon())?;
        }
        // Nothing is done for clients from here on.
        word.offer(ATTEMPT);
        channel.send(STATE, &self.count.to_ne_bytes(), &[], soon())?;
        channel.receive(soon(), Duration::ZERO)?;
        Ok(())
    }
}

fn succeed(stdin: OwnedFd) -> Result<()> {
    let mut channel = Channel::from_fd(stdin)?;
    let registry = Registry::of_successor();
    let state = loop {
        let parcel = channel.receive(soon(), Duration::ZERO)?;
        if parcel.tag == STATE {
            break parcel.body;
        }
        let text = String::from_utf8(parcel.body)?;
        let (name, index) = text.split_once(' ').ok_or("a descriptor without an index")?;
        let id = KeptId::new(name, index.parse()?);
        registry.arrived(parcel.descriptors.into_iter().map(|fd| (id.clone(), fd)))?;
    };
    let word = RunWord::adopt(registry.inherit(&KeptId::new("word", 0))?)?;
    let launcher = Launcher::at(registry.inherit(&KeptId::new("launcher", 0))?)?;
    let mut server = Server::new(registry, launcher, Path::new("/nonexistent"))?;
    server.count = u64::from_ne_bytes(state.as_slice().try_into()?);
    // Claimed, or it does not start.
    let left = server.registry.unclaimed();
    if !left.is_empty() {
        return Err(format!("nobody claims {left:?}").into());
    }
    word.run(ATTEMPT).map_err(|who| who.to_string())?;
    channel.send(RUNS, &[], &[], soon())?;
    server.run()
}

fn main() -> Result<()> {
    let stdin = || std::io::stdin().as_fd().try_clone_to_owned();
    match std::env::args_os().nth(1) {
        Some(word) if word == "launcher" => Ok(wherry_handover::serve(stdin()?)?),
        Some(word) if word == "successor" => succeed(stdin()?),
        Some(path) => {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg::<OsString>("launcher".into());
            Server::new(Registry::new(), Launcher::start(command)?, Path::new(&path))?.run()
        }
        None => Err("usage: counter PATH".into()),
    }
}
