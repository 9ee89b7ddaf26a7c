//! Where a PCI function is on this host.

use std::fmt;
use std::str::FromStr;

/// Segment, bus, device and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostAddress {
    /// Segment, also called domain.
    pub segment: u32,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl HostAddress {
    /// Device and function in one byte.
    pub fn devfn(self) -> u8 {
        self.device << 3 | self.function
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, bus, device, function } = self;
        write!(f, "{segment:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

/// What was given is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address of a PCI function, such as 0000:00:04.0")]
pub struct BadAddress(pub String);

impl FromStr for HostAddress {
    type Err = BadAddress;

    /// As `lspci` and sysfs write it; segment 0 may be left out.
    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (segment, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
            let hex = |part: &str, digits: usize, most: u32| {
                let right = (1..=digits).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit());
                u32::from_str_radix(part, 16).ok().filter(|number| right && *number <= most)
            };
            Some(Self {
                segment: hex(segment, 8, u32::MAX)?,
                bus: hex(bus, 2, 0xff)? as u8,
                device: hex(device, 2, 0x1f)? as u8,
                function: hex(function, 1, 7)? as u8,
            })
        };
        parse().ok_or_else(|| BadAddress(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let address: HostAddress = "0000:3b:1f.7".parse().unwrap();
        assert_eq!((address.segment, address.bus, address.device, address.function), (0, 0x3b, 0x1f, 7));
        assert_eq!((address.to_string().as_str(), address.devfn()), ("0000:3b:1f.7", 0xff));
        assert_eq!("3b:1f.7".parse(), Ok(address));
        assert_eq!("10000:01:00.0".parse::<HostAddress>().unwrap().to_string(), "10000:01:00.0");
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in ["", "1", "00:20.0", "00:04.8", "00:04", "0:0:04.+1", "x:00:04.0", "00:04.0/../..", "000:04.0"] {
            assert_eq!(text.parse::<HostAddress>(), Err(BadAddress(text.into())), "{text}");
        }
    }
}
