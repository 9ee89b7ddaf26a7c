//! What stands in options, as text: sizes, links, addresses, devices. Errors are for the user.

use std::time::Duration;

use wherry_netlab::Shape;
use wherry_vmm::api::types::UpdateMode;
use wherry_vmm::config::{FunctionSource, ImageFormat};

use super::Mode;

/// Reads a size: digits, then K, M, G or T (powers of 1024), with an optional B or iB.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    let suffix = suffix.to_ascii_uppercase();
    let unit = suffix.strip_suffix("IB").or_else(|| suffix.strip_suffix('B')).unwrap_or(&suffix);
    let shift = match unit {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("use a number with K, M, G or T, such as 512M".into()),
    };
    let number: u64 = number.parse().map_err(|_| "use a number with K, M, G or T, such as 512M".to_owned())?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err("must be more than 0".into()),
        Some(bytes) => Ok(bytes),
        None => Err("is too large".into()),
    }
}

/// Reads what a link is like: a round trip in ms or us, and bits per second with K, M or G (powers of 1000).
pub fn link(text: &str) -> Result<Shape, String> {
    let complain = || "use a round trip and bits per second, such as 1ms,1G".to_owned();
    let (time, rate) = text.split_once(',').ok_or_else(complain)?;
    let number = |digits: &str| digits.parse::<u64>().ok().filter(|n| *n <= 1_000_000);
    let round_trip = match time.strip_suffix("ms") {
        Some(ms) => number(ms).map(Duration::from_millis),
        None => time.strip_suffix("us").and_then(number).map(Duration::from_micros),
    };
    let (digits, unit) = match rate.as_bytes().last() {
        Some(b'K' | b'k') => (&rate[..rate.len() - 1], 1000),
        Some(b'M' | b'm') => (&rate[..rate.len() - 1], 1_000_000),
        Some(b'G' | b'g') => (&rate[..rate.len() - 1], 1_000_000_000),
        _ => (rate, 1),
    };
    let rate = number(digits).map(|n| n * unit / 8).filter(|bytes| *bytes > 0);
    Ok(Shape::new(round_trip.ok_or_else(complain)? / 2, rate.ok_or_else(complain)?))
}

/// Reads 32 hexadecimal digits; hyphens as in a UUID may stand between them.
pub fn identity(text: &str) -> Result<[u8; 16], String> {
    let digits = text.replace('-', "");
    let complain = || "use 32 hexadecimal digits, or a UUID".to_owned();
    if digits.len() != 32 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(complain());
    }
    u128::from_str_radix(&digits, 16).map(u128::to_be_bytes).map_err(|_| complain())
}

pub(super) fn cpu_model(text: &str) -> Result<wherry_vmm::config::CpuModel, String> {
    text.parse().map_err(|e: wherry_vmm::config::ConfigError| e.to_string())
}

/// Reads a path with options behind it.
pub(super) fn disk(text: &str) -> Result<wherry_vmm::config::DiskConfig, String> {
    let mut parts = text.split(',');
    let path = parts.next().filter(|path| !path.is_empty()).ok_or("give the path of an image")?;
    let (mut read_only, mut format) = (false, ImageFormat::Raw);
    for option in parts {
        match option {
            "ro" => read_only = true,
            "format=raw" => format = ImageFormat::Raw,
            "format=qcow2" => format = ImageFormat::Qcow2,
            other => return Err(format!("unknown option {other:?}: use ro, format=raw or format=qcow2")),
        }
    }
    Ok(wherry_vmm::config::DiskConfig { path: path.into(), read_only, format })
}

/// Reads a path of a raw image: tables of others are in memory, and a device process that is killed would lose what its guest,
/// which goes on with the next one, takes for written.
pub(super) fn raw_disk(text: &str) -> Result<wherry_vmm::config::DiskConfig, String> {
    match disk(text)? {
        config if config.format == ImageFormat::Raw => Ok(config),
        _ => Err("only raw images can be served by a process that another one may have to replace".into()),
    }
}

