//! What a source says of its machine in the handshake, from any bytes: refused, or understood and the same when it is
//! written again. Both layers: the engine's part, and the VMM's inside it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use wherry_migration::machine::MachineDescription;
use wherry_vmm::description::VmDescription;

fn vmm(bytes: &[u8]) {
    if let Ok(description) = VmDescription::from_bytes(bytes) {
        assert_eq!(VmDescription::from_bytes(&description.encode_to_vec()), Ok(description));
    }
}

fuzz_target!(|bytes: &[u8]| {
    vmm(bytes);
    if let Ok(description) = MachineDescription::decode(bytes) {
        let again = MachineDescription::decode(description.encode_to_vec().as_slice());
        assert_eq!(again.as_ref(), Ok(&description));
        vmm(&description.vmm);
    }
});
