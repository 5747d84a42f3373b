//! Devices of device-dax, as the machine's sysfs tells about them: the device itself has no size to ask for.
//!
//! Shared frames of such a device are made with this; and who opens one asks here what it is.

use std::path::Path;

use rustix::fs::{Dev, major, minor};

/// Where the machine tells about its character devices.
const SYSFS: &str = "/sys/dev/char";

/// A device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[doc(alias = "dev_dax")]
pub struct DeviceDax {
    /// How many bytes can be mapped.
    pub bytes: u64,
    /// The unit in which they are, in bytes.
    pub align_bytes: u64,
}

impl DeviceDax {
    /// What is told about the device of this number; nothing if it is of another kind.
    #[must_use]
    pub fn of(device: Dev) -> Option<Self> {
        Self::told(Path::new(SYSFS), device)
    }

    fn told(sysfs: &Path, device: Dev) -> Option<Self> {
        let directory = sysfs.join(format!("{}:{}", major(device), minor(device)));
        let subsystem = std::fs::read_link(directory.join("subsystem")).ok()?;
        if subsystem.file_name()? != "dax" {
            return None;
        }
        let number = |name: &str| -> Option<u64> {
            let text = std::fs::read_to_string(directory.join(name)).ok()?;
            text.trim().parse().ok()
        };
        let align_bytes = number("align").filter(|align| align.is_power_of_two())?;
        let bytes = number("size")?;
        Some(Self {
            bytes: bytes - bytes % align_bytes,
            align_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use rustix::fs::makedev;

    use super::*;

    fn told(subsystem: &str, size: &str, align: &str) -> Option<DeviceDax> {
        let sysfs = tempfile::tempdir().unwrap();
        let directory = sysfs.path().join("252:3");
        fs::create_dir(&directory).unwrap();
        symlink(
            format!("../../bus/{subsystem}"),
            directory.join("subsystem"),
        )
        .unwrap();
        fs::write(directory.join("size"), size).unwrap();
        fs::write(directory.join("align"), align).unwrap();
        DeviceDax::told(sysfs.path(), makedev(252, 3))
    }

    /// Size and alignment are the machine's; what is no whole unit cannot be mapped.
    #[test]
    fn a_device_has_the_size_that_the_machine_tells() {
        let device = Some(DeviceDax {
            bytes: 6 << 20,
            align_bytes: 2 << 20,
        });
        assert_eq!(told("dax", "6291456\n", "2097152\n"), device);
        assert_eq!(told("dax", "6295552\n", "2097152\n"), device);
    }

    /// Another kind of device is none, nor is one that is not wholly told about.
    #[test]
    fn other_devices_are_refused() {
        assert_eq!(told("tty", "6291456\n", "2097152\n"), None);
        assert_eq!(told("dax", "6291456\n", "0\n"), None);
        assert_eq!(told("dax", "", "2097152\n"), None);
        // /dev/null
        assert_eq!(DeviceDax::of(makedev(1, 3)), None);
    }
}
