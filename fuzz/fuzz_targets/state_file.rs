//! Saved state of a whole machine, from any bytes: it is refused, or it means the same when it is written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use wherry_state::StateFile;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = StateFile::decode(bytes) else {
        return;
    };
    let again = StateFile::decode(file.encode_to_vec().as_slice()).expect("what we wrote is readable");
    assert_eq!(file, again);
    assert_eq!(file.digest(), again.digest());
    let _ = file.check();
});
