//! Secondary controllers of an NVMe subsystem: the virtual functions of SR-IOV. One has no queues and no interrupts, and is offline, until its
//! primary controller gives it some (NVMe Base 2.0, 5.25 and 8.26): the Virtualization Management command, as `nvme virt-mgmt` sends it.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

const IDENTIFY: u8 = 0x06;
/// Of [`IDENTIFY`]: the list of secondary controllers.
const SECONDARY_CONTROLLERS: u32 = 0x15;
const VIRTUALIZATION_MANAGEMENT: u8 = 0x1c;
const LIMIT: Duration = Duration::from_secs(60);

ioctl_iowr_nr!(NVME_IOCTL_ADMIN_CMD, u32::from(b'N'), 0x41, AdminCommand);
ioctl_io_nr!(NVME_IOCTL_RESET, u32::from(b'N'), 0x44);

/// `struct nvme_passthru_cmd` of linux/nvme_ioctl.h.
#[repr(C)]
#[derive(Debug, Default)]
struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    dwords_2_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_len: u32,
    data_len: u32,
    dwords_10_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

const _: () = assert!(size_of::<AdminCommand>() == 72);

/// What is assigned.
#[derive(Debug, Clone, Copy)]
enum Resource {
    Queues = 0,
    Interrupts = 1,
}

/// What is done with it.
#[derive(Debug, Clone, Copy)]
enum Action {
    AllocateToPrimary = 1,
    Offline = 7,
    Assign = 8,
    Online = 9,
}

/// A primary controller.
#[derive(Debug)]
pub struct Primary {
    file: File,
    name: String,
}

/// What an entry of the list of secondary controllers says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Secondary {
    /// Its controller ID.
    pub id: u16,
    /// Whether it is online.
    pub online: bool,
    /// Which virtual function it is, from 1 on.
    pub function: u16,
    /// Queues that it has, that of administration among them.
    pub queues: u16,
    /// Vectors that it has.
    pub interrupts: u16,
}

impl Primary {
    /// The controller `/dev/NAME`.
    pub fn open(name: &str) -> Result<Self> {
        let path = format!("/dev/{name}");
        let file = File::options().read(true).write(true).open(&path).with_context(|| format!("cannot open {path}"))?;
        Ok(Self { file, name: name.to_owned() })
    }

    /// Has it keep none of the resources that can be given to virtual functions, and starts it anew, which makes that so. There must be no virtual
    /// functions yet.
    pub fn give_up_flexible(&self) -> Result<()> {
        for resource in [Resource::Interrupts, Resource::Queues] {
            self.manage(0, Action::AllocateToPrimary, resource, 0)?;
        }
        #[expect(unsafe_code, reason = "an ioctl")]
        // SAFETY: it has no argument.
        let result = unsafe { ioctl(&self.file, NVME_IOCTL_RESET()) };
        ensure!(result == 0, "resetting {}: {}", self.name, std::io::Error::last_os_error());
        let start = Instant::now();
        let state = format!("/sys/class/nvme/{}/state", self.name);
        loop {
            let now = std::fs::read_to_string(&state).with_context(|| format!("cannot read {state}"))?;
            if now.trim() == "live" {
                return Ok(());
            }
            ensure!(start.elapsed() < LIMIT, "waited {LIMIT:?} for {} to live after its reset: {now}", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Gives virtual function `function`, counted from 1, so many queues and vectors, and sets it online.
    pub fn bring_up(&self, function: u16, queues: u32, interrupts: u32) -> Result<Secondary> {
        let id = self.secondary(function)?.id;
        self.manage(id, Action::Offline, Resource::Queues, 0)?;
        self.manage(id, Action::Assign, Resource::Interrupts, interrupts)?;
        self.manage(id, Action::Assign, Resource::Queues, queues)?;
        self.manage(id, Action::Online, Resource::Queues, 0)?;
        self.secondary(function)
    }

    /// The secondary controller that is this virtual function.
    pub fn secondary(&self, function: u16) -> Result<Secondary> {
        let mut list = vec![0_u8; 4096];
        self.send(IDENTIFY, [SECONDARY_CONTROLLERS, 0], Some(&mut list))
            .with_context(|| format!("asking {} for its secondary controllers", self.name))?;
        let all = secondaries(&list);
        let found = all.iter().find(|secondary| secondary.function == function).copied();
        found.with_context(|| format!("{} has no virtual function {function}, but {all:?}", self.name))
    }

    fn manage(&self, controller: u16, action: Action, resource: Resource, count: u32) -> Result<()> {
        let dword_10 = u32::from(controller) << 16 | (resource as u32) << 8 | action as u32;
        self.send(VIRTUALIZATION_MANAGEMENT, [dword_10, count], None)
            .with_context(|| format!("{}: {action:?} {resource:?} {count} of controller {controller}", self.name))
    }

    fn send(&self, opcode: u8, [dword_10, dword_11]: [u32; 2], data: Option<&mut [u8]>) -> Result<()> {
        let mut command = AdminCommand {
            opcode,
            dwords_10_15: [dword_10, dword_11, 0, 0, 0, 0],
            timeout_ms: LIMIT.as_millis() as u32,
            ..AdminCommand::default()
        };
        if let Some(data) = data {
            (command.address, command.data_len) = (data.as_mut_ptr() as u64, data.len() as u32);
        }
        #[expect(unsafe_code, reason = "an ioctl")]
        // SAFETY: the structure is that of the request; the controller writes to no more than the slice, which is borrowed until then.
        let result = unsafe { ioctl_with_mut_ref(&self.file, NVME_IOCTL_ADMIN_CMD(), &mut command) };
        ensure!(result >= 0, "{}", std::io::Error::last_os_error());
        // A status of NVMe, with its type in bits 10:8.
        ensure!(result == 0, "the controller says {result:#x}");
        Ok(())
    }
}

/// The entries of a list of secondary controllers (NVMe Base 2.0, figure 281): their number in the first byte, 32 bytes each from 32 on.
fn secondaries(list: &[u8]) -> Vec<Secondary> {
    let count = usize::from(list.first().copied().unwrap_or(0));
    let entries = list.get(32..).unwrap_or_default().chunks_exact(32).take(count);
    entries
        .map(|entry| {
            let word = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
            Secondary {
                id: word(0),
                online: entry[4] & 1 != 0,
                function: word(8),
                queues: word(10),
                interrupts: word(12),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_secondary_controllers_is_read_entry_by_entry() {
        let mut list = vec![0; 4096];
        list[0] = 2;
        list[32..46].copy_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 3, 0]);
        list[64..78].copy_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0]);
        let first = Secondary { id: 1, online: true, function: 1, queues: 2, interrupts: 3 };
        let second = Secondary { id: 2, online: false, function: 2, queues: 0, interrupts: 0 };
        assert_eq!(secondaries(&list), [first, second]);
        assert_eq!(secondaries(&[255]), []);
        assert_eq!(secondaries(&[]), []);
    }
}