/// Reads the name of a tap device with options behind it.
pub(super) fn net(text: &str) -> Result<wherry_vmm::config::NetConfig, String> {
    let mut parts = text.split(',');
    let tap = parts.next().filter(|tap| !tap.is_empty()).ok_or("give the name of a tap device")?;
    let mut address = None;
    for option in parts {
        match option.split_once('=') {
            Some(("mac", text)) => address = Some(mac(text)?),
            _ => return Err(format!("unknown option {option:?}: use mac=MAC")),
        }
    }
    Ok(wherry_vmm::config::NetConfig { tap: tap.into(), mac: address })
}

pub(super) fn mac(text: &str) -> Result<[u8; 6], String> {
    let byte = |part: &str| {
        let whole = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        whole.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    let mac = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
    match mac {
        Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Ok(mac),
        Some(_) => Err(format!("{text} is no address of one device")),
        None => Err(format!("{text:?} is no address: give six pairs of hexadecimal digits with colons between them")),
    }
}

/// A device that somebody else has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// It serves the rings of a virtio device.
    Vhost(wherry_vmm::config::VhostSpec),
    /// A PCI function.
    Function(FunctionSource),
}

/// Reads a device that somebody else has.
pub(super) fn device(text: &str) -> Result<DeviceSpec, String> {
    let (kind, rest) = text.split_once('=').ok_or("use KIND=SOCKET, such as vhost-user-blk=/run/disk.sock")?;
    let mut id = match kind {
        "vfio-user" | "vfio" => return text.parse().map(DeviceSpec::Function),
        "vhost-user-blk" => Some(2),
        "vhost-user-net" => Some(1),
        "vhost-user" => None,
        other => {
            let kinds = "vhost-user-blk, vhost-user-net, vhost-user, vfio-user or vfio";
            return Err(format!("unknown kind of device {other:?}: use {kinds}"));
        }
    };
    let mut parts = rest.split(',');
    let socket = parts.next().filter(|path| !path.is_empty()).ok_or("give the socket of a back end")?;
    // A network device has one ring each way.
    let mut queues = if kind == "vhost-user-net" { 2 } else { 1 };
    for option in parts {
        let number = |text: &str, most: u16| match text.parse() {
            Ok(number) if (1..=most).contains(&number) => Ok(number),
            _ => Err(format!("{option}: give a number from 1 to {most}")),
        };
        match option.split_once('=') {
            Some(("id", value)) if kind == "vhost-user" => id = Some(number(value, 63)?),
            Some(("queues", value)) if kind != "vhost-user-net" => {
                queues = number(value, wherry_vmm::config::MOST_QUEUES)?
            }
            _ => {
                return Err(format!(
                    "unknown option {option:?} of {kind}: id=N belongs to vhost-user, queues=N to vhost-user and vhost-user-blk"
                ));
            }
        }
    }
    let id = id.ok_or("vhost-user=SOCKET needs the number of its virtio device type: ,id=N")?;
    Ok(DeviceSpec::Vhost(wherry_vmm::config::VhostSpec { socket: socket.into(), id, queues }))
}

/// A device that can be plugged, as the API takes it: its socket by its whole path, since the VM's process may be elsewhere.
pub(super) fn plug(text: &str) -> Result<String, String> {
    match device(text)? {
        DeviceSpec::Function(FunctionSource::VfioUser(socket)) => {
            let socket = std::path::absolute(socket).map_err(|error| format!("its socket: {error}"))?;
            let socket = socket.to_str().ok_or("its socket has a path that is no text")?;
            Ok(format!("vfio-user={socket}"))
        }
        DeviceSpec::Function(source) => Ok(source.to_string()),
        DeviceSpec::Vhost(_) => Err("only vfio-user=SOCKET and vfio=ADDRESS can be plugged into a VM that runs".into()),
    }
}

/// Reads the process in which a new program goes on.
pub fn update_mode(text: &str) -> Result<UpdateMode, String> {
    match text {
        "transfer" => Ok(UpdateMode::Transfer),
        "exec" => Ok(UpdateMode::Exec),
        _ => Err("use transfer or exec".into()),
    }
}

