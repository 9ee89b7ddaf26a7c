//! PCI functions of the machine that this runs in, as sysfs shows them: which there are, whose they are, and their virtual functions.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

const DEVICES: &str = "/sys/bus/pci/devices";
/// For what the kernel does while it is written to, and a moment after.
const LIMIT: Duration = Duration::from_secs(60);

/// A function, by its address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function(String);

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Function {
    /// The first with these IDs.
    pub fn find(vendor: u16, device: u16) -> Result<Self> {
        let mut all: Vec<String> = std::fs::read_dir(DEVICES)
            .with_context(|| format!("cannot list {DEVICES}"))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        all.sort();
        let is_it = |address: &String| {
            let id = |name: &str| std::fs::read_to_string(Path::new(DEVICES).join(address).join(name)).ok();
            id("vendor").is_some_and(|id| id.trim() == format!("{vendor:#06x}"))
                && id("device").is_some_and(|id| id.trim() == format!("{device:#06x}"))
        };
        let found = all.into_iter().find(is_it);
        found.map(Self).with_context(|| format!("there is no PCI function {vendor:04x}:{device:04x}"))
    }

    /// The one at this address.
    pub fn at(address: &str) -> Self {
        Self(address.to_owned())
    }

    /// Its directory, or a file there.
    pub fn path(&self, name: &str) -> PathBuf {
        Path::new(DEVICES).join(&self.0).join(name)
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        let path = self.path(name);
        std::fs::write(&path, value).with_context(|| format!("cannot write {value:?} to {}", path.display()))
    }

    fn link(&self, name: &str) -> Option<String> {
        let target = std::fs::read_link(self.path(name)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// The driver that has it.
    pub fn driver(&self) -> Option<String> {
        self.link("driver")
    }

    /// The number of its IOMMU group.
    pub fn group(&self) -> Result<u32> {
        let group = self.link("iommu_group").with_context(|| format!("{self} has no IOMMU group"))?;
        group.parse().with_context(|| format!("{self} is in the group {group:?}"))
    }

    /// Takes it from its driver, if it has one.
    pub fn unbind(&self) -> Result<()> {
        if self.driver().is_some() {
            self.write("driver/unbind", &self.0)?;
        }
        Ok(())
    }

    /// Gives it to this driver and to no other.
    pub fn bind(&self, driver: &str) -> Result<()> {
        self.unbind()?;
        self.write("driver_override", driver)?;
        std::fs::write("/sys/bus/pci/drivers_probe", &self.0).with_context(|| format!("cannot probe {self}"))?;
        let start = Instant::now();
        while self.driver().as_deref() != Some(driver) {
            ensure!(
                start.elapsed() < LIMIT,
                "waited {LIMIT:?} for {driver} to take {self}: it has {:?}",
                self.driver()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Makes virtual functions, which get no driver by themselves.
    pub fn make_virtual(&self, count: usize) -> Result<Vec<Self>> {
        self.write("sriov_drivers_autoprobe", "0")?;
        self.write("sriov_numvfs", &count.to_string())?;
        (0..count)
            .map(|n| {
                self.link(&format!("virtfn{n}"))
                    .map(Self)
                    .with_context(|| format!("{self} has no virtual function {n}"))
            })
            .collect()
    }

    /// The name of the network device, or of the controller, that its driver has made: the only entry of this directory.
    pub fn only(&self, directory: &str) -> Result<String> {
        let path = self.path(directory);
        let start = Instant::now();
        loop {
            let entry = std::fs::read_dir(&path).ok().and_then(|mut entries| entries.next());
            if let Some(entry) = entry {
                return Ok(entry?.file_name().to_string_lossy().into_owned());
            }
            if start.elapsed() >= LIMIT {
                bail!("waited {LIMIT:?} for something in {}", path.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
