//! The lab's hand inside the outer machine (see `docs/lab.md`), and on this one where a lab needs no emulated machine.
//!
//! Says what it found on the serial port, in lines that `xtask/src/lab/report.rs` reads.

mod blk;
mod checks;
mod devices;
mod echo;
mod fio;
mod front_end;
mod kernel_log;
mod kvm;
mod linux;
mod network;
mod ping;
mod qemu;
mod serial;
mod vfio;
mod wherry;

use std::path::PathBuf;
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
    /// Pass devices of this machine through.
    Vfio {
        /// More of everything.
        #[arg(long)]
        full: bool,
    },
    /// In a guest: use the educational device that was passed through to it.
    Uio {
        /// Pages that are brought there and back.
        #[arg(long)]
        rounds: u64,
    },
    /// Run a Linux guest in QEMU with its root on a disk of `wherry device blk`, and have QEMU migrate it.
    QemuFrontEnd {
        /// Our program.
        #[arg(long)]
        wherry: PathBuf,
        /// The guest's kernel.
        #[arg(long)]
        kernel: PathBuf,
        /// Its initial RAM file system.
        #[arg(long)]
        initrd: PathBuf,
        /// Its disk, which is written.
        #[arg(long)]
        image: PathBuf,
        /// Where sockets may be made.
        #[arg(long)]
        directory: PathBuf,
        /// Moves in each way.
        #[arg(long)]
        moves: usize,
    },
}

fn main() -> ExitCode {
    let good = match Arguments::parse().command {
        Command::Kvm => Checks::plan("", &["kvm".to_owned()]).check("kvm", kvm::probe).is_ok(),
        Command::Linux { full, kernel, label } => linux::run(full, &kernel, &label),
        Command::Blk => blk::run(),
        Command::Devices { full, vhost } => devices::run(full, vhost),
        Command::Vfio { full } => vfio::run(full),
        Command::Uio { rounds } => vfio::uio::run(rounds).inspect_err(|error| println!("{error:#}")).is_ok(),
        Command::QemuFrontEnd { wherry, kernel, initrd, image, directory, moves } => {
            front_end::run(&qemu::Parts { wherry, kernel, initrd, image, directory }, moves)
        }
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
