//! Processes that serve a disk by vhost-user.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Place, kvm, listens, wait_for};

/// Who serves a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Qemu,
    Wherry,
}

/// A process that serves a disk; it ends with the value.
pub struct Daemon {
    pub process: Child,
    pub socket: PathBuf,
}

impl Daemon {
    /// Serves an image. Others may have it open, too: only one of them has a guest at any time.
    pub fn serve(place: &Place, name: &str, image: &Path, program: Program) -> Self {
        let socket = place.path(name);
        let mut command = match program {
            Program::Qemu => {
                let node = format!("driver=file,node-name=f,filename={},locking=off", image.display());
                let socket = socket.display();
                let export =
                    format!("type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={socket}");
                let mut command = Command::new("qemu-storage-daemon");
                command.args(["--blockdev", &node, "--export", &export]).stderr(Stdio::null());
                command
            }
            Program::Wherry => {
                let mut command = place.command(&["device", "blk", "--socket"]);
                command.arg(&socket).arg("--image").arg(image).stderr(Stdio::inherit());
                command
            }
        };
        let process = command.stdout(Stdio::null()).spawn().unwrap();
        wait_for("the socket of a back end", || listens(&socket).then_some(()));
        Self { process, socket }
    }

    pub fn device(&self) -> String {
        format!("vhost-user-blk={}", self.socket.display())
    }

    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Whether it and KVM are there; says what is skipped if not.
pub fn able(test: &str, program: Program) -> bool {
    let there = program == Program::Wherry
        || Command::new("qemu-storage-daemon").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        println!("SKIPPED {test}: qemu-storage-daemon is not installed (Debian package qemu-utils)");
    }
    there && kvm(test)
}
