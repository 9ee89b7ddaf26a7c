//! The lab's hand inside the outer machine (see `docs/lab.md`).
//!
//! Says what it found on the serial port, in lines that `xtask/src/lab/report.rs` reads.

mod blk;
mod checks;
mod devices;
mod echo;
mod kernel_log;
mod kvm;
mod linux;
mod network;
mod ping;
mod serial;
mod wherry;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::checks::Checks;

/// Drives Wherry and its guests inside the nested lab.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check that KVM works here.
    Kvm,
    /// Run a Linux guest in Wherry and migrate it.
    Linux {
        /// More of everything.
        #[arg(long)]
        full: bool,
        /// The guest's kernel.
        #[arg(long, default_value = "/lab/vmlinuz")]
        kernel: String,
        /// Goes before the name of every check.
        #[arg(long, default_value = "")]
        label: String,
    },
    /// Measure the disk of a guest of Wherry beside that of one of QEMU.
    Blk,
    /// Run a Linux guest in Wherry with its root on a disk and a network device, and migrate it.
    Devices {
        /// More moves.
        #[arg(long)]
        full: bool,
        /// Have processes of their own serve the devices.
        #[arg(long)]
        vhost: bool,
    },
}

fn main() -> ExitCode {
    let good = match Arguments::parse().command {
        Command::Kvm => Checks::plan("", &["kvm".to_owned()]).check("kvm", kvm::probe).is_ok(),
        Command::Linux { full, kernel, label } => linux::run(full, &kernel, &label),
        Command::Blk => blk::run(),
        Command::Devices { full, vhost } => devices::run(full, vhost),
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
