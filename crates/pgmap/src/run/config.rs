//! One device of a run, as its supervisor describes it to the processes: a line of text.

use core::fmt;
use core::ops::Range;
use core::str::FromStr;
use std::path::PathBuf;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_drivers::spec::DeviceSpec;

/// One device of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Devices are counted as they are added, and no number is used twice in a run: the lower is tried first.
    pub number: u32,
    /// What the user wrote.
    pub spec: DeviceSpec,
    /// For a file: where the processes find the supervisor's open file, and its table's first word.
    pub opened: Option<(PathBuf, usize)>,
}

impl DeviceConfig {
    /// The name by which people call the device, such as `compressed0` or `file1`.
    #[must_use]
    pub fn name(&self) -> String {
        let kind = match self.spec {
            DeviceSpec::Compressed { .. } => "compressed",
            DeviceSpec::File { .. } => "file",
            DeviceSpec::Faulty { .. } => "faulty",
        };
        format!("{kind}{}", self.number)
    }

    /// Where in the shared tables the slots of a file are: in words.
    #[must_use]
    pub fn table(&self) -> Option<Range<usize>> {
        let (_, start) = self.opened.as_ref()?;
        let pages = self.spec.capacity_bytes() / PAGE_SIZE as u64;
        Some(*start..start.checked_add(usize::try_from(pages).ok()?)?)
    }
}

impl fmt::Display for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.number)?;
        if let Some((path, table)) = &self.opened {
            write!(f, "{table} {} ", path.display())?;
        }
        write!(f, "{}", self.spec)
    }
}

/// A description that is none: another version wrote it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the description of a device cannot be read")]
pub struct Unreadable;

impl FromStr for DeviceConfig {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Self, Unreadable> {
        let (number, rest) = text.split_once(' ').ok_or(Unreadable)?;
        // A specification begins with a word and a colon, a table is a number.
        let opened = rest.split_once(' ').and_then(|(table, rest)| {
            let (path, rest) = rest.split_once(' ')?;
            Some(((PathBuf::from(path), table.parse().ok()?), rest))
        });
        let (opened, spec) = opened.map_or((None, rest), |(opened, spec)| (Some(opened), spec));
        Ok(Self {
            number: number.parse().map_err(|_| Unreadable)?,
            spec: spec.parse().map_err(|_| Unreadable)?,
            opened,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the supervisor writes, a process reads.
    #[test]
    fn a_description_is_read_as_it_was_written() {
        for (spec, opened, name) in [
            ("compressed:1G,algorithm=zstd,level=3", None, "compressed7"),
            (
                "file:/var/tmp/a b c,size=1G,keep",
                Some((PathBuf::from("/proc/1/fd/3"), 12)),
                "file7",
            ),
            ("faulty:load-error@after=3:compressed:1G", None, "faulty7"),
        ] {
            let spec = spec.parse().unwrap();
            let config = DeviceConfig {
                number: 7,
                spec,
                opened,
            };
            assert_eq!(config.to_string().parse(), Ok(config.clone()));
            assert_eq!(config.name(), name);
        }
    }
}
