//! Boots a guest on the terminal, with nothing around it: no API, no migration.
//!
//!     boot --kernel FILE [--initrd FILE] [--cmdline TEXT] [--memory MIB] [--cpus N] [--reset-limit N]
//!
//! Ends with status 0 when the guest switches itself off. A reset boots it anew, at most `--reset-limit` times (0
//! unless told), then ends with status 4. Anything else is status 1.

use std::process::ExitCode;

use wherry_vmm::config::{CpuModel, Kernel, MachineConfig, SerialTarget};
use wherry_vmm::vm::{ExitReason, Vm};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::from(1)
        }
    }
}

fn run() -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut config = MachineConfig {
        name: "boot".into(),
        vm: [1; 16],
        memory: 256 << 20,
        hugepages: false,
        cpus: 1,
        cpu: CpuModel::Host,
        kernel: Kernel::Probe,
        initrd: None,
        cmdline: String::new(),
        serial: SerialTarget::Stdio,
        pci: Default::default(),
    };
    let mut resets = 0;
    let mut args = std::env::args().skip(1);
    while let Some(option) = args.next() {
        let value = args.next().ok_or(format!("{option} needs a value"))?;
        match option.as_str() {
            "--kernel" => config.kernel = Kernel::Path(value.into()),
            "--initrd" => config.initrd = Some(value.into()),
            "--cmdline" => config.cmdline = value,
            "--memory" => config.memory = value.parse::<u64>()? << 20,
            "--cpus" => config.cpus = value.parse()?,
            "--reset-limit" => resets = value.parse()?,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    loop {
        let vm = Vm::boot(config.clone())?;
        vm.resume()?;
        match vm.wait_exit(None) {
            Some(ExitReason::PowerOff) => return Ok(ExitCode::SUCCESS),
            Some(ExitReason::Reset) if resets > 0 => resets -= 1,
            Some(ExitReason::Reset) => return Ok(ExitCode::from(4)),
            other => return Err(other.map_or("it ended without a reason".into(), |r| r.to_string()).into()),
        }
    }
}
