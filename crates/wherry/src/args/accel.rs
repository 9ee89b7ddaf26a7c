//! Options of `device accel`, and of the keys it is given.

use std::path::PathBuf;

use clap::Args;
use wherry_accel::abi::class;
use wherry_accel::keys::KeyKind;

use super::DeviceSockets;

/// Options of `device accel`.
#[derive(Debug, Args)]
pub struct DeviceAccel {
    /// Where it is served.
    #[command(flatten)]
    pub sockets: DeviceSockets,
    /// Engines by class; a class that is not named has none. Both ends of a move need the same ones
    #[arg(long, value_name = "CLASS=N,...", default_value = "copy=2,compress=2,crypto=1,compute=1,code=1", value_parser = engines)]
    pub engines: [u16; 5],
    /// Threads that serve the engines [default: as many as processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: Option<u16>,
    /// Look at a polled ring so long after its latest descriptor, before its client has to ring for it
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub poll: u32,
    /// Give the client privilege: it may raise priorities above 0, and set slices, deadlines and heartbeats of engines
    #[arg(long)]
    pub privileged: bool,
    /// Key of the fleet, which unwraps keys: a file of 32 bytes or 64 hexadecimal digits that nobody else can read. The same
    /// at both ends of a move; with it, no core dump is made of the process
    #[arg(long, value_name = "FILE")]
    pub fleet_key: Option<PathBuf>,
    /// Give the device a key, as `wherry accel wrap-key` has wrapped it for this handle and kind (aes-256-gcm,
    /// chacha20-poly1305, hmac-sha256); as often as there are keys
    #[arg(long, value_name = "HANDLE=KIND:FILE", requires = "fleet_key", value_parser = key)]
    pub key: Vec<KeyFile>,
}

/// A wrapped key, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyFile {
    /// Its handle.
    pub handle: u32,
    /// What it is for.
    pub kind: KeyKind,
    /// The file.
    pub path: PathBuf,
}

/// Options of `accel wrap-key`.
#[derive(Debug, Args)]
pub struct AccelWrapKey {
    /// Key of the fleet: a file of 32 bytes or 64 hexadecimal digits that nobody else can read
    #[arg(long, value_name = "FILE")]
    pub fleet_key: PathBuf,
    /// The handle by which clients will name the key
    #[arg(long, value_name = "HANDLE", value_parser = handle)]
    pub handle: u32,
    /// What it is for: aes-256-gcm, chacha20-poly1305 or hmac-sha256
    #[arg(long, value_name = "KIND", value_parser = key_kind)]
    pub kind: KeyKind,
    /// The key: a file of 32 bytes or 64 hexadecimal digits that nobody else can read
    #[arg(long, value_name = "FILE")]
    pub key: PathBuf,
    /// Where the wrapped key goes; there must be no such file
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// What a key is for, by name.
pub fn key_kind(text: &str) -> Result<KeyKind, String> {
    let names = || KeyKind::ALL.map(KeyKind::name).join(", ");
    KeyKind::from_name(text).ok_or_else(|| format!("there is no kind {text:?}; there are {}", names()))
}

fn handle(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("{text:?} is no handle: a number up to {}", u32::MAX))
}

fn key(text: &str) -> Result<KeyFile, String> {
    let parts = text.split_once('=').and_then(|(handle, rest)| Some((handle, rest.split_once(':')?)));
    let (number, (kind, path)) = parts.ok_or_else(|| format!("{text:?} is not HANDLE=KIND:FILE"))?;
    Ok(KeyFile { handle: handle(number)?, kind: key_kind(kind)?, path: path.into() })
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
    use super::*;

    #[test]
    fn keys_are_named_by_handle_kind_and_file_and_what_is_wrong_is_named() {
        let good = KeyFile { handle: 7, kind: KeyKind::HmacSha256, path: "/a:b=c".into() };
        assert_eq!(key("7=hmac-sha256:/a:b=c"), Ok(good));
        for (text, words) in [
            ("7", "not HANDLE=KIND:FILE"),
            ("7=hmac-sha256", "not HANDLE=KIND:FILE"),
            ("-1=hmac-sha256:f", "\"-1\" is no handle"),
            ("1=rot13:f", "there are aes-256-gcm, chacha20-poly1305, hmac-sha256"),
        ] {
            let error = key(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

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
