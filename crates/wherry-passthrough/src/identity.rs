//! What a function is, so that another host can tell whether it has the same.

use wherry_pci::ConfigSpace;

use crate::owner::Facts;

/// What a function is: part of a machine's description.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FunctionIdentity {
    /// Vendor ID and, in the upper half, device ID.
    #[prost(fixed32, tag = "1")]
    pub id: u32,
    /// Revision and class, as configuration space has them.
    #[prost(fixed32, tag = "2")]
    pub class: u32,
    /// Subsystem IDs.
    #[prost(fixed32, tag = "3")]
    pub subsystem: u32,
    /// Sizes of BARs 0 to 5; 0 where there is none.
    #[prost(uint64, repeated, tag = "4")]
    pub bars: Vec<u64>,
    /// It has a pin.
    #[prost(bool, tag = "5")]
    pub intx: bool,
    /// Vectors of MSI.
    #[prost(uint32, tag = "6")]
    pub msi: u32,
    /// Vectors of MSI-X.
    #[prost(uint32, tag = "7")]
    pub msix: u32,
    /// Capabilities: ID and place of each, one after the other.
    #[prost(bytes = "vec", tag = "8")]
    pub capabilities: Vec<u8>,
    /// It can give its state, and take one.
    #[prost(bool, tag = "9")]
    pub migration: bool,
}

impl FunctionIdentity {
    /// Of the function with these facts.
    pub fn of(facts: &Facts) -> Self {
        let config = ConfigSpace::like(&facts.config);
        let capabilities = config.capabilities().into_iter().flat_map(|(id, at)| [id, at as u8]).collect();
        Self {
            id: config.dword(0),
            class: config.dword(8),
            subsystem: config.dword(0x2c),
            bars: facts.bars.iter().map(|bar| bar.size).collect(),
            intx: facts.intx,
            msi: facts.msi,
            msix: facts.msix,
            capabilities,
            migration: facts.migration.is_some(),
        }
    }

    /// What this function, which is wanted, has and `here` has not.
    pub fn lacking(&self, here: &Self) -> Vec<String> {
        let mut reasons = Vec::new();
        let mut differs = |what: &str, wanted: String, has: String| {
            if wanted != has {
                reasons.push(format!("{what} {wanted} (here it is {has})"));
            }
        };
        let ids = |id: u32| format!("{:04x}:{:04x}", id & 0xffff, id >> 16);
        differs("vendor and device", ids(self.id), ids(here.id));
        differs("class and revision", format!("{:08x}", self.class), format!("{:08x}", here.class));
        differs("subsystem", ids(self.subsystem), ids(here.subsystem));
        differs("BARs of", format!("{:x?} bytes", self.bars), format!("{:x?} bytes", here.bars));
        differs("interrupts", self.interrupts(), here.interrupts());
        differs("capabilities", format!("{:x?}", self.capabilities), format!("{:x?}", here.capabilities));
        if reasons.is_empty() && self.migration && !here.migration {
            reasons.push("a state that can be given to it (here it cannot be migrated)".into());
        }
        reasons
    }

    fn interrupts(&self) -> String {
        format!("pin {}, {} of MSI, {} of MSI-X", u8::from(self.intx), self.msi, self.msix)
    }
}
