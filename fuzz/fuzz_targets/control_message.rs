//! The payload of a control frame: refused, or it says the same when it is written again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wherry_stream::message::Message;

fuzz_target!(|bytes: &[u8]| {
    let Ok((about, body)) = Message::from_bytes(bytes) else {
        return;
    };
    let again = Message::from_bytes(&Message::new(about.clone(), body.clone()).to_bytes());
    assert_eq!(again, Ok((about, body)));
});
