//! What happened during a run, in numbers and as people like to read it.

use core::fmt;
use core::time::Duration;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use pgmap::Algorithm;
use pgmap::run::Control;
use pgmap::spec::DeviceSpec;
use serde::{Serialize, Serializer};

/// The numbers of a run: the fields of the report. Names end in their unit; counts have none.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    /// How the program ended: one of these two is null.
    pub(crate) exit_code: Option<i32>,
    pub(crate) signal: Option<i32>,
    pub(crate) elapsed_seconds: f64,
    /// Processes that took part, the program's children included; 0 if nothing was managed.
    pub(crate) managed_processes: u64,
    /// The highest that it was.
    pub(crate) ram_budget_bytes: u64,
    /// The most in RAM at once, as far as the processes said before they ended.
    pub(crate) peak_resident_bytes: u64,
    /// Whether the mapped files of the program were a part of it.
    pub(crate) keeps_mapped_files: bool,
    /// Of all kinds; `counters` has each.
    pub(crate) faults: u64,
    /// The fields of `pgmap::Stats` by their names, in pages or events.
    pub(crate) counters: serde_json::Map<String, serde_json::Value>,
    /// Half of the faults took no longer than this, from their arrival at the pager to their end.
    pub(crate) fault_p50_ns: u64,
    /// 99 of 100 faults took no longer than this.
    pub(crate) fault_p99_ns: u64,
    pub(crate) fault_total_seconds: f64,
    /// In the order in which they are tried; before them those that were unplugged.
    pub(crate) devices: Vec<DeviceSummary>,
}

/// What one device held at most.
#[derive(Debug, Serialize)]
pub(crate) struct DeviceSummary {
    #[serde(serialize_with = "as_text")]
    pub(crate) spec: DeviceSpec,
    pub(crate) peak_pages: u64,
    pub(crate) peak_bytes: u64,
    pub(crate) capacity_bytes: u64,
    /// Bytes of pages for each byte that they took; null if nothing was held.
    pub(crate) ratio: Option<f64>,
}

fn as_text<S: Serializer>(spec: &DeviceSpec, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(spec)
}

const PAGE_BYTES: u64 = 4096;

/// What should not have happened: the counter, and what is said after its number if it is one, and if it is more.
const TROUBLES: [(&str, &str, &str); 6] = [
    (
        "out_of_memory",
        "access found RAM and every device full: the program was killed; give a larger --device, or one more",
        "accesses found RAM and every device full: the program was killed; give a larger --device, or one more",
    ),
    (
        "device_errors_read",
        "page could not be read from a device",
        "pages could not be read from a device",
    ),
    (
        "device_errors_corrupt",
        "page came back corrupted from a device, and was refused",
        "pages came back corrupted from a device, and were refused",
    ),
    (
        "device_errors_write",
        "page could not be written to a device, and stayed in RAM",
        "pages could not be written to a device, and stayed in RAM",
    ),
    (
        "poisoned",
        "page is lost: the program gets SIGBUS where it touches it",
        "pages are lost: the program gets SIGBUS where it touches them",
    ),
    (
        "forks",
        "child that was forked ran in plain memory, outside the budget",
        "children that were forked ran in plain memory, outside the budget",
    ),
];

