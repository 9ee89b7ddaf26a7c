//! The lab's hand inside the outer machine (see `docs/lab.md`).
//!
//! Says what it found on the serial port, in lines that `xtask/src/lab/report.rs` reads.

mod kvm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

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
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Kvm => {
            println!("LAB PLAN kvm");
            match kvm::probe() {
                Ok(()) => println!("LAB PASS kvm"),
                Err(error) => {
                    println!("LAB FAIL kvm: {error:#}");
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    ExitCode::SUCCESS
}
