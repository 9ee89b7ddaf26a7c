//! What a vfio-user server answers: any bytes, to everything that it can be asked, and commands of its own among them. The client takes
//! it or says what was wrong, and never waits for more than it was sent.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use wherry_vfio_user::client::ask_everything;
use wherry_vfio_user::payload::{IoFd, RegionInfo};

fuzz_target!(|bytes: &[u8]| {
    // What needs a conversation to be reached is read as it stands, too.
    let _ = (RegionInfo::decode(bytes), IoFd::decode_all(bytes));
    let Ok((client, mut server)) = UnixStream::pair() else { return };
    // More than the socket holds would be waited for here.
    if server.write_all(&bytes[..bytes.len().min(64 << 10)]).is_err() || server.shutdown(Shutdown::Write).is_err() {
        return;
    }
    // What it says does not matter; it comes at once, because nothing more comes.
    let _ = ask_everything(client, Duration::from_secs(10));
});
