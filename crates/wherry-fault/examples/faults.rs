//! Measures local faults: a thread touches pages that lack, and whoever is asked for them has them at once. Prints the
//! round trip from touch to byte, and what mapping in the background costs.
//!
//! ```sh
//! cargo run --release -p wherry-fault --example faults [-- PAGES]
//! ```
#![expect(unsafe_code, reason = "touches guest memory as a guest does")]

use std::error::Error;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use wherry_fault::{FaultService, Requester, Wanted, Way};
use wherry_memory::{BlockId, BlockSpec, PageSize, Ram};

const BLOCK: BlockId = BlockId(0);
const PAGE: u64 = 4096;

/// Has every page at once, on the fault thread itself.
#[derive(Default)]
struct AtHand {
    service: OnceLock<Weak<FaultService>>,
    ram: OnceLock<Arc<Ram>>,
}

impl Requester for AtHand {
    fn request(&self, pages: &[Wanted]) {
        let Some((service, ram)) = self.service.get().and_then(Weak::upgrade).zip(self.ram.get()) else { return };
        for page in pages.iter().map(|wanted| wanted.page) {
            if let Err(error) = bring(&service, ram, page) {
                eprintln!("page {page}: {error}");
            }
        }
    }
}

/// What a channel does.
fn bring(service: &FaultService, ram: &Ram, page: u64) -> Result<(), Box<dyn Error>> {
    let fill = service.fill(BLOCK)?;
    if !service.states(BLOCK).is_some_and(|states| states.claim(page)) {
        return Ok(());
    }
    match fill.way() {
        Way::InPlace => {
            let at = ram.blocks()[0].engine_range(page * PAGE, PAGE)?;
            // SAFETY: one page inside the engine map, which was claimed.
            unsafe { at.write_bytes(1, PAGE as usize) };
            service.received(BLOCK, page..page + 1)?;
        }
        Way::Copy => service.received_copy(BLOCK, page..page + 1, &[1; PAGE as usize])?,
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let pages: u64 = std::env::args().nth(1).map_or(Ok(20_000), |argument| argument.parse())?;
    for way in [Way::InPlace, Way::Copy] {
        let spec = BlockSpec { id: BLOCK, guest_base: 0, size: pages * 2 * PAGE, page_size: PageSize::Base };
        let ram = Arc::new(Ram::create(&[spec])?);
        let guest = ram.blocks()[0].guest_map() as u64;
        let service = FaultService::new(ram.clone())?;
        service.register_guest_maps()?;
        service.set_way(BLOCK, way)?;
        let requester = Arc::new(AtHand::default());
        let _ = requester.service.set(Arc::downgrade(&service));
        let _ = requester.ram.set(ram.clone());
        service.start(requester)?;
        let mut times: Vec<Duration> = (0..pages)
            .map(|page| {
                let started = Instant::now();
                // SAFETY: inside the guest map.
                unsafe { ((guest + page * PAGE) as *const u8).read_volatile() };
                started.elapsed()
            })
            .collect();
        times.sort();
        let quantile = |n: usize| times[(times.len() - 1) * n / 100];
        println!(
            "faults {way}: p50 {:?}, p99 {:?}, longest {:?}; of that from event to page p50 {:?}, p99 {:?}",
            quantile(50),
            quantile(99),
            quantile(100),
            service.statistics().sources[0].latency.quantile(0.5).unwrap_or_default(),
            service.statistics().sources[0].latency.quantile(0.99).unwrap_or_default(),
        );
        for page in pages..2 * pages {
            bring(&service, &ram, page)?;
        }
        // By copy everything is placed already.
        let started = Instant::now();
        let mapped = service.map_background(u64::MAX)?.pages;
        if mapped > 0 {
            let each = started.elapsed() / u32::try_from(mapped)?;
            println!("mapped {mapped} pages in the background {way}: {each:?} a page");
        }
        service.unregister_guest_maps()?;
        service.stop();
    }
    Ok(())
}
