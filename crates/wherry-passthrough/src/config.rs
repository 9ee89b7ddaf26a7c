//! Configuration space: which bytes are ours, and which are the device's.
//!
//! | bytes | whose |
//! |---|---|
//! | header | ours, begun with what the device says; the command register is passed on, too |
//! | MSI and MSI-X | ours: the guest's messages name processors of the machine |
//! | PCI Express | the device's; but it is an endpoint of the root complex here, so it has no link |
//! | other capabilities and what lies between them | the device's |
//! | capabilities that a bridge or firmware would serve, and extended ones | hidden |
//!
//! A function level reset that the guest asks for becomes a reset of the owner's.

use std::ops::Range;

use wherry_pci::ConfigSpace;

/// Bytes of configuration space that this is about.
pub(crate) const SIZE: usize = 256;
const HEADER: usize = 64;

/// Command register, and its bit that switches the pin off: the pin is ours.
pub(crate) const COMMAND: u16 = 4;
const INTX_DISABLE: u16 = 1 << 10;
/// Status register: the pin wants service.
pub(crate) const STATUS: u16 = 6;
pub(crate) const STATUS_INTX: u8 = 1 << 3;

/// Capability IDs.
const EXPRESS: u8 = 0x10;
const ADVANCED_FEATURES: u8 = 0x13;
/// AGP, slot numbers, hot swap, HyperTransport, hot plug and enhanced allocation: somebody else's business.
const HIDDEN: [u8; 6] = [0x02, 0x04, 0x06, 0x08, 0x0c, 0x14];
/// PCI Express capabilities register: version in bits 3:0, type in 7:4; 9 is an endpoint of the root complex.
const INTEGRATED: u8 = 9 << 4;

/// A bit by which the guest asks for a reset.
struct ResetBit {
    at: usize,
    mask: u8,
}

/// Which bytes are the device's.
pub(crate) struct Split {
    device: [bool; SIZE],
    resets: Vec<ResetBit>,
}

/// What is passed on of a write.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct PassedOn {
    /// Offset and bytes, each a run.
    pub(crate) writes: Vec<(u16, Vec<u8>)>,
    /// The guest asks for a reset.
    pub(crate) reset: bool,
}

impl Split {
    /// Our part of the configuration space of a device, without BARs, MSI and MSI-X.
    pub(crate) fn new(theirs: &[u8]) -> (ConfigSpace, Self) {
        let mut config = ConfigSpace::like(theirs);
        config.retain_capabilities(|id| !HIDDEN.contains(&id));
        let mut this = Self { device: [false; SIZE], resets: Vec::new() };
        let end = theirs.len().min(SIZE);
        this.device[HEADER.min(end)..end].fill(true);
        // What is hidden reads as zeros: up to where the next capability begins.
        let all = ConfigSpace::like(theirs).capabilities();
        let shown = config.capabilities();
        for (_, at) in all.iter().filter(|cap| !shown.contains(cap)) {
            let next = all.iter().map(|(_, other)| usize::from(*other)).filter(|other| *other > usize::from(*at)).min();
            let hidden = usize::from(*at)..next.unwrap_or(end);
            config.bytes_mut()[hidden.clone()].fill(0);
            this.ours(hidden);
        }
        for (id, at) in shown {
            let at = usize::from(at);
            // The list is ours: some of it may be hidden.
            this.ours(at..at + 2);
            match id {
                EXPRESS => this.express(&mut config, at),
                ADVANCED_FEATURES => this.resets.push(ResetBit { at: at + 4, mask: 1 }),
                _ => {}
            }
        }
        // So that a device with other values there can take our place.
        for (byte, device) in config.bytes_mut().iter_mut().zip(this.device) {
            *byte = if device { 0 } else { *byte };
        }
        (config, this)
    }

    fn express(&mut self, config: &mut ConfigSpace, at: usize) {
        self.ours(at + 2..at + 4);
        let bytes = config.bytes_mut();
        let Some(version) = bytes.get(at + 2).map(|byte| byte & 0xf) else { return };
        bytes[at + 2] = version | INTEGRATED;
        let second = (version >= 2).then_some(at + 0x2c..at + 0x34);
        for link in std::iter::once(at + 0xc..at + 0x14).chain(second) {
            let link = link.start.min(SIZE)..link.end.min(SIZE);
            bytes[link.clone()].fill(0);
            self.ours(link);
        }
        self.resets.push(ResetBit { at: at + 9, mask: 1 << 7 });
    }

