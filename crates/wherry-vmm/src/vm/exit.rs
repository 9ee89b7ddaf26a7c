//! How a machine ends, and who hears of it.
//!
//! vCPUs and devices (power-off, reset port) tell an [`ExitNotice`]; the first reason counts. From then on no vCPU of
//! the machine enters the guest again.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Why a machine runs no longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest crashed in a way that would reset a physical machine: a triple fault, or an instruction that KVM
    /// cannot execute.
    Crash(Crash),
    /// The user ended it.
    ApiStop,
    /// The VMM or KVM failed.
    Error(String),
}

/// Where the guest was when it crashed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Crash {
    /// The vCPU.
    pub vcpu: u32,
    /// What happened, such as `triple fault`.
    pub what: String,
    /// Its registers by name.
    pub registers: Vec<(&'static str, u64)>,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::PowerOff => f.write_str("the guest switched itself off"),
            ExitReason::Reset => f.write_str("the guest asked for a reset"),
            ExitReason::Crash(crash) => write!(f, "the guest crashed: {crash}"),
            ExitReason::ApiStop => f.write_str("it was stopped by its user"),
            ExitReason::Error(error) => write!(f, "the VMM failed: {error}"),
        }
    }
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on vCPU {}", self.what, self.vcpu)?;
        for (name, value) in &self.registers {
            write!(f, " {name}={value:#x}")?;
        }
        Ok(())
    }
}

type Hook = Box<dyn FnOnce(&ExitReason) + Send>;

#[derive(Default)]
struct Inner {
    /// Set once.
    reason: Option<ExitReason>,
    hooks: Vec<Hook>,
}

/// The one place where the end of a machine is told and waited for. Cloning gives another handle to the same place.
#[derive(Clone, Default)]
pub struct ExitNotice {
    shared: Arc<(Mutex<Inner>, Condvar)>,
}

impl fmt::Debug for ExitNotice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ExitNotice").field(&self.reason()).finish()
    }
}

impl ExitNotice {
    /// A notice of a machine that has not ended.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the machine; true if this was the first reason. Does not wait for the vCPUs. May be called from a device's
    /// `read` or `write`: the access is completed, and no instruction of the guest follows on that vCPU.
    pub fn tell(&self, reason: ExitReason) -> bool {
        let (inner, changed) = &*self.shared;
        let hooks = {
            let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
            if inner.reason.is_some() {
                return false;
            }
            inner.reason = Some(reason.clone());
            changed.notify_all();
            std::mem::take(&mut inner.hooks)
        };
        for hook in hooks {
            hook(&reason);
        }
        true
    }

    /// The reason, if the machine has ended.
    pub fn reason(&self) -> Option<ExitReason> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).reason.clone()
    }

    /// Waits until the machine ends, or until the deadline if there is one.
    pub fn wait(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        let (inner, changed) = &*self.shared;
        let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
        while inner.reason.is_none() {
            inner = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break,
                Some(left) => changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        inner.reason.clone()
    }

    /// Calls `hook` once when the machine ends, from the thread that ended it, or now if it has ended. The hook must
    /// not block.
    pub fn on_exit(&self, hook: impl FnOnce(&ExitReason) + Send + 'static) {
        let reason = {
            let mut inner = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
            match &inner.reason {
                Some(reason) => reason.clone(),
                None => {
                    inner.hooks.push(Box::new(hook));
                    return;
                }
            }
        };
        hook(&reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn the_first_reason_counts_and_everyone_hears_it() {
        let notice = ExitNotice::new();
        let (tx, heard) = mpsc::channel();
        let early = tx.clone();
        notice.on_exit(move |r| early.send(r.clone()).unwrap());
        let waiter = std::thread::spawn({
            let notice = notice.clone();
            move || notice.wait(Some(Instant::now() + Duration::from_secs(10)))
        });
        assert!(notice.tell(ExitReason::Reset));
        assert!(!notice.tell(ExitReason::PowerOff));
        notice.on_exit(move |r| tx.send(r.clone()).unwrap());
        assert_eq!(heard.iter().collect::<Vec<_>>(), [ExitReason::Reset, ExitReason::Reset]);
        assert_eq!(waiter.join().unwrap(), Some(ExitReason::Reset));
    }

    #[test]
    fn a_wait_ends_at_its_deadline() {
        assert_eq!(ExitNotice::new().wait(Some(Instant::now())), None);
    }
}