pub(super) fn serial(text: &str) -> Result<wherry_vmm::config::SerialTarget, String> {
    use wherry_vmm::config::SerialTarget;
    match text.split_once(':') {
        None if text == "stdio" => Ok(SerialTarget::Stdio),
        None if text == "null" => Ok(SerialTarget::Null),
        Some(("file", path)) if !path.is_empty() => Ok(SerialTarget::File(path.into())),
        Some(("socket", path)) if !path.is_empty() => Ok(SerialTarget::Socket(path.into())),
        _ => Err("use stdio, file:PATH, socket:PATH or null".into()),
    }
}

pub(super) fn console(text: &str) -> Result<wherry_vmm::config::ConsoleTarget, String> {
    use wherry_vmm::config::ConsoleTarget;
    match text.split_once(':') {
        Some(("unix", path)) if !path.is_empty() => Ok(ConsoleTarget::Socket(path.into())),
        Some(("pty", path)) if !path.is_empty() => Ok(ConsoleTarget::Pty(path.into())),
        Some(("file", path)) if !path.is_empty() => Ok(ConsoleTarget::File(path.into())),
        _ => Err("use unix:PATH, pty:LINK or file:PATH".into()),
    }
}

/// Checks the form of an address; whether somebody is there is found out later.
pub(super) fn address(text: &str) -> Result<String, String> {
    text.parse::<wherry_stream::Endpoint>().map_err(|e| e.to_string())?;
    Ok(text.to_owned())
}

pub(super) fn mode(text: &str) -> Result<Mode, String> {
    match text {
        "precopy" => Ok(Mode::Precopy),
        "postcopy" => Ok(Mode::Postcopy),
        "hybrid" => Ok(Mode::Hybrid),
        _ => Err("use precopy, postcopy or hybrid".into()),
    }
}

pub(super) fn side(text: &str) -> Result<wherry_migration::Side, String> {
    match text {
        "source" => Ok(wherry_migration::Side::Source),
        "destination" => Ok(wherry_migration::Side::Destination),
        _ => Err("use source or destination".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes_and_nonsense_is_refused() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64k"), Ok(64 << 10));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("4GiB"), Ok(4 << 30));
        assert_eq!(size("2TB"), Ok(2 << 40));
        for bad in ["", "M", "1.5G", "-1", "0", "1X", "99999999999999999999", "99999999T", "1 G"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_link_is_a_round_trip_and_a_rate() {
        assert_eq!(link("1ms,1G"), Ok(Shape::new(Duration::from_micros(500), 125_000_000)));
        assert_eq!(link("80us,8000"), Ok(Shape::new(Duration::from_micros(40), 1000)));
        for bad in
            ["", "1ms", ",1G", "1,1G", "1ms,", "1ms,G", "1ms,7", "1ms,0", "-1ms,1G", "9999999ms,1G", "1ms,\u{e9}"]
        {
            assert!(link(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_identity_is_32_digits_or_a_uuid() {
        let id = identity("00112233445566778899aabbccddeeff").unwrap();
        assert_eq!((id[0], id[15]), (0, 0xff));
        assert_eq!(identity("00112233-4455-6677-8899-aabbccddeeff"), Ok(id));
        assert!(identity("0011").is_err() && identity("g0112233445566778899aabbccddeeff").is_err());
    }

    #[test]
    fn serial_targets_and_addresses_are_checked() {
        assert!(serial("stdio").is_ok() && serial("file:/x").is_ok() && serial("socket:/x").is_ok());
        assert!(serial("file:").is_err() && serial("tty").is_err());
        assert!(console("unix:/x").is_ok() && console("pty:/x").is_ok() && console("file:/x").is_ok());
        assert!(console("pty").is_err() && console("unix:").is_err() && console("/x").is_err());
        assert!(address("tcp:localhost:4000").is_ok() && address("unix:/x").is_ok());
        assert!(address("localhost:4000").is_err() && address("tcp:localhost").is_err() && address("unix:").is_err());
    }
}