    /// These bytes are ours.
    pub(crate) fn ours(&mut self, bytes: Range<usize>) {
        self.device[bytes.start.min(SIZE)..bytes.end.min(SIZE)].fill(false);
    }

    /// Runs of an access that are the device's: where they begin in the access, and their length.
    pub(crate) fn runs(&self, offset: u16, len: usize) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for i in 0..len {
            if self.device.get(usize::from(offset) + i) != Some(&true) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == i => run.end += 1,
                _ => runs.push(i..i + 1),
            }
        }
        runs
    }

    /// What of a write goes to the device. `command` is the command register after it.
    pub(crate) fn write(&self, offset: u16, data: &[u8], command: Option<u16>) -> PassedOn {
        let mut passed = PassedOn::default();
        if let Some(command) = command {
            passed.writes.push((COMMAND, (command & !INTX_DISABLE).to_le_bytes().to_vec()));
        }
        let mut data = data.to_vec();
        for bit in &self.resets {
            if let Some(byte) = bit.at.checked_sub(offset.into()).and_then(|at| data.get_mut(at)) {
                passed.reset |= *byte & bit.mask != 0;
                *byte &= !bit.mask;
            }
        }
        for run in self.runs(offset, data.len()) {
            passed.writes.push((offset + run.start as u16, data[run].to_vec()));
        }
        passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Power management, something of a bridge, PCI Express version 2, vendor specific.
    fn device() -> [u8; SIZE] {
        let mut bytes = [0u8; SIZE];
        bytes[0..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        (bytes[6], bytes[0x34]) = (0x18, 0x40);
        bytes[0x10..0x14].fill(0xaa);
        bytes[0x40..0x48].copy_from_slice(&[1, 0x50, 3, 0, 8, 0, 0, 0]);
        bytes[0x50..0x54].copy_from_slice(&[0x0c, 0x60, 0x77, 0x77]);
        bytes[0x60..0x64].copy_from_slice(&[0x10, 0xa0, 0x02, 0x00]);
        bytes[0x6c..0x74].fill(0x33);
        bytes[0xa0..0xa4].copy_from_slice(&[9, 0, 4, 0x5a]);
        bytes
    }

    #[test]
    fn bridges_and_links_are_hidden_and_the_rest_is_the_devices() {
        let (config, split) = Split::new(&device());
        assert_eq!(config.capabilities(), [(1, 0x40), (0x10, 0x60), (9, 0xa0)]);
        assert_eq!(config.dword(0x50), 0, "what is hidden reads as zeros");
        assert_eq!(config.word(0x62) & 0xf0, 0x90, "an endpoint of the root complex");
        assert_eq!((config.dword(0x6c), config.dword(0x10)), (0, 0));
        assert_eq!(config.word(6), 0x10, "a list of capabilities, and no interrupt");
        let runs = |offset| split.runs(offset, 4).into_iter().map(|run| (run.start, run.end)).collect::<Vec<_>>();
        assert_eq!(runs(0x40), [(2, 4)], "the list is ours");
        assert_eq!((runs(0x50), runs(0x6c), runs(4)), (vec![], vec![], vec![]));
        assert_eq!((runs(0x68), runs(0xa0)), (vec![(0, 4)], vec![(2, 4)]));
        assert_eq!(runs(0xfe), [(0, 2)], "there is no more");
    }

    #[test]
    fn a_reset_is_asked_for_and_not_passed_on() {
        let (_, split) = Split::new(&device());
        let passed = split.write(0x68, &[0x10, 0x80], None);
        assert_eq!(passed, PassedOn { writes: vec![(0x68, vec![0x10, 0])], reset: true });
        assert!(!split.write(0x68, &[0x10, 0x7f], None).reset);
    }

    #[test]
    fn the_command_register_is_passed_on_but_for_the_pin() {
        let (_, split) = Split::new(&device());
        assert_eq!(split.write(4, &[7, 4], Some(0x407)).writes, [(4, vec![7, 0])]);
    }
}
