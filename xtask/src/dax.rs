//! `cargo xtask dax`: `pgmap serve` on persistent memory that has no page cache, in a virtual machine whose power is cut.
//!
//! The machine is Debian's kernel under qemu, with two NVDIMMs: one is a device-dax, on the other is an ext4 with `-o dax`. It
//! also has a huge page of 1 GiB, which few machines have to spare. What is needed is downloaded as packages and unpacked among the build's files; nothing is installed. What cannot be shown here is
//! that a write-back is needed: the machine's CPU caches nothing, so a cut loses no store.

mod initramfs;
mod packages;

use core::time::Duration;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc;

use anyhow::{Context, bail};

use self::packages::Packages;

/// How long a boot may take, and what is done then: it takes 10 s where nothing accelerates it.
const PATIENCE: Duration = Duration::from_mins(3);
/// Bytes of the device-dax.
const DEVDAX_BYTES: u64 = 256 << 20;
/// Bytes of the file system.
const EXT4_BYTES: u64 = 128 << 20;

/// Writes, cuts the power, boots again, and looks.
pub(crate) fn dax(root: &Path) -> anyhow::Result<()> {
    crate::cargo(&["build", "--release", "-p", "pgmap-cli"].map(str::to_owned))?;
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| root.join("target"), PathBuf::from);
    let place = target.join("dax");
    let packages = Packages::get(&place)?;
    let machine = Machine {
        initramfs: place.join("initramfs"),
        devdax: place.join("devdax"),
        ext4: place.join("ext4"),
        packages,
    };
    initramfs::make(
        &machine.initramfs,
        &machine.packages,
        &target.join("release/pgmap"),
    )?;
    machine.clear()?;
    machine.run_until("dax=write", "flushed")?;
    machine.run_until("dax=check", "found")?;
    println!("dax: what was flushed was found after the power was cut");
    Ok(())
}

/// A machine that is not running.
struct Machine {
    packages: Packages,
    initramfs: PathBuf,
    devdax: PathBuf,
    ext4: PathBuf,
}

impl Machine {
    /// Makes both NVDIMMs as they come from the shop.
    fn clear(&self) -> anyhow::Result<()> {
        for (path, bytes) in [(&self.devdax, DEVDAX_BYTES), (&self.ext4, EXT4_BYTES)] {
            let file = std::fs::File::create(path).context("cannot make an NVDIMM")?;
            file.set_len(bytes)?;
        }
        Ok(())
    }

    /// Boots, waits until the machine says a word, and cuts its power.
    fn run_until(&self, argument: &str, word: &str) -> anyhow::Result<()> {
        let mut running = self.start(argument)?;
        let output = running.stdout.take().context("no output")?;
        let (line, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let output = BufReader::new(output).split(b'\n').map_while(Result::ok);
            for bytes in output {
                // Nobody listens any more once the power is cut.
                let _ = line.send(String::from_utf8_lossy(&bytes).trim_end().to_owned());
            }
        });
        let said = loop {
            let Ok(said) = lines.recv_timeout(PATIENCE) else {
                break Err("it said nothing".to_owned());
            };
            println!("| {said}");
            match said.split_once("dax: ") {
                Some((_, said)) if said == word => break Ok(()),
                Some((_, said)) => break Err(said.to_owned()),
                None => {}
            }
        };
        // SIGKILL: qemu has no moment to put anything in order.
        running.kill()?;
        running.wait()?;
        match said {
            Ok(()) => Ok(()),
            Err(said) => bail!("the machine did not say `{word}`: {said}"),
        }
    }

    fn start(&self, argument: &str) -> anyhow::Result<Child> {
        let mut qemu = self.packages.qemu();
        // The CPU is qemu's own: it has clwb, and any machine can be it.
        qemu.args(["-machine", "q35,nvdimm=on,accel=tcg", "-cpu", "max"]);
        qemu.args(["-m", "4G,slots=2,maxmem=8G", "-smp", "2"]);
        let parts = [(&self.devdax, DEVDAX_BYTES), (&self.ext4, EXT4_BYTES)];
        for (number, (path, bytes)) in parts.into_iter().enumerate() {
            let path = path.display();
            let object =
                format!("memory-backend-file,id=mem{number},share=on,mem-path={path},size={bytes}");
            let device = format!("nvdimm,id=nvdimm{number},memdev=mem{number}");
            qemu.args(["-object", &object, "-device", &device]);
        }
        qemu.arg("-kernel").arg(self.packages.kernel()?);
        qemu.arg("-initrd").arg(&self.initramfs);
        let line = format!("console=ttyS0 panic=-1 quiet hugepagesz=1G hugepages=1 {argument}");
        qemu.args(["-append", &line, "-nodefaults", "-display", "none"]);
        qemu.args(["-serial", "stdio", "-no-reboot"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        qemu.spawn().context("cannot run qemu")
    }
}
