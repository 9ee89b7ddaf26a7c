//! Options of `device testdma`.

use std::time::Duration;

use clap::{Args, ValueEnum};
use wherry_guest::testdma::{Interrupt, MAX_VECTORS};

use super::DeviceSockets;
use crate::device::testdma::faults::{Fault, HELP};
use crate::device::testdma::options::{Load, Pattern, Shape};

/// A kind of interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// MSI-X
    Msix,
    /// MSI
    Msi,
    /// The pin INTA
    Intx,
}

/// Options of `device testdma`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct DeviceTestdma {
    /// Where it is served.
    #[command(flatten)]
    pub sockets: DeviceSockets,
    /// Kinds of interrupts that it has; the driver chooses one
    #[arg(long, value_name = "KIND,...", value_delimiter = ',', default_value = "msix,msi,intx")]
    pub interrupts: Vec<Kind>,
    /// Vectors of MSI and MSI-X
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VECTORS)))]
    pub vectors: u32,
    /// Bytes per second that it writes to buffers, such as 50M, or max
    #[arg(long, value_name = "BYTES", default_value = "max", value_parser = rate)]
    pub rate: Rate,
    /// Buffers that it fills at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub burst: u32,
    /// In which order it writes the bytes of a buffer
    #[arg(long, value_name = "ORDER", value_enum, default_value_t)]
    pub pattern: Pattern,
    /// Microseconds between an acknowledgement and the next letter, in the stop-and-wait form
    #[arg(long, value_name = "US", default_value_t = 0)]
    pub interval: u64,
    /// It cannot be migrated
    #[arg(long)]
    pub no_migration: bool,
    /// It does not log what it writes
    #[arg(long)]
    pub no_log: bool,
    /// Ballast in its state
    #[arg(long, value_name = "SIZE", value_parser = super::size)]
    pub state_size: Option<u64>,
    /// The ballast can be read while it runs (PRE_COPY)
    #[arg(long)]
    pub pre_copy: bool,
    /// Milliseconds that it takes to save its state, when it has stopped
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub save_time: u64,
    /// Milliseconds that it takes to load a state, when all of it has come
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub load_time: u64,
    /// What it does wrong: see below
    #[arg(long, value_name = "NAME[=ARGUMENT]")]
    pub fault: Vec<Fault>,
}

/// Bytes per second; `None`: as many as there can be.
pub type Rate = Option<u64>;

fn rate(text: &str) -> Result<Rate, String> {
    if text == "max" { Ok(None) } else { super::size(text).map(Some) }
}

impl DeviceTestdma {
    /// How much it does.
    pub fn load(&self) -> Load {
        let interval = Duration::from_micros(self.interval);
        Load { rate: self.rate, burst: self.burst, pattern: self.pattern, interval }
    }

    /// What it is.
    pub fn shape(&self) -> Shape {
        let kind = |kind: &Kind| match kind {
            Kind::Msix => Interrupt::Msix,
            Kind::Msi => Interrupt::Msi,
            Kind::Intx => Interrupt::Intx,
        };
        Shape {
            interrupts: self.interrupts.iter().map(kind).collect(),
            vectors: self.vectors,
            migration: !self.no_migration,
            logging: !self.no_log,
            pre_copy: self.pre_copy && !self.no_migration,
            ballast: self.state_size.unwrap_or(0),
            save_time: Duration::from_millis(self.save_time),
            load_time: Duration::from_millis(self.load_time),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use crate::args::Cli;

    #[test]
    fn every_option_of_the_test_device_is_in_its_manual() {
        const MANUAL: &str = include_str!("../../../../docs/testdma.md");
        let command = Cli::command();
        let device = command.find_subcommand("device").and_then(|device| device.find_subcommand("testdma")).unwrap();
        let shown = device.get_arguments().filter(|argument| !argument.is_hide_set());
        let names: Vec<_> = shown.filter_map(|argument| argument.get_long()).collect();
        assert!(names.contains(&"socket") && names.contains(&"fault"));
        for name in names {
            assert!(MANUAL.contains(&format!("`--{name}`")) || MANUAL.contains(&format!("--{name} ")), "--{name}");
        }
    }
}
