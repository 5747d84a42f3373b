//! Persistent memory as people write it: `disk.img,size=1G`, `memory,size=512M,mode=devdax`, `/dev/dax0.0`.
//!
//! The server's command line and its configuration file parse this.

use core::fmt;
use core::str::FromStr;
use std::path::PathBuf;

use super::namespace::{Align, HugePage, MapLocation, Mode, Wanted};
use crate::size::{ExactSize, SizeError, parse_size};

const OPTIONS: &str =
    "size=SIZE, mode=fsdax|devdax|raw, align=4K|2M|1G, map=mem|dev, huge=2M|1G, overwrite";

/// Where a region's bytes are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// In a file, or in a device-dax.
    Image(PathBuf),
    /// In memory that is gone with the server.
    Memory,
}

/// What becomes of a file that has bytes, and no label.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Foreign {
    /// It is refused.
    Refuse,
    /// It becomes a fresh image; its bytes are lost.
    Overwrite,
}

/// A region, as far as its text says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PmemSpec {
    /// Where its bytes are.
    pub source: Source,
    /// How many bytes; an image that exists knows that itself.
    pub size_bytes: Option<u64>,
    /// How the first namespace of a fresh image is used; [`Mode::Raw`] is a file without a label.
    pub mode: Mode,
    /// The unit in which the first namespace of a fresh image is mapped.
    pub align: Align,
    /// Where the metadata of a fresh image's first namespace lives.
    pub map: MapLocation,
    /// The pages that memory is made of; the usual ones if that is not said.
    pub huge: Option<HugePage>,
    /// What becomes of a file of another program.
    pub foreign: Foreign,
}

/// Why a text is no region. Whoever wrote the text is to change it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SpecError {
    /// The path is missing.
    #[error("pmem needs a path first, or `memory`: write disk.img,size=1G or memory,size=1G")]
    NoPath,
    /// It is where a run's pages go.
    #[error(
        "`{0}` is a device of `pgmap run`: write disk.img,size=1G or memory,size=1G (and ./{0} for a file of this name)"
    )]
    RunDevice(String),
    /// Memory has no size of its own.
    #[error("memory needs a size: write memory,size=1G")]
    NoSize,
    /// A size is wrong.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// There is no such option.
    #[error("pmem has no option `{0}`: use {OPTIONS}")]
    UnknownOption(String),
    /// An option does not take this value.
    #[error("`{option}={value}` is not possible: use {known}")]
    BadValue {
        /// The option.
        option: &'static str,
        /// What was written.
        value: String,
        /// What there is.
        known: &'static str,
    },
    /// An option is given twice.
    #[error("the option `{0}` is given twice: leave one out")]
    Twice(String),
    /// Two options do not go together.
    #[error("{0} has no meaning with mode=raw: leave it out")]
    NotRaw(&'static str),
    /// Only a file has bytes of somebody else.
    #[error("overwrite is for images: leave it out")]
    OverwriteMemory,
    /// Only memory is made of pages of a size that we choose.
    #[error("huge pages are for memory: write memory,size=1G,huge=2M, or leave huge out")]
    HugeImage,
}

impl PmemSpec {
    /// The first namespace of a fresh image. What is made of huge pages is mapped in no smaller unit.
    #[must_use]
    pub fn wanted(&self) -> Wanted {
        let huge = self.huge.map_or(Align::Page, HugePage::align);
        Wanted {
            mode: self.mode,
            align: self.align.max(huge),
            map: match self.source {
                Source::Image(_) => self.map,
                // The device is RAM.
                Source::Memory => MapLocation::Mem,
            },
            ..Wanted::default()
        }
    }

    fn set(&mut self, option: &str, value: Option<&str>) -> Result<(), SpecError> {
        match (option, value) {
            ("size", Some(value)) => self.size_bytes = Some(parse_size(value)?),
            ("mode", Some(value)) => self.mode = word("mode", value)?,
            ("align", Some(value)) => self.align = word("align", value)?,
            ("map", Some(value)) => self.map = word("map", value)?,
            ("huge", Some(value)) => self.huge = Some(word("huge", value)?),
            ("overwrite", None) => self.foreign = Foreign::Overwrite,
            (option, _) => return Err(SpecError::UnknownOption(option.to_owned())),
        }
        Ok(())
    }

    /// Whether the options go together; `given` are those that were written.
    fn check(&self, given: &[&str]) -> Result<(), SpecError> {
        if self.source == Source::Memory && self.size_bytes.is_none() {
            return Err(SpecError::NoSize);
        }
        if self.source == Source::Memory && self.foreign == Foreign::Overwrite {
            return Err(SpecError::OverwriteMemory);
        }
        if self.source != Source::Memory && self.huge.is_some() {
            return Err(SpecError::HugeImage);
        }
        let odd = ["align", "map", "overwrite"]
            .into_iter()
            .find(|odd| given.contains(odd));
        match (self.mode, odd) {
            (Mode::Raw, Some(odd)) => Err(SpecError::NotRaw(odd)),
            (Mode::Raw | Mode::Fsdax | Mode::Devdax, _) => Ok(()),
        }
    }
}