impl Summary {
    pub(crate) fn new(control: &Control, elapsed: Duration, status: ExitStatus) -> Self {
        let region = control.region();
        let counted = region.stats();
        let devices = control.unplugged().into_iter().chain(control.devices());
        Self {
            exit_code: status.code(),
            signal: status.signal(),
            elapsed_seconds: elapsed.as_secs_f64(),
            managed_processes: region.managed(),
            ram_budget_bytes: control.ram().highest_bytes,
            peak_resident_bytes: region.peak_resident(),
            keeps_mapped_files: control.keeps_mapped_files(),
            faults: counted.faults(),
            counters: counted
                .counters()
                .map(|(name, count)| (name.to_owned(), count.into()))
                .collect(),
            fault_p50_ns: counted.fault_latency.percentile_ns(500),
            fault_p99_ns: counted.fault_latency.percentile_ns(990),
            fault_total_seconds: Duration::from_nanos(counted.fault_latency.total_ns())
                .as_secs_f64(),
            devices: devices
                .map(|device| {
                    let (pages, bytes) = (device.peak_pages, device.peak_bytes);
                    DeviceSummary {
                        spec: device.spec,
                        peak_pages: pages,
                        peak_bytes: bytes,
                        capacity_bytes: device.capacity_bytes,
                        ratio: (bytes > 0).then(|| ratio(pages * PAGE_BYTES, bytes)),
                    }
                })
                .collect(),
        }
    }

    fn counter(&self, name: &str) -> u64 {
        self.counters
            .get(name)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0)
    }
}

#[allow(clippy::cast_precision_loss, reason = "a number for people")]
pub(crate) fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}

/// What is said if no process was managed.
const NOT_MANAGED: &str = "\
pgmap: the program was not managed: it ran in plain memory, without a limit. Either it did not load pgmap's library (it \
is made for another C library, gained rights as it started, or was ended at once), or it could not reach this process \
(another user, another container)";

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.managed_processes == 0 {
            return writeln!(f, "{NOT_MANAGED}");
        }
        let seconds = self.elapsed_seconds;
        writeln!(
            f,
            "pgmap: {seconds:.2} s, {}",
            Plural(self.managed_processes)
        )?;
        let peak = Bytes(self.peak_resident_bytes);
        let budget = Bytes(self.ram_budget_bytes);
        writeln!(f, "  resident    {peak} at most, of a budget of {budget}")?;
        self.faults(f)?;
        self.moves(f)?;
        let mut used = self.devices.iter().filter(|device| device.peak_pages > 0);
        used.try_for_each(|device| device.line(f))?;
        self.troubles(f)
    }
}

impl DeviceSummary {
    fn line(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pages, held) = (Count(self.peak_pages), Bytes(self.peak_bytes));
        let room = Bytes(self.capacity_bytes);
        let name = name(&self.spec);
        write!(
            f,
            "  device      {name}: {pages} pages at most, in {held} of {room}"
        )?;
        match (&self.spec, self.ratio) {
            (DeviceSpec::Compressed { .. }, Some(ratio)) => writeln!(f, " ({ratio:.1} to 1)"),
            // Others take a page for a page.
            _ => writeln!(f),
        }
    }
}

/// A device as people call it; its size is said elsewhere.
fn name(spec: &DeviceSpec) -> String {
    match spec {
        DeviceSpec::Compressed { algorithm, .. } => match algorithm {
            Algorithm::Lz4 => "compressed pool".to_owned(),
            Algorithm::Zstd { level } => format!("compressed pool (zstd, level {level})"),
        },
        DeviceSpec::File { path, .. } => format!("file {}", path.display()),
        DeviceSpec::Faulty { device, .. } => format!("faulty {}", name(device)),
    }
}

impl Summary {
    fn faults(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.faults == 0 {
            return Ok(());
        }
        write!(f, "  faults      {}", Count(self.faults))?;
        let kinds = [
            ("faults_zero_fill", "on new pages"),
            ("faults_bring_back", "on pages on a device"),
            ("faults_give_back", "on pages about to leave"),
            ("faults_write_protect", "on first writes"),
            ("faults_spurious", "on pages just made ready"),
        ];
        let seen = kinds.map(|(name, text)| (self.counter(name), text));
        let seen = seen.iter().filter(|(count, _)| *count > 0);
        for (place, (count, text)) in seen.enumerate() {
            let before = if place == 0 { ":" } else { "," };
            write!(f, "{before} {} {text}", Count(*count))?;
        }
        let waited = Duration::from_secs_f64(self.fault_total_seconds).as_nanos();
        let waited = Nanos(u64::try_from(waited).unwrap_or(u64::MAX));
        let (half, most) = (Nanos(self.fault_p50_ns), Nanos(self.fault_p99_ns));
        writeln!(
            f,
            "\n  waiting     {waited} in faults; half took under {half}, 99% under {most}"
        )
    }

