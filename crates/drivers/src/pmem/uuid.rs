//! Random names for regions and namespaces, that stay theirs.

use core::fmt;
use core::str::FromStr;

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Where the groups of the written form begin, in bytes.
const GROUPS: [usize; 4] = [4, 6, 8, 10];

/// A random name of 122 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

/// A text is no uuid.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a uuid is 32 hexadecimal digits, such as 6f1e8d2a-3b0c-4d5e-9f60-718293a4b5c6")]
pub struct NoUuid;

impl Uuid {
    /// A name that nothing else has.
    ///
    /// # Errors
    ///
    /// What the machine answers, if it has no random numbers.
    pub fn random() -> Result<Self, Errno> {
        let mut bytes = [0; 16];
        let filled = getrandom(&mut bytes, GetRandomFlags::empty())?;
        if filled != bytes.len() {
            return Err(Errno::IO);
        }
        // Version 4, variant 1: what others expect of a random one.
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if GROUPS.contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Uuid {
    type Err = NoUuid;

    fn from_str(text: &str) -> Result<Self, NoUuid> {
        let digits: Vec<u32> = text
            .chars()
            .filter(|char| *char != '-')
            .map(|char| char.to_digit(16).ok_or(NoUuid))
            .collect::<Result<_, _>>()?;
        let pairs: Vec<u8> = digits
            .chunks_exact(2)
            .filter_map(|pair| u8::try_from(pair[0] << 4 | pair[1]).ok())
            .collect();
        let whole = digits.len() == 32;
        whole
            .then(|| pairs.try_into().ok().map(Self))
            .flatten()
            .ok_or(NoUuid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name is read back as it was written, and two are not the same.
    #[test]
    fn a_uuid_reads_back() {
        let [one, two] = [Uuid::random().unwrap(), Uuid::random().unwrap()];
        assert_ne!(one, two);
        assert_eq!(one.to_string().parse(), Ok(one));
        assert_eq!(one.to_string().len(), 36);
    }

    /// What is no name is an error.
    #[test]
    fn other_texts_are_no_uuid() {
        for text in ["", "6f1e", "6f1e8d2a-3b0c-4d5e-9f60-718293a4b5cx", "é"] {
            assert_eq!(text.parse::<Uuid>(), Err(NoUuid), "{text}");
        }
    }
}
