//! Just enough of ELF to tell whether the loader will preload our library into a program.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// What kind of program a file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Dynamically linked, for this machine.
    Dynamic,
    /// It has no loader.
    Static,
    /// For another machine, or 32 bits.
    Foreign,
    /// No ELF file.
    Other,
}

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_INTERP: u32 = 3;

/// Looks at the headers of a file.
pub(crate) fn kind(file: &File) -> Kind {
    let mut header = [0u8; HEADER];
    if file.read_exact_at(&mut header, 0).is_err() || &header[..4] != b"\x7fELF" {
        return Kind::Other;
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (class_64, little_endian) = (header[4] == 2, header[5] == 1);
    if !class_64 || !little_endian || half(18) != MACHINE {
        return Kind::Foreign;
    }
    let mut offset_bytes = [0; 8];
    offset_bytes.copy_from_slice(&header[32..40]);
    let (offset, size, count) = (u64::from_le_bytes(offset_bytes), half(54), half(56));
    if usize::from(size) != PROGRAM_HEADER {
        return Kind::Foreign;
    }
    let interpreted = (0..count).any(|number| {
        let mut kind = [0u8; 4];
        let at = offset.saturating_add(u64::from(number) * u64::from(size));
        file.read_exact_at(&mut kind, at).is_ok() && u32::from_le_bytes(kind) == PT_INTERP
    });
    if interpreted {
        Kind::Dynamic
    } else {
        Kind::Static
    }
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// This very test is a dynamic program; a text is none.
    #[test]
    fn a_dynamic_program_is_recognised() {
        let own = File::open("/proc/self/exe").unwrap();
        assert_eq!(kind(&own), Kind::Dynamic);
        let mut text = tempfile::tempfile().unwrap();
        text.write_all(&[b'#'; 200]).unwrap();
        assert_eq!(kind(&text), Kind::Other);
    }

    /// A header that was cut short or lies about its tables is no reason to fail.
    #[test]
    fn a_lying_header_is_refused() {
        let mut bytes = std::fs::read("/proc/self/exe").unwrap()[..HEADER].to_vec();
        bytes[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        assert_eq!(kind(&file), Kind::Static);
    }
}
