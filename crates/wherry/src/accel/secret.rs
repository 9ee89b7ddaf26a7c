//! Keys of the accelerator in files: read by processes of which no dump is made, from files that nobody else can read.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use wherry_accel::keys::{FleetKey, KeyKind, WRAPPED_BYTES};
use zeroize::Zeroizing;

use super::job;
use crate::HAPPENED;
use crate::args::{AccelWrapKey, DeviceAccel};

/// Bytes of a key.
const KEY: usize = 32;
/// More than any file of a key has.
const MOST: u64 = 1024;

/// What an operator gives a device.
#[derive(Default)]
pub struct Given {
    /// The fleet's key, if there is one.
    pub fleet: Option<FleetKey>,
    /// Keys for the device: handle, kind, and the wrapped key.
    pub keys: Vec<(u32, KeyKind, Vec<u8>)>,
}

/// The fleet's key and the keys for the device, if there are any. From then on no dump is made of this process.
pub fn given(options: &DeviceAccel) -> Result<Given> {
    let Some(path) = &options.fleet_key else { return Ok(Given::default()) };
    no_dumps()?;
    let fleet = FleetKey::new(*key(path)?);
    let mut keys = Vec::new();
    for file in &options.key {
        let bytes = read(&file.path)?;
        ensure!(
            bytes.len() == WRAPPED_BYTES,
            "{}: a wrapped key has {WRAPPED_BYTES} bytes, not {}; `wherry accel wrap-key` makes one",
            file.path.display(),
            bytes.len()
        );
        keys.push((file.handle, file.kind, bytes.to_vec()));
    }
    Ok(Given { fleet: Some(fleet), keys })
}

/// `wherry accel wrap-key`
pub fn wrap(options: &AccelWrapKey) -> Result<u8> {
    no_dumps()?;
    let fleet = FleetKey::new(*key(&options.fleet_key)?);
    let wrapped = fleet.wrap(options.handle, options.kind, &*key(&options.key)?)?;
    let mut output = File::options();
    let output = output.write(true).create_new(true).mode(0o600).open(&options.output);
    let write = output.and_then(|mut file| file.write_all(&wrapped));
    write.with_context(|| format!("writing the wrapped key to {}", options.output.display()))?;
    Ok(HAPPENED)
}

/// Has the kernel make no core dump of this process, whatever becomes of it, and let no other one of the user look into it.
fn no_dumps() -> Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("seeing to it that keys get into no core dump")
}

/// A key in clear.
fn key(path: &Path) -> Result<Zeroizing<[u8; KEY]>> {
    let file = File::open(path).with_context(|| format!("opening the key {}", path.display()))?;
    let mode = file.metadata().with_context(|| format!("looking at the key {}", path.display()))?.mode();
    ensure!(
        mode & 0o077 == 0,
        "the key {} can be read by others (mode {:03o}): try `chmod 600`",
        path.display(),
        mode & 0o777
    );
    let bytes = contents(file).with_context(|| format!("reading the key {}", path.display()))?;
    if let Ok(key) = <[u8; KEY]>::try_from(&bytes[..]) {
        return Ok(Zeroizing::new(key));
    }
    let digits = std::str::from_utf8(&bytes).ok().and_then(|text| job::hex(text).ok()).map(Zeroizing::new);
    match digits.and_then(|digits| <[u8; KEY]>::try_from(&digits[..]).ok()) {
        Some(key) => Ok(Zeroizing::new(key)),
        // What is in it is said by nobody.
        None => bail!("{}: a key is {KEY} bytes, or {} hexadecimal digits", path.display(), 2 * KEY),
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let file = File::open(path).with_context(|| format!("opening the wrapped key {}", path.display()))?;
    contents(file).with_context(|| format!("reading the wrapped key {}", path.display()))
}

fn contents(file: File) -> std::io::Result<Zeroizing<Vec<u8>>> {
    // Room for all of it: a buffer that grows would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST as usize + 1));
    file.take(MOST).read_to_end(&mut bytes)?;
    Ok(bytes)
}
