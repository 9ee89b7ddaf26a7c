//! What a vhost-user back end answers: any bytes, to everything that it can be asked. The front end takes it or says what was
//! wrong, and never waits for more than it was sent.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use wherry_memory::{BlockId, BlockSpec, PageSize, Ram};
use wherry_virtio::vhost::ask_everything;

static RAM: LazyLock<Ram> = LazyLock::new(|| {
    let block =
        |id: u16, guest_base| BlockSpec { id: BlockId(id), guest_base, size: 1 << 20, page_size: PageSize::Base };
    Ram::create(&[block(0, 0), block(1, 1 << 32)]).unwrap()
});

fuzz_target!(|bytes: &[u8]| {
    let Ok((front, mut back)) = UnixStream::pair() else { return };
    // More than the socket holds would be waited for here.
    if back.write_all(&bytes[..bytes.len().min(64 << 10)]).is_err() || back.shutdown(Shutdown::Write).is_err() {
        return;
    }
    // What it says does not matter; it comes at once, because nothing more comes.
    let _ = ask_everything(front, Duration::from_secs(10), &RAM);
});
