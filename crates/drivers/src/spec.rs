//! Devices as people write them: `compressed:2G`, `file:/var/tmp/cold.pgmap,size=8G,keep`.
//!
//! The command line parses this; the text then travels to the preloaded process, which parses it again.
//! So what is shown reads back as the same device.

use core::fmt;
use core::str::FromStr;
use std::path::PathBuf;

use crate::compressed::Algorithm;
use crate::faulty::{Fault, Plan, When};
use crate::file::Direct;
pub use crate::size::{ExactSize, SizeError, parse_bytes, parse_size};

/// The level that `algorithm=zstd` means without `level`.
const ZSTD_LEVEL: i32 = 1;
const ZSTD_LEVELS: core::ops::RangeInclusive<i32> = -7..=19;

/// A device, as far as its text says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceSpec {
    /// `compressed:SIZE[,algorithm=lz4|zstd][,level=N]`
    Compressed {
        /// Bytes of RAM for compressed pages.
        capacity_bytes: u64,
        /// How pages are made smaller.
        algorithm: Algorithm,
    },
    /// `file:PATH,size=SIZE[,keep][,direct=auto|off]`
    File {
        /// Where the file is; without a comma, which would end it in the text.
        path: PathBuf,
        /// Bytes of pages that it holds.
        size_bytes: u64,
        /// Whether the file stays in its directory.
        keep: bool,
        /// Whether the page cache is passed by.
        direct: Direct,
    },
    /// `faulty:FAULT@WHEN:DEVICE`: for tests of what happens when a device fails.
    Faulty {
        /// What fails, and when.
        plan: Plan,
        /// The device that does the work otherwise.
        device: Box<DeviceSpec>,
    },
}

/// Why a text is no device. Whoever wrote the text is to change it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SpecError {
    /// The part before the colon is no device.
    #[error("no device is called `{0}`: use compressed:SIZE or file:PATH,size=SIZE")]
    UnknownDevice(String),
    /// A size is missing.
    #[error("{device} needs a size: write {example}")]
    NoSize {
        /// The device.
        device: &'static str,
        /// What would be right.
        example: &'static str,
    },
    /// A size is wrong.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The path is missing, or starts so that it cannot be told from an option.
    #[error("file needs a path first: write file:/var/tmp/cold.pgmap,size=8G")]
    NoPath,
    /// The device has no such option.
    #[error("{device} has no option `{option}`: use {known}")]
    UnknownOption {
        /// The device.
        device: &'static str,
        /// What was written.
        option: String,
        /// What there is.
        known: &'static str,
    },
    /// The option does not take this value.
    #[error("`{option}={value}` is not possible: {option} is {known}")]
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
    /// `level` without `algorithm=zstd`.
    #[error("level is for algorithm=zstd only: add that, or leave level out")]
    LevelWithoutZstd,
    /// The plan of a faulty device is wrong.
    #[error("a faulty device is faulty:load-error|store-error|corrupt@every=N|after=N:DEVICE")]
    BadPlan,
}

impl DeviceSpec {
    /// Bytes that the device may take.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        match self {
            Self::Compressed { capacity_bytes, .. } => *capacity_bytes,
            Self::File { size_bytes, .. } => *size_bytes,
            Self::Faulty { device, .. } => device.capacity_bytes(),
        }
    }
}

impl FromStr for DeviceSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let text = text.trim();
        let (device, rest) = text.split_once(':').unwrap_or((text, ""));
        match device {
            "compressed" => compressed(rest),
            "file" => file(rest),
            "faulty" => faulty(rest),
            unknown => Err(SpecError::UnknownDevice(unknown.to_owned())),
        }
    }
}

fn compressed(text: &str) -> Result<DeviceSpec, SpecError> {
    const DEVICE: &str = "compressed";
    let (size, options) = split(text)?;
    if size.is_empty() || size.contains('=') {
        return Err(SpecError::NoSize {
            device: DEVICE,
            example: "compressed:2G",
        });
    }
    let capacity_bytes = parse_size(size)?;
    let (mut algorithm, mut level) = (Algorithm::Lz4, None);
    for (option, value) in options {
        match (option, value) {
            ("algorithm", Some("lz4")) => algorithm = Algorithm::Lz4,
            ("algorithm", Some("zstd")) => algorithm = Algorithm::Zstd { level: ZSTD_LEVEL },
            ("algorithm", value) => return Err(bad_value("algorithm", value, "lz4 or zstd")),
            ("level", value) => level = Some(zstd_level(value)?),
            (option, _) => {
                return Err(unknown_option(
                    DEVICE,
                    option,
                    "algorithm=lz4|zstd, level=N",
                ));
            }
        }
    }
    match (&mut algorithm, level) {
        (Algorithm::Zstd { level }, Some(given)) => *level = given,
        (Algorithm::Lz4, Some(_)) => return Err(SpecError::LevelWithoutZstd),
        (Algorithm::Lz4 | Algorithm::Zstd { .. }, None) => {}
    }
    Ok(DeviceSpec::Compressed {
        capacity_bytes,
        algorithm,
    })
}

