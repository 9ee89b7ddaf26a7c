//! What a vfio-user client sends: any bytes. The server answers what it can read, and the device is there for the next client.
#![no_main]

#[path = "../../crates/wherry-vfio-user/examples/copier.rs"]
mod copier;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use wherry_vfio_user::server::Host;

/// A version without capabilities.
const VERSION: [u8; 20] = [0, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut device) = copier::Copier::new() else { return };
    let Ok(mut host) = Host::new(&device) else { return };
    // What nobody reads must fit in the socket: no more commands than that.
    let bytes = &bytes[..bytes.len().min(4 << 10)];
    for first in [&[][..], &VERSION] {
        let Ok((mut client, server)) = UnixStream::pair() else { return };
        let sent = client.write_all(first).and_then(|()| client.write_all(bytes));
        if sent.is_err() || client.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let Ok(mut reader) = client.try_clone() else { return };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut waste = vec![0; 1 << 16];
                while reader.read(&mut waste).is_ok_and(|count| count > 0) {}
            });
            let _ = host.serve(server, &mut device);
        });
        assert_eq!(host.bus().maps(), 0, "a client that is gone leaves no map");
    }
});
