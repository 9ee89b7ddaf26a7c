//! `wherry bench --accel`: the accelerator in real time.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use wherry_accel::bench as engine;

use crate::args::Bench;
use crate::{HAPPENED, control, report};

/// Bytes of one operation.
const SIZES: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];
/// Empty requests for the latency.
const REQUESTS: usize = 5000;
/// How long contexts compete for one engine.
const FAIR: Duration = Duration::from_secs(1);

/// An operation at a size.
#[derive(Serialize)]
struct Operation {
    operation: &'static str,
    bytes: usize,
    device_bytes_per_s: f64,
    direct_bytes_per_s: f64,
    /// Device by direct: the median of the pairs.
    ratio: f64,
    /// The same by processor time.
    processor_ratio: Option<f64>,
}

/// Half of the empty requests took no longer, and 99 of 100.
#[derive(Serialize)]
struct Latency {
    p50_ns: u64,
    p99_ns: u64,
}

impl Latency {
    fn of(latency: engine::Latency) -> Self {
        Self { p50_ns: latency.p50, p99_ns: latency.p99 }
    }

    fn text(&self) -> String {
        format!("p50 {:.1} us, p99 {:.1} us", self.p50_ns as f64 / 1e3, self.p99_ns as f64 / 1e3)
    }
}

/// An operation through the function.
#[derive(Serialize)]
struct Through {
    operation: &'static str,
    bytes: usize,
    served_bytes_per_s: f64,
    library_bytes_per_s: f64,
    /// The median of the pairs.
    ratio: f64,
}

/// The device as a PCI function over vfio-user.
#[derive(Serialize)]
struct Served {
    message: Latency,
    eventfd: Latency,
    polled: Latency,
    both_eventfd: Latency,
    throughput: Vec<Through>,
}

/// All of it.
#[derive(Serialize)]
struct Results {
    operations: Vec<Operation>,
    polled_p50_ns: u64,
    polled_p99_ns: u64,
    interrupt_p50_ns: u64,
    interrupt_p99_ns: u64,
    /// Through the function, over vfio-user.
    served: Served,
    /// SHA-256 on four engines by one worker, and by two.
    by_workers_bytes_per_s: [f64; 2],
    /// Shares of an engine that three contexts of one priority got.
    shares: Vec<f64>,
}

pub(super) fn bench(options: &Bench) -> Result<u8> {
    let say = |what: &str| {
        if !options.json {
            eprintln!("{what}");
        }
    };
    let runs = options.runs as usize;
    say("each operation, in turn with the crate called directly");
    let measured = engine::throughput(&SIZES, runs, engine::TIME, None).context("measuring the engines")?;
    say("empty requests, workers, fairness");
    let (polled, woken) = engine::latency(REQUESTS).context("measuring empty requests")?;
    say("the same through the function");
    let latency = engine::served_latency(REQUESTS).context("measuring the function")?;
    let through = engine::served_throughput(SIZES[1], runs, engine::TIME).context("measuring the function")?;
    let scaling = |workers| engine::scaling(workers, runs).context("measuring workers");
    let results = Results {
        operations: measured
            .into_iter()
            .map(|one| Operation {
                operation: one.operation,
                bytes: one.bytes,
                device_bytes_per_s: one.device,
                direct_bytes_per_s: one.direct,
                ratio: one.ratio,
                processor_ratio: one.processor_ratio,
            })
            .collect(),
        polled_p50_ns: polled.p50,
        polled_p99_ns: polled.p99,
        interrupt_p50_ns: woken.p50,
        interrupt_p99_ns: woken.p99,
        served: Served {
            message: Latency::of(latency.message),
            eventfd: Latency::of(latency.eventfd),
            polled: Latency::of(latency.polled),
            both_eventfd: Latency::of(latency.both_eventfd),
            throughput: through
                .into_iter()
                .map(|one| Through {
                    operation: one.operation,
                    bytes: one.bytes,
                    served_bytes_per_s: one.served,
                    library_bytes_per_s: one.library,
                    ratio: one.ratio,
                })
                .collect(),
        },
        by_workers_bytes_per_s: [scaling(1)?, scaling(2)?],
        shares: engine::fairness(3, FAIR).context("measuring fairness")?,
    };
    match options.json {
        true => control::print_json(&results)?,
        false => control::print(&results.text()),
    }
    Ok(HAPPENED)
}

impl Results {
    /// For a person.
    fn text(&self) -> String {
        let rate = |rate: f64| format!("{}/s", report::bytes(rate as u64));
        let mut rows =
            vec![["operation", "size", "device", "directly", "ratio", "by processor time"].map(String::from).to_vec()];
        for one in &self.operations {
            rows.push(vec![
                one.operation.into(),
                report::bytes(one.bytes as u64),
                rate(one.device_bytes_per_s),
                rate(one.direct_bytes_per_s),
                format!("{:.0} %", 100.0 * one.ratio),
                one.processor_ratio.map_or_else(|| "-".into(), |ratio| format!("{:.0} %", 100.0 * ratio)),
            ]);
        }
        let mut text = report::table(&rows);
        let us = |ns: u64| format!("{:.1} us", ns as f64 / 1e3);
        let [one, two] = self.by_workers_bytes_per_s;
        let shares: Vec<_> = self.shares.iter().map(|share| format!("{:.1} %", 100.0 * share)).collect();
        text.push_str(&format!(
            "\nEmpty request, submission to record: polled p50 {}, p99 {}; by interrupt p50 {}, p99 {}\n",
            us(self.polled_p50_ns),
            us(self.polled_p99_ns),
            us(self.interrupt_p50_ns),
            us(self.interrupt_p99_ns)
        ));
        text.push_str(&format!(
            "Through the function, over vfio-user: told by message {}; by eventfd {}; polled {}; by eventfd both ways {}\n",
            self.served.message.text(),
            self.served.eventfd.text(),
            self.served.polled.text(),
            self.served.both_eventfd.text()
        ));
        for one in &self.served.throughput {
            text.push_str(&format!(
                "  {} of {}: {}, by the library {} ({:.0} %)\n",
                one.operation,
                report::bytes(one.bytes as u64),
                rate(one.served_bytes_per_s),
                rate(one.library_bytes_per_s),
                100.0 * one.ratio
            ));
        }
        text.push_str(&format!(
            "SHA-256 on four engines: {} by one worker, {} by two ({:.2} times)\n",
            rate(one),
            rate(two),
            two / one
        ));
        text.push_str(&format!("Shares of one engine that three contexts got in a second: {}\n", shares.join(", ")));
        text
    }
}
