//! The `wherry` command line.
//!
//! - [`args`]: what may stand on it.
//! - [`host`]: `run` and `receive`, the processes that hold a VM.
//! - [`control`], [`migrate`]: commands to such a process, over its API by [`client`].
//! - [`mod@bench`]: figures, beside those of the machine and of a peer.
//! - [`demo`]: all of it in one command; [`probe`] watches the guest from outside.
//! - [`mod@device`]: devices that a process of their own serves.
//! - [`mod@accel`]: the accelerator, which needs no VM.
//! - [`records`]: what this host remembers of VMs that changed hands.
//! - [`report`]: figures as people read them.
//!
//! Results go to stdout, everything else to stderr. The exit status is part of the contract: 0 it happened; 1 it did
//! not, and the VM runs on where it was; 2 bad arguments; 3 in doubt or paused, recoverable.

mod accel;
mod args;
mod bench;
mod client;
mod control;
mod demo;
mod device;
mod host;
mod migrate;
mod probe;
mod records;
mod report;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};

/// It happened.
pub const HAPPENED: u8 = 0;
/// It did not happen, and the VM runs on where it was.
pub const DID_NOT: u8 = 1;
/// The arguments are bad.
pub const BAD_ARGUMENTS: u8 = 2;
/// In doubt or paused, recoverable.
pub const IN_DOUBT: u8 = 3;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => {
            eprintln!("error: --log {:?} is no filter: {error}", cli.log);
            return ExitCode::from(BAD_ARGUMENTS);
        }
    };
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    let result = match cli.command {
        Command::Run(options) => host::run(*options, &cli.log),
        Command::Receive(options) => host::receive(options, &cli.log),
        Command::Migrate(options) => migrate::migrate(&options),
        Command::Cancel(options) => control::cancel(&options),
        Command::Pause(options) => control::pause(&options),
        Command::Resume(options) => control::resume(&options),
        Command::Balloon(options) => control::balloon(&options),
        Command::DeviceAdd(options) => control::device_add(&options),
        Command::DeviceRemove(options) => control::device_remove(&options),
        Command::Switch(options) => control::switch(&options),
        Command::Recover(options) => control::recover(&options),
        Command::Resolve(options) => control::resolve(&options),
        Command::Status(options) => control::status(&options),
        Command::Stop(options) => control::stop(&options),
        Command::Demo(options) => demo::demo(&options),
        Command::Bench(options) => bench::bench(&options),
        Command::Device(options) => device::device(&options, &cli.log),
        Command::Accel(options) => accel::accel(&options),
        Command::Update(options) => control::update(&options),
        Command::TakeOver => host::take_over(cli.log),
        Command::TakeOverExecuted => host::take_over_executed(cli.log),
        Command::TakeOverDevice => device::process::take_over(),
        Command::Launcher => host::serve_launcher(),
        Command::WaitForSuccessor => host::wait_for_successor(),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(DID_NOT)
        }
    }
}

/// A runtime for commands that only wait for answers.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    use anyhow::Context;
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the asynchronous runtime")
}