fn word<T: FromStr<Err = super::namespace::UnknownWord>>(
    option: &'static str,
    value: &str,
) -> Result<T, SpecError> {
    value
        .parse()
        .map_err(|unknown: T::Err| SpecError::BadValue {
            option,
            value: value.to_owned(),
            known: unknown.known,
        })
}

impl FromStr for PmemSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut fields = text.trim().split(',');
        let source = match fields.next() {
            None | Some("") => return Err(SpecError::NoPath),
            Some(option) if option.starts_with("size=") => return Err(SpecError::NoPath),
            Some("memory") => Source::Memory,
            Some(device) if device.starts_with("compressed:") || device.starts_with("file:") => {
                return Err(SpecError::RunDevice(device.to_owned()));
            }
            Some(path) => Source::Image(PathBuf::from(path)),
        };
        let wanted = Wanted::default();
        let mut spec = Self {
            source,
            size_bytes: None,
            mode: wanted.mode,
            align: wanted.align,
            map: wanted.map,
            huge: None,
            foreign: Foreign::Refuse,
        };
        let mut given = Vec::new();
        for field in fields {
            let (option, value) = field
                .split_once('=')
                .map_or((field, None), |(name, value)| (name, Some(value)));
            if given.contains(&option) {
                return Err(SpecError::Twice(option.to_owned()));
            }
            spec.set(option, value)?;
            given.push(option);
        }
        spec.check(&given)?;
        Ok(spec)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(path) => write!(f, "{}", path.display()),
            Self::Memory => f.write_str("memory"),
        }
    }
}

impl fmt::Display for PmemSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        if let Some(bytes) = self.size_bytes {
            write!(f, ",size={}", ExactSize(bytes))?;
        }
        let usual = Wanted::default();
        if self.mode != usual.mode {
            write!(f, ",mode={}", self.mode)?;
        }
        if self.align != usual.align {
            write!(f, ",align={}", self.align)?;
        }
        if self.map != usual.map {
            write!(f, ",map={}", self.map)?;
        }
        if let Some(huge) = self.huge {
            write!(f, ",huge={huge}")?;
        }
        f.write_str(match self.foreign {
            Foreign::Refuse => "",
            Foreign::Overwrite => ",overwrite",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn error(text: &str) -> String {
        text.parse::<PmemSpec>().unwrap_err().to_string()
    }

    /// A path is enough, and what is not said is usual.
    #[test]
    fn a_path_is_enough() {
        let spec: PmemSpec = "disk.img".parse().unwrap();
        assert_eq!(spec.source, Source::Image("disk.img".into()));
        assert_eq!((spec.size_bytes, spec.wanted()), (None, Wanted::default()));
    }

    /// Everything can be said, and what is shown reads back as the same.
    #[test]
    fn what_is_shown_reads_back() {
        for text in [
            "disk.img",
            "/a/b.img,size=1G",
            "disk.img,size=3G,mode=devdax,align=1G,map=dev,overwrite",
            "memory,size=512M,align=4K",
            "other.img,mode=raw",
            "memory,size=1G,huge=2M",
            "memory,size=2G,align=1G,huge=1G",
        ] {
            let spec: PmemSpec = text.parse().unwrap();
            assert_eq!(spec.to_string(), text);
            assert_eq!(spec.to_string().parse(), Ok(spec));
        }
    }

    /// Each error says what to write instead.
    #[test]
    fn errors_say_what_to_do() {
        for (text, part) in [
            ("", "pmem needs a path first"),
            ("size=1G", "pmem needs a path first"),
            ("compressed:1G", "is a device of `pgmap run`"),
            ("file:/a,size=1G", "./file:/a for a file"),
            ("memory", "memory needs a size: write memory,size=1G"),
            ("memory,size=1G,overwrite", "overwrite is for images"),
            ("a,size=1", "at least one page"),
            ("a,size=1G,size=2G", "`size` is given twice"),
            (
                "a,mode=dax",
                "`mode=dax` is not possible: use fsdax, devdax or raw",
            ),
            ("a,align=4M", "use 4K, 2M or 1G"),
            (
                "memory,size=1G,huge=4K",
                "`huge=4K` is not possible: use 2M or 1G",
            ),
            ("a,size=1G,huge=2M", "huge pages are for memory"),
            ("a,map", "no option `map`: use size=SIZE"),
            ("a,keep", "no option `keep`"),
            ("a,mode=raw,align=4K", "align has no meaning with mode=raw"),
        ] {
            assert!(error(text).contains(part), "{text}: {}", error(text));
        }
    }

    /// DAX-1: what is made of huge pages is mapped in units of them, or larger ones.
    #[test]
    fn huge_pages_are_mapped_whole() {
        for (text, align) in [
            ("memory,size=1G,huge=1G", Align::Pud),
            ("memory,size=1G,huge=2M,align=4K", Align::Pmd),
            ("memory,size=1G,huge=2M,align=1G", Align::Pud),
        ] {
            assert_eq!(text.parse::<PmemSpec>().unwrap().wanted().align, align);
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".*") {
            let _ = text.parse::<PmemSpec>();
        }
    }
}
