//! Crashes, lost connections and silence, at a message or at a state of the migration.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::io::Errno;
use wherry_vfio_user::Stop;
use wherry_vfio_user::message::Command;
use wherry_vfio_user::server::{Moment, Verdict};

use super::faults::{Event, Mishap};
use super::function::Core;

/// Between two looks whether the process is to end.
const LOOK: Duration = Duration::from_millis(20);
/// Exit status of a crash that was asked for.
const CRASHED: i32 = 101;

/// Has happen what was asked for. The device and whoever watches its messages share it.
pub struct Mischief {
    core: Arc<Core>,
    stop: OnceLock<Stop>,
    /// The message that is being served is not answered.
    hang_up: AtomicBool,
}

impl Mischief {
    pub fn new(core: Arc<Core>) -> Arc<Self> {
        Arc::new(Self { core, stop: OnceLock::new(), hang_up: AtomicBool::new(false) })
    }

    /// What ends the process while it hangs.
    pub fn set_stop(&self, stop: Stop) {
        let _ = self.stop.set(stop);
    }

    /// What has come is done, or was done. An error: it is not.
    pub fn at(&self, event: Event, moment: Moment) -> Result<(), Errno> {
        let mishap = self.core.engine().faults.happens(event, moment);
        match mishap {
            None => return Ok(()),
            Some(Mishap::Crash) => {
                eprintln!("crashes: {moment:?} {event:?}");
                // As a process ends that is killed: nothing is given back, the socket stays.
                std::process::exit(CRASHED);
            }
            Some(Mishap::Disconnect) => self.hang_up.store(true, Ordering::SeqCst),
            Some(Mishap::Hang) => {
                while self.stop.get().is_none_or(|stop| !stop.is_stopped()) {
                    std::thread::sleep(LOOK);
                }
            }
        }
        Err(Errno::IO)
    }

    /// For [`wherry_vfio_user::server::Host::set_watcher`].
    pub fn watch(&self, command: Command, moment: Moment) -> Verdict {
        let here = self.at(Event::Message(command), moment);
        match here.is_err() | self.hang_up.swap(false, Ordering::SeqCst) {
            true => Verdict::HangUp,
            false => Verdict::GoOn,
        }
    }
}
