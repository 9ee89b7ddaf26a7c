//! The VMM's part of a machine's description: what a destination needs beside RAM blocks and unit schemas.
//!
//! Carried as [`MachineDescription::vmm`](wherry_migration::machine::MachineDescription::vmm). Fields are only ever
//! added; one that a destination must not ignore goes with a new unit or a higher [`VERSION`].

use prost::Message;

use crate::cpu_model::CpuidEntry;

/// Version of the meaning of [`VmDescription`]. A destination takes its own and older ones.
pub const VERSION: u32 = 1;

/// Places of the PCI bus, without the host bridge.
const MAX_DEVICES: usize = 31;

/// A machine, apart from RAM and the state of its units.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VmDescription {
    /// [`VERSION`] of the writer.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Number of vCPUs.
    #[prost(uint32, tag = "2")]
    pub cpus: u32,
    /// Name of the CPU model, for people; what counts is `cpuid`.
    #[prost(string, tag = "3")]
    pub cpu_model: String,
    /// What CPUID tells the guest, without what differs from vCPU to vCPU.
    #[prost(message, repeated, tag = "4")]
    pub cpuid: Vec<CpuidEntry>,
    /// MSRs that tell features, and their values.
    #[prost(message, repeated, tag = "5")]
    pub feature_msrs: Vec<FeatureMsr>,
    /// The guest's TSC frequency in kHz.
    #[prost(uint32, tag = "6")]
    pub tsc_khz: u32,
    /// The writer's boot id: on another host, or after another boot, the guest's TSC has to be moved.
    #[prost(string, tag = "7")]
    pub boot_id: String,
    /// Devices beside those that every machine has, in the order of their places on the bus.
    #[prost(message, repeated, tag = "8")]
    pub devices: Vec<DeviceDescription>,
    /// Devices of it come and go: it has the registers of hot plug, and its ACPI tables tell of them.
    #[prost(bool, tag = "9")]
    pub hotplug: bool,
}

/// A device. One that an older reader does not know has a state unit that it does not know either.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeviceDescription {
    /// What it is: `disk`, `net`, `console`, `rng`, `balloon`, `vhost-user`, `vfio-user`, `vfio`.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// What it is connected to at the writer's, for people.
    #[prost(string, tag = "2")]
    pub label: String,
    /// Of a disk: its size in sectors of 512 bytes.
    #[prost(uint64, tag = "3")]
    pub sectors: u64,
    /// Of a disk: it is only read.
    #[prost(bool, tag = "4")]
    pub read_only: bool,
    /// Of a device of another process: number of the virtio device type.
    #[prost(uint32, tag = "5")]
    pub virtio_id: u32,
    /// Its rings.
    #[prost(uint32, tag = "6")]
    pub queues: u32,
    /// What it offers to its driver.
    #[prost(fixed64, tag = "7")]
    pub features: u64,
    /// Its configuration; of a function that another process owns, what it is (`FunctionIdentity`).
    #[prost(bytes = "vec", tag = "8")]
    pub config: Vec<u8>,
    /// Of a network device: its address, 6 bytes.
    #[prost(bytes = "vec", tag = "9")]
    pub mac: Vec<u8>,
    /// Where it is. Older writers have no such thing: each device is at the next free place.
    #[prost(message, optional, tag = "10")]
    pub place: Option<Place>,
}

/// Where a device of a machine is. It stays there as long as it is plugged.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Place {
    /// Its slot: device number of PCI bus 0, 1 to 31.
    #[prost(uint32, tag = "1")]
    pub slot: u32,
    /// Its number among the devices of its kind, which is in its name. Of a function that another process owns, it numbers its
    /// state unit, too.
    #[prost(uint32, tag = "2")]
    pub instance: u32,
}

impl DeviceDescription {
    /// What the device is called, such as `vfio-user0`.
    pub fn name(&self) -> String {
        format!("{}{}", self.kind, self.place.unwrap_or_default().instance)
    }
}

/// An MSR that tells features.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct FeatureMsr {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub index: u32,
    /// What the guest reads.
    #[prost(fixed64, tag = "2")]
    pub value: u64,
}

impl VmDescription {
    /// Decodes and checks what can be checked without asking the host. The error is for people.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let this = Self::decode(bytes).map_err(|e| format!("a machine description that can be read ({e})"))?;
        if this.version == 0 || this.version > VERSION {
            return Err(format!("machine description version {} (this program reads 1 to {VERSION})", this.version));
        }
        if !(1..=crate::config::MAX_CPUS).contains(&this.cpus) {
            return Err(format!("{} vCPUs (1 to {} are possible)", this.cpus, crate::config::MAX_CPUS));
        }
        if this.cpuid.is_empty() || this.cpuid.len() > 200 {
            return Err(format!("a CPUID table of {} entries", this.cpuid.len()));
        }
        if this.devices.len() > MAX_DEVICES {
            return Err(format!("{} devices (there is room for {MAX_DEVICES})", this.devices.len()));
        }
        let mut taken = 1u32;
        for Place { slot, .. } in this.devices.iter().filter_map(|device| device.place) {
            if !(1..=MAX_DEVICES as u32).contains(&slot) || taken & 1 << slot != 0 {
                return Err(format!("a device in slot {slot} (1 to {MAX_DEVICES} are possible, each once)"));
            }
            taken |= 1 << slot;
        }
        if this.tsc_khz == 0 {
            return Err("a TSC frequency".into());
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> VmDescription {
        VmDescription { version: 1, cpus: 2, cpuid: vec![CpuidEntry::default()], tsc_khz: 1, ..Default::default() }
    }

    #[test]
    fn a_description_comes_back_and_impossible_ones_are_refused() {
        assert_eq!(VmDescription::from_bytes(&good().encode_to_vec()), Ok(good()));
        let refused = |d: VmDescription| VmDescription::from_bytes(&d.encode_to_vec()).unwrap_err();
        assert!(refused(VmDescription { version: 2, ..good() }).contains("version 2"));
        assert!(refused(VmDescription { cpus: 0, ..good() }).contains("0 vCPUs"));
        assert!(refused(VmDescription { cpus: 255, ..good() }).contains("255 vCPUs"));
        assert!(refused(VmDescription { cpuid: Vec::new(), ..good() }).contains("CPUID"));
        assert!(refused(VmDescription { tsc_khz: 0, ..good() }).contains("TSC"));
        let at = |slot| DeviceDescription { place: Some(Place { slot, instance: 0 }), ..Default::default() };
        let with = |devices| VmDescription { devices, ..good() };
        assert!(VmDescription::from_bytes(&with(vec![at(31), at(1)]).encode_to_vec()).is_ok());
        for impossible in [vec![at(0)], vec![at(32)], vec![at(3), at(3)]] {
            assert!(refused(with(impossible)).contains("slot"));
        }
        assert!(VmDescription::from_bytes(&[0xff; 5]).is_err());
        assert!(VmDescription::from_bytes(&[]).is_err());
    }
}
