//! PCI functions that are served to vfio-user clients.

use wherry_vfio_user::server::{Host, kept};
use wherry_vfio_user::{Device, Server};

use super::process::{Begun, Made, Unit};

/// What a function says on stdout in the end.
pub type Summary = Box<dyn Fn() -> serde_json::Value + Send>;

/// A function, ready to be served.
pub fn made(mut host: Host, mut device: Box<dyn Device>, summary: Option<Summary>) -> Made {
    let known = host.offer();
    let offer = known.encode();
    Made {
        unit: Unit { name: "device-server", schema: kept::SCHEMA },
        offer,
        fits: Box::new(move |told| known.check(told)),
        begin: Box::new(move |listener| {
            let server = Server::on(listener)?;
            let (rest, stop) = (host.rest(), host.stop());
            let run = move || {
                server.serve(&mut host, &mut *device)?;
                if let Some(summary) = summary {
                    println!("{}", summary());
                }
                Ok(())
            };
            Ok(Begun { rest, stop: Box::new(move || stop.stop()), run: Box::new(run) })
        }),
    }
}
