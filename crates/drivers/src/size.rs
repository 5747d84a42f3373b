//! Sizes as people write them: `512M`, `2GiB`, `4096`.
//!
//! The device specs and the command line call this.

use core::fmt;

use pgmap_core::addr::PAGE_SIZE;

/// Units and how many powers of 1024 they are, largest first.
const UNITS: [(char, u32); 4] = [('T', 4), ('G', 3), ('M', 2), ('K', 1)];

/// Why a text is no size. Whoever wrote the text is to change it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SizeError {
    /// It does not start with digits.
    #[error("`{0}` is no size: write a whole number and a unit, such as 512M or 2G")]
    NoNumber(String),
    /// What follows the digits is no unit.
    #[error("`{0}` has no unit that pgmap knows: use K, M, G or T (powers of 1024), such as 512M")]
    UnknownUnit(String),
    /// It is less than one page.
    #[error("`{0}` is too small: a size is at least one page, 4K")]
    TooSmall(String),
    /// It does not fit in 64 bits.
    #[error("`{0}` is too large: a size is less than 16777216T")]
    TooLarge(String),
}

/// The bytes that `text` stands for: a whole number, and K, M, G or T for powers of 1024, in either
/// case, with `B` or `iB` after it if you like.
///
/// # Errors
///
/// [`SizeError`] if it is no size, or less than a page.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let bytes = parse_bytes(text)?;
    if bytes < PAGE_SIZE as u64 {
        return Err(SizeError::TooSmall(text.trim().to_owned()));
    }
    Ok(bytes)
}

/// The same for what may be less than a page, or nothing at all, such as an offset.
///
/// # Errors
///
/// [`SizeError`] if it is no number of bytes.
pub fn parse_bytes(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::NoNumber(text.to_owned()));
    }
    let Some(power) = power_of_1024(unit) else {
        return Err(SizeError::UnknownUnit(text.to_owned()));
    };
    let number: u64 = number
        .parse()
        .map_err(|_| SizeError::TooLarge(text.to_owned()))?;
    let bytes = number.checked_mul(1 << (10 * power));
    bytes.ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

fn power_of_1024(unit: &str) -> Option<u32> {
    let mut chars = unit.chars();
    let Some(first) = chars.next() else {
        return Some(0);
    };
    let rest = chars.as_str();
    if unit.eq_ignore_ascii_case("b") {
        return Some(0);
    }
    if !(rest.is_empty() || rest.eq_ignore_ascii_case("b") || rest.eq_ignore_ascii_case("ib")) {
        return None;
    }
    UNITS
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(&first))
        .map(|(_, power)| *power)
}

/// A size in the largest unit that says it exactly; [`parse_size`] reads it back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExactSize(pub u64);

impl fmt::Display for ExactSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = |power: u32| self.0 != 0 && self.0.trailing_zeros() >= 10 * power;
        match UNITS.iter().find(|(_, power)| exact(*power)) {
            Some((unit, power)) => write!(f, "{}{unit}", self.0 >> (10 * power)),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("4096", 4096),
            ("8192B", 8192),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("512mb", 512 << 20),
            ("64K", 64 << 10),
            (" 2G ", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn an_offset_may_be_less_than_a_page() {
        assert_eq!(parse_bytes("0"), Ok(0));
        assert_eq!(parse_bytes("1"), Ok(1));
        assert_eq!(parse_bytes("2M"), Ok(2 << 20));
        assert_eq!(parse_bytes("x"), Err(SizeError::NoNumber("x".into())));
    }

    #[test]
    fn what_is_no_size_is_told_apart() {
        for (text, error) in [
            ("", SizeError::NoNumber(String::new())),
            ("-1G", SizeError::NoNumber("-1G".into())),
            ("G", SizeError::NoNumber("G".into())),
            ("64Q", SizeError::UnknownUnit("64Q".into())),
            ("1.5G", SizeError::UnknownUnit("1.5G".into())),
            ("1Gi", SizeError::UnknownUnit("1Gi".into())),
            ("5é", SizeError::UnknownUnit("5é".into())),
            ("0", SizeError::TooSmall("0".into())),
            ("0G", SizeError::TooSmall("0G".into())),
            ("3K", SizeError::TooSmall("3K".into())),
            (
                "99999999999999999999",
                SizeError::TooLarge("99999999999999999999".into()),
            ),
            ("17000000T", SizeError::TooLarge("17000000T".into())),
        ] {
            assert_eq!(parse_size(text), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_shown_size_reads_back(bytes in PAGE_SIZE as u64.., shift in 0_u32..40) {
            let bytes = (bytes >> shift << shift).max(PAGE_SIZE as u64);
            prop_assert_eq!(parse_size(&ExactSize(bytes).to_string()), Ok(bytes));
        }

        #[test]
        fn no_text_makes_it_panic(text in ".*") {
            let _ = parse_size(&text);
        }
    }
}
