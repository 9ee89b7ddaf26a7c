//! `cargo run --release -p wherry-accel --example figures [NAME [BYTES]]`: the figures of `wherry bench --accel`, without
//! the rest of it; or only the operations whose name has that, at one size; or, by the name `served`, those of the function.

use std::time::Duration;

use wherry_accel::bench;

fn main() -> Result<(), bench::BenchError> {
    let only = std::env::args().nth(1);
    if only.as_deref() == Some("served") {
        return served();
    }
    let size: Option<usize> = std::env::args().nth(2).and_then(|bytes| bytes.parse().ok());
    let sizes = size.map_or(vec![4 << 10, 64 << 10, 1 << 20], |size| vec![size]);
    for one in bench::throughput(&sizes, 5, bench::TIME, only.as_deref())? {
        let (device, direct, percent) = (one.device / 1e6, one.direct / 1e6, 100.0 * one.ratio);
        println!(
            "{:<15} {:>8} B  {device:>8.0} MB/s  directly {direct:>8.0} MB/s  {percent:.0} %, by processor time {:.0} %",
            one.operation,
            one.bytes,
            100.0 * one.processor_ratio.unwrap_or(f64::NAN)
        );
    }
    if only.is_some() {
        return Ok(());
    }
    let (polled, woken) = bench::latency(5000)?;
    println!("empty request: polled {polled:?} ns, by interrupt {woken:?} ns");
    println!(
        "sha256 on four engines: {:.0} MB/s by one worker, {:.0} by two",
        bench::scaling(1, 5)? / 1e6,
        bench::scaling(2, 5)? / 1e6
    );
    println!("shares of an engine: {:.3?}", bench::fairness(3, Duration::from_secs(1))?);
    served()
}

/// Through the function, over vfio-user.
fn served() -> Result<(), bench::BenchError> {
    println!("empty request through the function, ns: {:?}", bench::served_latency(5000)?);
    for one in bench::served_throughput(64 << 10, 5, bench::TIME)? {
        let (served, library, percent) = (one.served / 1e6, one.library / 1e6, 100.0 * one.ratio);
        println!(
            "{:<15} {:>8} B  {served:>8.0} MB/s  by the library {library:>8.0} MB/s  {percent:.0} %",
            one.operation, one.bytes
        );
    }
    Ok(())
}
