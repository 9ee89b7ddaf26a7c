//! What a hypervisor does for interrupts.

use std::fmt;
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An input of the hypervisor's interrupt routing: KVM calls it a GSI. The inputs of the I/O APIC come first; others lead
/// where [`Router::route`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Input(pub u32);

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What a message-signalled interrupt writes, and where: on x86 the address names a processor and the data a vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The address.
    pub address: u64,
    /// The data.
    pub data: u32,
}

/// The hypervisor refused something.
#[derive(Debug, thiserror::Error)]
#[error("interrupt input {input}: {what}: {source}")]
pub struct InterruptError {
    /// Which input; of a batch, the first.
    pub input: Input,
    /// What was being done.
    pub what: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

/// The hypervisor's side of interrupts. All methods may be called from any thread, and do not call back.
pub trait Router: Send + Sync {
    /// Reserves an input that leads nowhere yet.
    fn reserve(&self) -> io::Result<Input>;

    /// Gives inputs back. Nothing is attached to them.
    fn release(&self, inputs: &[Input]);

    /// Says where inputs lead from now on; `None` is nowhere. A table is replaced as a whole in some hypervisors, so what
    /// changes together comes in one call; and where nothing is attached, it may wait for the next
    /// [`attach`](Self::attach).
    fn route(&self, routes: &[(Input, Option<Message>)]) -> io::Result<()>;

    /// Has writes to `event` raise the interrupt. What `event` counts already may raise it once, or not.
    ///
    /// With `resample` the input is level-triggered: it stays asserted until the guest ends the interrupt, and then
    /// `resample` is written to. The inputs of several devices may be one.
    fn attach(&self, input: Input, event: &EventFd, resample: Option<&EventFd>) -> io::Result<()>;

    /// Raises a message once, without an eventfd. When this returns it has reached the interrupt controllers.
    fn inject(&self, message: Message) -> io::Result<()>;

    /// Ends it. When this returns, everything that was raised has reached the interrupt controllers.
    fn detach(&self, input: Input, event: &EventFd) -> io::Result<()>;
}
