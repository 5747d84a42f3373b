//! The Debian packages that a virtual machine is made of, unpacked where they are in nobody's way.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

/// What is wanted; what these need comes along, unless it is installed.
const WANTED: [&str; 3] = [
    "qemu-system-x86",
    "linux-image-cloud-amd64",
    "busybox-static",
];
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// A directory that looks like a machine's root, with the packages in it.
pub(super) struct Packages {
    root: PathBuf,
}

impl Packages {
    /// Downloads and unpacks the packages, unless they are there.
    pub(super) fn get(place: &Path) -> anyhow::Result<Self> {
        let root = place.join("root");
        if root.exists() {
            return Ok(Self { root });
        }
        // A download that ends in the middle is begun again.
        let (archives, unpacked) = (place.join("archives"), place.join("unpacked"));
        for directory in [&archives, &unpacked] {
            if directory.exists() {
                fs::remove_dir_all(directory)?;
            }
            fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        }
        let names = missing()?;
        println!("dax: downloading {} packages", names.len());
        let mut download = Command::new("apt-get");
        download.arg("--quiet=2").arg("download").args(&names);
        let status = download.current_dir(&archives).status()?;
        ensure!(
            status.success(),
            "apt-get download failed: is `apt-get update` needed?"
        );
        for archive in fs::read_dir(&archives)? {
            let mut unpack = Command::new("dpkg-deb");
            unpack.arg("--extract").arg(archive?.path()).arg(&unpacked);
            ensure!(unpack.status()?.success(), "dpkg-deb failed");
        }
        fs::rename(&unpacked, &root)?;
        Ok(Self { root })
    }

    /// A file of a package.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The emulator, to be given its arguments.
    pub(super) fn qemu(&self) -> Command {
        let mut qemu = Command::new(self.path("usr/bin/qemu-system-x86_64"));
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            qemu.arg("-L").arg(self.path(firmware));
        }
        let libraries = LIBRARIES.map(|directory| self.path(directory).display().to_string());
        qemu.env("LD_LIBRARY_PATH", libraries.join(":"));
        qemu
    }

    /// The kernel.
    pub(super) fn kernel(&self) -> anyhow::Result<PathBuf> {
        first(&self.path("boot"), "vmlinuz-")
    }

    /// Where its modules are.
    pub(super) fn modules(&self) -> anyhow::Result<PathBuf> {
        Ok(first(&self.path("lib/modules"), "")?.join("kernel"))
    }
}

/// A file in a directory whose name begins so.
fn first(directory: &Path, prefix: &str) -> anyhow::Result<PathBuf> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("no {prefix}* in {}", directory.display())
}

/// The packages that an installation would bring. It is not made.
fn missing() -> anyhow::Result<Vec<String>> {
    let mut simulate = Command::new("apt-get");
    simulate.args(["--simulate", "install", "--no-install-recommends"]);
    let output = simulate.args(WANTED).output();
    let output = output.context("cannot run apt-get: this needs Debian")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "apt-get: {errors}");
    let names = text.lines().filter_map(|line| {
        let name = line.strip_prefix("Inst ")?.split(' ').next()?;
        Some(name.to_owned())
    });
    Ok(names.collect())
}