    /// What went where, if anything did.
    fn moves(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, label: &str, name: &str, text: &str| match self
            .counter(name)
        {
            0 => Ok(()),
            count => writeln!(f, "  {label:<11} {} {text}", Count(count)),
        };
        line(
            f,
            "read ahead",
            "readahead_pages",
            "pages made ready before they were touched",
        )?;
        let written = self.counter("pages_stored");
        let unchanged = self.counter("pages_stored_clean");
        if written + unchanged > 0 {
            write!(f, "  moved out   {} pages", Count(written + unchanged))?;
            match unchanged {
                0 => writeln!(f)?,
                _ => writeln!(f, ", {} of them unchanged", Count(unchanged))?,
            }
        }
        line(f, "moved in", "pages_brought_back", "pages")?;
        line(
            f,
            "kept",
            "busy_skipped",
            "times a page in use by the kernel, a device or another process stayed in RAM",
        )
    }

    /// What should not have happened, if it has.
    fn troubles(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, one, many) in TROUBLES {
            match self.counter(name) {
                0 => {}
                1 => writeln!(f, "  note        1 {one}")?,
                count => writeln!(f, "  note        {} {many}", Count(count))?,
            }
        }
        if self.elapsed_seconds > 1.0 && self.fault_total_seconds > self.elapsed_seconds / 4.0 {
            writeln!(
                f,
                "  note        it waited for pages for much of its time: it uses more at once than --ram allows"
            )?;
        }
        if self.peak_resident_bytes <= self.ram_budget_bytes {
            return Ok(());
        }
        if self.keeps_mapped_files {
            writeln!(
                f,
                "  note        mapped files passed the budget for moments: the program touched their pages faster than they are dropped"
            )?;
        } else if self.counter("forks") > 0 {
            writeln!(
                f,
                "  note        before a fork all pages were brought into RAM, over the budget: see fork events in `pgmap doctor`"
            )?;
        }
        Ok(())
    }
}

/// Bytes in units that people use.
#[derive(Clone, Copy)]
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let unit = (self.0.max(1).ilog2() / 10).min(4) as usize;
        if unit == 0 {
            return write!(f, "{} B", self.0);
        }
        write!(f, "{:.1} {}", ratio(self.0, 1 << (10 * unit)), UNITS[unit])
    }
}

/// A count with its digits in groups of three.
pub(crate) struct Count(pub(crate) u64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                write!(f, ",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

struct Nanos(u64);

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0..10_000 => write!(f, "{:.1} us", ratio(self.0, 1000)),
            10_000..1_000_000 => write!(f, "{:.0} us", ratio(self.0, 1000)),
            1_000_000..1_000_000_000 => write!(f, "{:.1} ms", ratio(self.0, 1_000_000)),
            _ => write!(f, "{:.2} s", ratio(self.0, 1_000_000_000)),
        }
    }
}

struct Plural(u64);

impl fmt::Display for Plural {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noun = if self.0 == 1 { "process" } else { "processes" };
        write!(f, "{} {noun} managed", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers are shown as people write them.
    #[test]
    fn numbers_are_shown_as_people_write_them() {
        assert_eq!(Count(1_234_567).to_string(), "1,234,567");
        assert_eq!(Count(12).to_string(), "12");
        assert_eq!(Bytes(64 << 20).to_string(), "64.0 MiB");
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(u64::MAX).to_string(), "16777216.0 TiB");
        assert_eq!(Nanos(4321).to_string(), "4.3 us");
        assert_eq!(Nanos(4_750_000_000).to_string(), "4.75 s");
    }
}
