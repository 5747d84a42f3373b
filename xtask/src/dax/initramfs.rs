//! The files of the virtual machine, as an archive that its kernel unpacks: busybox, the command with its libraries, kernel
//! modules, and what is to be written.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

use super::packages::Packages;

/// What the machine does.
const INIT: &str = include_str!("init.sh");
/// What makes the file system, of this machine.
const MKFS: &str = "/usr/sbin/mkfs.ext4";
/// In the order in which they are loaded, and where they are among the kernel's.
const MODULES: [&str; 6] = [
    "drivers/nvdimm/libnvdimm.ko",
    "drivers/nvdimm/nd_btt.ko",
    "drivers/nvdimm/nd_pmem.ko",
    "drivers/dax/dax_pmem.ko",
    "drivers/dax/device_dax.ko",
    "drivers/acpi/nfit/nfit.ko",
];
/// Directories, each after the one that it is in.
const DIRECTORIES: [&str; 9] = [
    "bin", "dev", "lib", "lib64", "mnt", "modules", "proc", "run", "sys",
];
/// Bytes that are written each way.
const LEN: usize = 4 << 20;
/// Bytes of one NBD request: it goes straight from the socket to the device.
const REQUEST_LEN: u32 = 1 << 20;
/// Where NBD's bytes are written.
const NBD_OFFSET: u64 = 12 << 20;

/// Writes the archive to `path`.
pub(super) fn make(path: &Path, packages: &Packages, command: &Path) -> anyhow::Result<()> {
    let mut archive = Archive::default();
    for directory in DIRECTORIES {
        archive.add(directory, 0o040_755, &[])?;
    }
    archive.add("init", 0o100_755, INIT.as_bytes())?;
    archive.copy("bin/busybox", &packages.path("bin/busybox"))?;
    archive.copy("bin/pgmap", command)?;
    archive.copy("bin/mkfs.ext4", Path::new(MKFS))?;
    let mut needed = libraries(command)?;
    needed.append(&mut libraries(Path::new(MKFS))?);
    for library in needed {
        let name = library.file_name().context("a library without a name")?;
        let name = name.to_string_lossy();
        let directory = if name.starts_with("ld-") {
            "lib64"
        } else {
            "lib"
        };
        archive.copy(&format!("{directory}/{name}"), &library)?;
    }
    let modules = packages.modules()?;
    for module in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.copy(&format!("modules/{name}"), &modules.join(module))?;
    }
    let (direct, nbd) = (pattern(1), pattern(2));
    archive.add("direct", 0o100_644, &direct)?;
    archive.add("nbd", 0o100_644, &nbd)?;
    for export in ["pmem0", "pmem1"] {
        archive.add(
            &format!("{export}.write"),
            0o100_644,
            &writing(export, &nbd),
        )?;
        archive.add(&format!("{export}.read"), 0o100_644, &reading(export))?;
    }
    archive.end()?;
    fs::write(path, archive.bytes).context("cannot write the initramfs")
}

/// The libraries that a program loads, by what the loader says.
fn libraries(program: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(program).output();
    let output = output.context("cannot run ldd")?;
    ensure!(output.status.success(), "ldd failed");
    let text = String::from_utf8_lossy(&output.stdout);
    let words = text.split_whitespace();
    Ok(words
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

/// Bytes that are alike nowhere.
fn pattern(seed: u64) -> Vec<u8> {
    let mut state = seed << 1 | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..LEN / 8).flat_map(|_| next()).collect()
}

/// All that an NBD client sends who writes bytes and flushes.
fn writing(export: &str, bytes: &[u8]) -> Vec<u8> {
    let mut sent = hello(export);
    let mut offset = NBD_OFFSET;
    for piece in bytes.chunks(REQUEST_LEN as usize) {
        sent.extend(request(1, offset, REQUEST_LEN));
        sent.extend_from_slice(piece);
        offset += u64::from(REQUEST_LEN);
    }
    sent.extend(request(3, 0, 0));
    sent.extend(request(2, 0, 0));
    sent
}

/// All that one sends who reads them in one request.
fn reading(export: &str) -> Vec<u8> {
    let mut sent = hello(export);
    let all = u32::try_from(LEN).unwrap_or(0);
    sent.extend(request(0, NBD_OFFSET, all));
    sent.extend(request(2, 0, 0));
    sent
}

/// Names an export, without a word too many: newstyle, and no zeros behind the answer.
fn hello(export: &str) -> Vec<u8> {
    let mut sent = 3_u32.to_be_bytes().to_vec();
    sent.extend_from_slice(b"IHAVEOPT");
    sent.extend(1_u32.to_be_bytes());
    sent.extend(u32::try_from(export.len()).unwrap_or(0).to_be_bytes());
    sent.extend_from_slice(export.as_bytes());
    sent
}

fn request(command: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut sent = 0x2560_9513_u32.to_be_bytes().to_vec();
    sent.extend([0; 2]);
    sent.extend(command.to_be_bytes());
    sent.extend([0; 8]);
    sent.extend(offset.to_be_bytes());
    sent.extend(len.to_be_bytes());
    sent
}

/// An archive in the form that the kernel takes ("newc").
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: u32,
}

impl Archive {
    fn copy(&mut self, name: &str, from: &Path) -> anyhow::Result<()> {
        let bytes = fs::read(from).with_context(|| from.display().to_string())?;
        self.add(name, 0o100_755, &bytes)
    }

    fn add(&mut self, name: &str, mode: u32, bytes: &[u8]) -> anyhow::Result<()> {
        self.files += 1;
        let (number, len) = (self.files, bytes.len());
        let name_len = name.len() + 1;
        write!(
            self.bytes,
            "070701{number:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{len:08x}{:08x}{:08x}{:08x}{:08x}{name_len:08x}{:08x}{name}\0",
            0, 0, 1, 0, 0, 0, 0, 0, 0,
        )?;
        self.pad();
        self.bytes.extend_from_slice(bytes);
        self.pad();
        Ok(())
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.add("TRAILER!!!", 0, &[])
    }

    /// Everything begins at a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
