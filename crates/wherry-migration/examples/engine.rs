//! Measures the engine alone beside raw loopback TCP: `cargo run --release -p wherry-migration --example engine
//! [-- RUNS [CHANNELS [DATA_MIB]]]`.

use wherry_migration::bench::{Options, engine};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut numbers = std::env::args().skip(1).map(|a| a.parse::<u64>());
    let mut options = Options::default();
    if let Some(runs) = numbers.next() {
        options.runs = runs?.try_into()?;
    }
    if let Some(channels) = numbers.next() {
        options.channels = Some(channels?.try_into()?).filter(|n| *n > 0);
    }
    if let Some(mib) = numbers.next() {
        options.data = mib? << 20;
        options.ram = options.ram.max(options.data);
    }
    let report = engine(&options)?;
    for [engine, one, two] in &report.runs {
        println!("engine {engine:.3} s   raw TCP: one stream {one:.3} s, two {two:.3} s");
    }
    println!(
        "median: engine {:.3} s (blackout {:.2} ms), raw {:.3} / {:.3} s: {:.0} % of raw",
        report.engine_s,
        report.blackout_s * 1e3,
        report.raw_one_s,
        report.raw_two_s,
        report.ratio * 100.0
    );
    let [engine, one, two] = report.cpu;
    println!("processor time: engine {engine:.3} s, raw {one:.3} / {two:.3} s");
    println!("{}", serde_json::to_string(&report.job)?);
    Ok(())
}
