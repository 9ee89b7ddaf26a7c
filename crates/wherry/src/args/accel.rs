//! Options of `device accel`.

use std::path::PathBuf;

use clap::Args;
use wherry_accel::abi::class;

/// Options of `device accel`.
#[derive(Debug, Args)]
pub struct DeviceAccel {
    /// UNIX socket to listen on
    #[arg(long, value_name = "SOCKET")]
    pub socket: PathBuf,
    /// Engines by class; a class that is not named has none. Both ends of a move need the same ones
    #[arg(long, value_name = "CLASS=N,...", default_value = "copy=2,compress=2,crypto=1,compute=1,code=1", value_parser = engines)]
    pub engines: [u16; 5],
    /// Threads that serve the engines [default: as many as processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: Option<u16>,
}

fn engines(text: &str) -> Result<[u16; 5], String> {
    let mut counts = [None; 5];
    for part in text.split(',') {
        let form = || format!("{part:?} is not CLASS=N; there are {}", class::NAMES.join(", "));
        let (name, count) = part.split_once('=').ok_or_else(form)?;
        let class = class::NAMES.iter().position(|class| *class == name).ok_or_else(form)?;
        let count: u16 = count.parse().map_err(|_| form())?;
        if counts[class].replace(count).is_some() {
            return Err(format!("{name} is there twice"));
        }
    }
    let all = counts.map(|count| count.unwrap_or(0));
    match all.iter().map(|count| u32::from(*count)).sum() {
        1..=64 => Ok(all),
        sum => Err(format!("a device has 1 to 64 engines, not {sum}")),
    }
}

#[cfg(test)]
mod tests {
    use super::engines;

    #[test]
    fn engines_are_counted_by_class_and_what_is_wrong_is_named() {
        assert_eq!(engines("copy=2,compress=1"), Ok([2, 1, 0, 0, 0]));
        assert_eq!(engines("code=64"), Ok([0, 0, 0, 0, 64]));
        for (text, words) in [
            ("", "\"\" is not CLASS=N"),
            ("copy", "\"copy\" is not"),
            ("gpu=1", "there are copy, compress, crypto, compute, code"),
            ("copy=x", "\"copy=x\""),
            ("copy=1,copy=1", "copy is there twice"),
            ("copy=0", "not 0"),
            ("copy=64,code=1", "not 65"),
        ] {
            let error = engines(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