fn zstd_level(value: Option<&str>) -> Result<i32, SpecError> {
    let number = value.and_then(|value| value.parse().ok());
    number
        .filter(|number| ZSTD_LEVELS.contains(number))
        .ok_or_else(|| bad_value("level", value, "a number from -7 to 19"))
}

fn file(text: &str) -> Result<DeviceSpec, SpecError> {
    const DEVICE: &str = "file";
    let (path, options) = split(text)?;
    if path.is_empty() || path.starts_with("size=") {
        return Err(SpecError::NoPath);
    }
    let (mut size_bytes, mut keep, mut direct) = (None, false, Direct::Auto);
    for (option, value) in options {
        match (option, value) {
            ("size", Some(value)) => size_bytes = Some(parse_size(value)?),
            ("keep", None) => keep = true,
            ("direct", Some("auto")) => direct = Direct::Auto,
            ("direct", Some("off")) => direct = Direct::Off,
            ("direct", value) => return Err(bad_value("direct", value, "auto or off")),
            (option, _) => {
                return Err(unknown_option(
                    DEVICE,
                    option,
                    "size=SIZE, keep, direct=auto|off",
                ));
            }
        }
    }
    let example = "file:/var/tmp/cold.pgmap,size=8G";
    let size_bytes = size_bytes.ok_or(SpecError::NoSize {
        device: DEVICE,
        example,
    })?;
    Ok(DeviceSpec::File {
        path: PathBuf::from(path),
        size_bytes,
        keep,
        direct,
    })
}

fn faulty(text: &str) -> Result<DeviceSpec, SpecError> {
    let (plan, device) = text.split_once(':').ok_or(SpecError::BadPlan)?;
    let (fault, when) = plan.split_once('@').ok_or(SpecError::BadPlan)?;
    let (when, count) = when.split_once('=').ok_or(SpecError::BadPlan)?;
    let count = count.parse().map_err(|_| SpecError::BadPlan)?;
    let plan = Plan {
        fault: Fault::ALL
            .into_iter()
            .find(|known| known.name() == fault)
            .ok_or(SpecError::BadPlan)?,
        when: match when {
            "every" => When::Every(count),
            "after" => When::After(count),
            _ => return Err(SpecError::BadPlan),
        },
    };
    Ok(DeviceSpec::Faulty {
        plan,
        device: Box::new(device.parse()?),
    })
}

fn bad_value(option: &'static str, value: Option<&str>, known: &'static str) -> SpecError {
    SpecError::BadValue {
        option,
        value: value.unwrap_or_default().to_owned(),
        known,
    }
}

fn unknown_option(device: &'static str, option: &str, known: &'static str) -> SpecError {
    SpecError::UnknownOption {
        device,
        option: option.to_owned(),
        known,
    }
}

/// An option's name, and its value if there is an equals sign.
type NamedOption<'a> = (&'a str, Option<&'a str>);

/// What comes before the first comma, and the names and values of the options after it; no name twice.
fn split(text: &str) -> Result<(&str, Vec<NamedOption<'_>>), SpecError> {
    let mut fields = text.split(',');
    let first = fields.next().unwrap_or_default();
    let mut options: Vec<NamedOption<'_>> = Vec::new();
    for field in fields {
        let option = field
            .split_once('=')
            .map_or((field, None), |(name, value)| (name, Some(value)));
        if options.iter().any(|(name, _)| *name == option.0) {
            return Err(SpecError::Twice(option.0.to_owned()));
        }
        options.push(option);
    }
    Ok((first, options))
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compressed {
                capacity_bytes,
                algorithm,
            } => {
                write!(f, "compressed:{}", ExactSize(*capacity_bytes))?;
                match algorithm {
                    Algorithm::Lz4 => Ok(()),
                    Algorithm::Zstd { level } => write!(f, ",algorithm=zstd,level={level}"),
                }
            }
            Self::File {
                path,
                size_bytes,
                keep,
                direct,
            } => {
                write!(f, "file:{},size={}", path.display(), ExactSize(*size_bytes))?;
                f.write_str(if *keep { ",keep" } else { "" })?;
                f.write_str(match direct {
                    Direct::Auto => "",
                    Direct::Off => ",direct=off",
                })
            }
            Self::Faulty { plan, device } => write!(f, "faulty:{plan}:{device}"),
        }
    }
}

#[cfg(test)]
mod tests;
