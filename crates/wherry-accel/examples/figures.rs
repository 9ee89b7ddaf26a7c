//! `cargo run --release -p wherry-accel --example figures`: the figures of `wherry bench --accel`, without the rest of it.

use std::time::Duration;

use wherry_accel::bench;

fn main() -> Result<(), bench::BenchError> {
    for one in bench::throughput(&[4 << 10, 64 << 10, 1 << 20], 5, bench::VOLUME)? {
        let (device, direct) = (one.device / 1e6, one.direct / 1e6);
        let percent = 100.0 * device / direct;
        println!(
            "{:<15} {:>8} B  {device:>8.0} MB/s  directly {direct:>8.0} MB/s  {percent:.0} %",
            one.operation, one.bytes
        );
    }
    let (polled, woken) = bench::latency(5000)?;
    println!("empty request: polled {polled:?} ns, by interrupt {woken:?} ns");
    println!(
        "sha256 on four engines: {:.0} MB/s by one worker, {:.0} by two",
        bench::scaling(1, 5)? / 1e6,
        bench::scaling(2, 5)? / 1e6
    );
    println!("shares of an engine: {:.3?}", bench::fairness(3, Duration::from_secs(1))?);
    Ok(())
}
