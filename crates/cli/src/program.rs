//! The program that is to run: where it is, and whether our library can be preloaded into it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::{elf, output};

/// Scripts that name scripts that name ... end here.
const MOST_INTERPRETERS: usize = 4;
const SETUID: u32 = 0o4000;
const SETGID: u32 = 0o2000;

/// Why a program cannot be run, with the exit status that shells use for it.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: u8,
    message: String,
}

const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

impl Refusal {
    /// Why a program that was found could not be started.
    pub(crate) fn not_started(path: &Path, error: &std::io::Error) -> Self {
        let shown = path.display();
        let message = match error.raw_os_error() {
            Some(libc::ENOENT) => format!("{shown}: the interpreter that it names does not exist"),
            _ => format!("{shown}: {error}"),
        };
        Self {
            status: NOT_EXECUTABLE,
            message,
        }
    }

    /// Says so, and answers the status to leave with.
    pub(crate) fn tell(&self) -> ExitCode {
        output::tell(format_args!("pgmap: {}\n", self.message));
        ExitCode::from(self.status)
    }
}

/// Finds a program as a shell would, and checks that it can be managed.
pub(crate) fn resolve(name: &OsStr) -> Result<PathBuf, Refusal> {
    let path = find(name)?;
    check(&path, MOST_INTERPRETERS)?;
    Ok(path)
}

/// Finds a program as a shell would, whatever it is.
pub(crate) fn find(name: &OsStr) -> Result<PathBuf, Refusal> {
    let shown = name.to_string_lossy();
    if name.is_empty() {
        return refuse(
            NOT_FOUND,
            "the program's name is empty: write one after `--`".to_owned(),
        );
    }
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return match path.metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                refuse(NOT_EXECUTABLE, format!("{shown}: permission denied"))
            }
            Err(_) => refuse(NOT_FOUND, format!("{shown}: no such program")),
            Ok(_) if is_executable(&path) => Ok(path),
            Ok(_) => refuse(NOT_EXECUTABLE, format!("{shown}: not an executable file")),
        };
    }
    let search = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    let mut found_other = false;
    for directory in std::env::split_paths(&search) {
        let path = directory.join(name);
        if is_executable(&path) {
            return Ok(path);
        }
        found_other |= path.is_file();
    }
    if found_other {
        return refuse(NOT_EXECUTABLE, format!("{shown}: not an executable file"));
    }
    refuse(NOT_FOUND, format!("{shown}: no such program in PATH"))
}

fn is_executable(path: &Path) -> bool {
    let executable = rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    executable && path.is_file()
}

/// Refuses what the loader would not preload our library into.
fn check(path: &Path, interpreters_left: usize) -> Result<(), Refusal> {
    let shown = path.display();
    // A program that may be executed but not read cannot be looked into; it will say itself what happens.
    let Ok(file) = File::open(path) else {
        return Ok(());
    };
    if gives_privileges(&file) {
        return refuse(
            crate::USAGE,
            format!(
                "{shown} is setuid, setgid or has file capabilities: the loader preloads nothing into it; \
                 run a plain copy of it"
            ),
        );
    }
    match elf::kind(&file) {
        elf::Kind::Dynamic => Ok(()),
        elf::Kind::Static => refuse(
            crate::USAGE,
            format!(
                "{shown} is statically linked: nothing can be preloaded into it; use a dynamically linked build"
            ),
        ),
        elf::Kind::Foreign => refuse(
            crate::USAGE,
            format!(
                "{shown} is for another machine or 32 bits: pgmap manages programs of its own kind only"
            ),
        ),
        // Whatever it is, `execvp` would hand it to a shell.
        elf::Kind::Other if !is_script(&file) => refuse(
            NOT_EXECUTABLE,
            format!("{shown}: neither a program, nor a script whose first line starts with #!"),
        ),
        elf::Kind::Other => match interpreter(&file) {
            Some(interpreter) if interpreters_left > 0 => {
                check(&interpreter, interpreters_left - 1)
            }
            _ => Ok(()),
        },
    }
}

/// Whether a program gets rights that we do not have; the loader takes no advice then.
fn gives_privileges(file: &File) -> bool {
    let Ok(data) = file.metadata() else {
        return false;
    };
    let mode = data.permissions().mode();
    let uid = rustix::process::getuid();
    let setuid = mode & SETUID != 0 && data.uid() != uid.as_raw();
    let setgid = mode & SETGID != 0 && data.gid() != rustix::process::getgid().as_raw();
    let has_capabilities = rustix::fs::fgetxattr_query(file, "security.capability").is_ok();
    // Root has them all, so nothing is gained.
    setuid || setgid || has_capabilities && !uid.is_root()
}

fn is_script(file: &File) -> bool {
    let mut start = [0; 2];
    file.read_exact_at(&mut start, 0).is_ok() && &start == b"#!"
}

/// The program that runs a script: the one that it names, or the one that `env` would find.
fn interpreter(file: &File) -> Option<PathBuf> {
    let mut head = Vec::new();
    file.take(256).read_to_end(&mut head).ok()?;
    let line = head
        .strip_prefix(b"#!")?
        .split(|byte| *byte == b'\n')
        .next()?;
    let mut words = line
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let path = PathBuf::from(OsStr::from_bytes(words.next()?));
    if path.file_name() != Some(OsStr::new("env")) {
        return Some(path);
    }
    let program = words.find(|word| !word.starts_with(b"-") && !word.contains(&b'='))?;
    find(OsStr::from_bytes(program)).ok()
}

fn refuse<T>(status: u8, message: String) -> Result<T, Refusal> {
    Err(Refusal { status, message })
}
