//! The first bytes of a connection: refused, or they mean the same when they are written again. The second half of all
//! inputs has its magic and checksum put right, so that what lies behind them is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wherry_stream::{HELLO_BYTES, HELLO_MAGIC, RawHello};

fn check(bytes: &[u8; HELLO_BYTES]) {
    let Ok(hello) = RawHello::decode(bytes) else {
        return;
    };
    assert_eq!(RawHello::decode(&hello.encode()), Ok(hello));
    let _ = hello.hello().map(|hello| hello.to_string());
    let _ = hello.common_version();
}

fuzz_target!(|bytes: &[u8]| {
    let Some(hello) = bytes.first_chunk::<HELLO_BYTES>() else {
        return;
    };
    check(hello);
    let mut mended = *hello;
    mended[..8].copy_from_slice(&HELLO_MAGIC);
    let crc = crc32c::crc32c(&mended[..60]);
    mended[60..].copy_from_slice(&crc.to_le_bytes());
    check(&mended);
});
