//! A process that serves a device of a guest that is measured; it ends with the value.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::START;

/// See the module.
pub(super) struct Device {
    child: Child,
    /// Where it listens.
    pub(super) socket: PathBuf,
}

impl Device {
    /// Starts `wherry device ARGUMENTS`.
    pub(super) async fn start(directory: &Path, name: &str, arguments: &[&str]) -> Result<Self> {
        let socket = directory.join(format!("{name}.device"));
        let program = std::env::current_exe().context("finding this program's own file")?;
        let doing = || format!("starting wherry device {}", arguments.join(" "));
        let mut command = Command::new(program);
        command.arg("device").args(arguments).arg("--socket").arg(&socket);
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().with_context(doing)?;
        let this = Self { child, socket };
        let deadline = Instant::now() + START;
        while !this.socket.exists() {
            if Instant::now() >= deadline {
                bail!("{}: it has not made {} within {START:?}", doing(), this.socket.display());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(this)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
