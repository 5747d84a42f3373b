//! A thin binding of userfaultfd: one function for each of its ioctls, with partial results told from errors.
//!
//! Layouts and numbers are those of the kernel's user interface (`linux/userfaultfd.h`).

use std::fs::OpenOptions;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use pgmap_core::addr::VirtAddr;
use pgmap_mm::fault::Access;
use pgmap_mm::mmu::Protect;
use rustix::io::Errno;
use rustix::ioctl::{self, Opcode, Updater, opcode};
use rustix::mm::UserfaultfdFlags;

use crate::fds::OurFd;

const GROUP: u8 = 0xAA;
const API: u64 = 0xAA;

pub(crate) const FEATURE_WP: u64 = 1 << 0;
pub(crate) const FEATURE_EVENT_FORK: u64 = 1 << 1;
pub(crate) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(crate) const FEATURE_SIGBUS: u64 = 1 << 7;
pub(crate) const FEATURE_THREAD_ID: u64 = 1 << 8;
pub(crate) const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub(crate) const FEATURE_WP_SHMEM: u64 = 1 << 12;
pub(crate) const FEATURE_POISON: u64 = 1 << 14;
pub(crate) const FEATURE_MOVE: u64 = 1 << 16;

const REGISTER_MISSING: u64 = 1 << 0;
const REGISTER_WP: u64 = 1 << 1;
const REGISTER_MINOR: u64 = 1 << 2;
const COPY_WP: u64 = 1 << 1;
const WRITEPROTECT_WP: u64 = 1 << 0;

const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_FORK: u8 = 0x13;
const PAGEFAULT_WRITE: u64 = 1 << 0;
const PAGEFAULT_WP: u64 = 1 << 1;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `uffdio_copy` and `uffdio_move` have the same shape.
#[repr(C)]
struct Transfer {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// `uffdio_poison` and `uffdio_continue` have the same shape.
#[repr(C)]
struct Fill {
    range: Range,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

const IOCTL_API: Opcode = opcode::read_write::<ApiArg>(GROUP, 0x3F);
const IOCTL_REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0x00);
const IOCTL_UNREGISTER: Opcode = opcode::read::<Range>(GROUP, 0x01);
const IOCTL_WAKE: Opcode = opcode::read::<Range>(GROUP, 0x02);
const IOCTL_COPY: Opcode = opcode::read_write::<Transfer>(GROUP, 0x03);
const IOCTL_MOVE: Opcode = opcode::read_write::<Transfer>(GROUP, 0x05);
const IOCTL_WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(GROUP, 0x06);
const IOCTL_CONTINUE: Opcode = opcode::read_write::<Fill>(GROUP, 0x07);
const IOCTL_POISON: Opcode = opcode::read_write::<Fill>(GROUP, 0x08);

/// A message, as the kernel writes it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct RawMessage {
    event: u8,
    reserved: [u8; 7],
    words: [u64; 3],
}

const _: () = assert!(
    size_of::<ApiArg>() == 24
        && size_of::<Register>() == 32
        && size_of::<Transfer>() == 40
        && size_of::<Fill>() == 32
        && size_of::<WriteProtect>() == 24
        && size_of::<RawMessage>() == 32
);

/// A message, understood.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Message {
    /// An access found no page, or a protected one.
    Fault {
        at: VirtAddr,
        access: Access,
        tid: u32,
    },
    /// The process has forked; the number is a new descriptor for the child, which is the reader's to close.
    Fork { fd: RawFd },
    /// An event that nobody asked for.
    Other,
}

impl RawMessage {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "descriptors and thread ids are 32 bits wide, addresses as wide as usize"
    )]
    pub(crate) fn parse(&self) -> Message {
        let [first, second, third] = self.words;
        match self.event {
            EVENT_PAGEFAULT => Message::Fault {
                at: VirtAddr::new(second as usize).page_start(),
                access: match (first & PAGEFAULT_WP != 0, first & PAGEFAULT_WRITE != 0) {
                    (true, _) => Access::WriteProtected,
                    (false, true) => Access::Write,
                    (false, false) => Access::Read,
                },
                tid: third as u32,
            },
            EVENT_FORK => Message::Fork {
                fd: (first as u32).cast_signed(),
            },
            _ => Message::Other,
        }
    }
}

/// How many bytes an operation did, and why not more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub(crate) bytes: usize,
    pub(crate) error: Option<Errno>,
}

/// A userfaultfd.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OurFd,
}

impl Uffd {
    /// Opens a userfaultfd that serves faults of system calls too. It does nothing before its [`handshake`](Self::handshake).
    ///
    /// # Errors
    ///
    /// The machine forbids it (`EPERM`), or has none (`ENOSYS`).
    pub(crate) fn open() -> Result<Self, Errno> {
        Ok(Self::from_fd(open_fd()?))
    }

    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self { fd: OurFd::new(fd) }
    }

    /// Asks for exactly these features, once; may be repeated after an error. Answers all that the kernel has.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the kernel lacks one, `EPERM` if this process may not have one.
    pub(crate) fn handshake(&self, features: u64) -> Result<u64, Errno> {
        let mut arg = ApiArg {
            api: API,
            features,
            ioctls: 0,
        };
        self.call::<IOCTL_API, _>(&mut arg)?;
        Ok(arg.features)
    }

    /// Asks for the faults of a range: missing pages, and writes to protected ones.
    pub(crate) fn register(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mode = REGISTER_MISSING | REGISTER_WP;
        let mut arg = Register {
            range: range(start, len),
            mode,
            ioctls: 0,
        };
        self.call::<IOCTL_REGISTER, _>(&mut arg)
    }

    /// Asks for the faults of a mapping of shared memory: pages that are not mapped, whether the memory has them or not, and
    /// writes to protected ones.
    pub(crate) fn register_shared(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mode = REGISTER_MISSING | REGISTER_WP | REGISTER_MINOR;
        let mut arg = Register {
            range: range(start, len),
            mode,
            ioctls: 0,
        };
        self.call::<IOCTL_REGISTER, _>(&mut arg)
    }

    /// Asks for missing pages only.
    pub(crate) fn register_missing(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mut arg = Register {
            range: range(start, len),
            mode: REGISTER_MISSING,
            ioctls: 0,
        };
        self.call::<IOCTL_REGISTER, _>(&mut arg)
    }

    /// Asks for no more faults of a range, and wakes who waits there.
    pub(crate) fn unregister(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mut arg = range(start, len);
        self.call::<IOCTL_UNREGISTER, _>(&mut arg)
    }

    /// Copies bytes to missing pages, and wakes who waits for them.
    ///
    /// # Safety
    ///
    /// `src` is valid for reads of `len` bytes.
    pub(crate) unsafe fn copy(
        &self,
        dst: usize,
        src: *const u8,
        len: usize,
        protect: Protect,
    ) -> Done {
        let mode = match protect {
            Protect::ReadOnly => COPY_WP,
            Protect::ReadWrite => 0,
        };
        let mut arg = transfer(dst, src as usize, len, mode);
        let result = self.call::<IOCTL_COPY, _>(&mut arg);
        done(result, arg.done, len)
    }

    /// Moves pages to missing addresses, and wakes who waits there. The destination is registered with this descriptor.
    pub(crate) fn move_pages(&self, dst: usize, src: usize, len: usize) -> Done {
        let mut arg = transfer(dst, src, len, 0);
        let result = self.call::<IOCTL_MOVE, _>(&mut arg);
        done(result, arg.done, len)
    }

    /// Maps pages that a shared memory has, and wakes who waits for them.
    pub(crate) fn map_shared(&self, start: usize, len: usize, protect: Protect) -> Done {
        let mut arg = Fill {
            range: range(start, len),
            mode: match protect {
                Protect::ReadOnly => COPY_WP,
                Protect::ReadWrite => 0,
            },
            done: 0,
        };
        let result = self.call::<IOCTL_CONTINUE, _>(&mut arg);
        done(result, arg.done, len)
    }

    /// Makes missing pages answer with SIGBUS.
    pub(crate) fn poison(&self, start: usize, len: usize) -> Done {
        let mut arg = Fill {
            range: range(start, len),
            mode: 0,
            done: 0,
        };
        let result = self.call::<IOCTL_POISON, _>(&mut arg);
        done(result, arg.done, len)
    }

    /// Ends the write protection of a range, and wakes who waits there.
    pub(crate) fn unprotect(&self, start: usize, len: usize) -> Result<(), Errno> {
        self.write_protect(start, len, 0)
    }

    /// Asks for the next write to each of a range's pages.
    pub(crate) fn protect(&self, start: usize, len: usize) -> Result<(), Errno> {
        self.write_protect(start, len, WRITEPROTECT_WP)
    }

    fn write_protect(&self, start: usize, len: usize, mode: u64) -> Result<(), Errno> {
        let mut arg = WriteProtect {
            range: range(start, len),
            mode,
        };
        self.call::<IOCTL_WRITEPROTECT, _>(&mut arg)
    }

    /// Wakes who waits for a range.
    pub(crate) fn wake(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mut arg = range(start, len);
        self.call::<IOCTL_WAKE, _>(&mut arg)
    }

    /// Reads waiting messages without blocking. Answers how many.
    pub(crate) fn read(&self, messages: &mut [RawMessage]) -> Result<usize, Errno> {
        let len = size_of_val(messages);
        // SAFETY: any bytes make a valid `RawMessage`, and the slice is that long.
        let bytes =
            unsafe { core::slice::from_raw_parts_mut(messages.as_mut_ptr().cast::<u8>(), len) };
        let read = rustix::io::read(&self.fd, bytes)?;
        Ok(read / size_of::<RawMessage>())
    }

    fn call<const OPCODE: Opcode, T>(&self, arg: &mut T) -> Result<(), Errno> {
        // SAFETY: every caller pairs the opcode with the argument that the kernel's header gives it.
        let call = unsafe { Updater::<OPCODE, T>::new(arg) };
        // SAFETY: the argument lives during the call. What the call does to memory is in the range of
        // addresses named in it, which belong to the owner of this descriptor.
        unsafe { ioctl::ioctl(&self.fd, call) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open_fd() -> Result<OwnedFd, Errno> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: the descriptor alone does nothing; ranges are registered by who owns them.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Err(Errno::PERM | Errno::NOSYS) => open_device(flags),
        result => result,
    }
}

/// `/dev/userfaultfd` gives descriptors to whoever may open it, whatever the sysctl says.
fn open_device(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    const NEW: Opcode = opcode::none(GROUP, 0x00);
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    let device = device.map_err(|_| Errno::PERM)?;
    // SAFETY: the argument of this ioctl is the flags themselves, and it answers a new descriptor.
    unsafe { ioctl::ioctl(device, NewUffd::<NEW>(flags)) }
}

struct NewUffd<const OPCODE: Opcode>(UserfaultfdFlags);

// SAFETY: the argument is an integer, and a non-negative answer is a descriptor that nobody owns yet.
unsafe impl<const OPCODE: Opcode> ioctl::Ioctl for NewUffd<OPCODE> {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        core::ptr::without_provenance_mut(self.0.bits() as usize)
    }

    unsafe fn output_from_ptr(
        out: ioctl::IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(out) })
    }
}

const fn range(start: usize, len: usize) -> Range {
    Range {
        start: start as u64,
        len: len as u64,
    }
}

const fn transfer(dst: usize, src: usize, len: usize, mode: u64) -> Transfer {
    Transfer {
        dst: dst as u64,
        src: src as u64,
        len: len as u64,
        mode,
        done: 0,
    }
}

/// Tells a partial result from an error: after an error the kernel leaves the bytes done in the argument, or the
/// negative errno if there are none.
fn done(result: Result<(), Errno>, done: i64, len: usize) -> Done {
    match result {
        Ok(()) => Done {
            bytes: len,
            error: None,
        },
        Err(errno) => match usize::try_from(done) {
            // A partial result is reported as EAGAIN whatever stopped it; the next try says why.
            Ok(bytes) => Done {
                bytes: bytes.min(len),
                error: Some(errno),
            },
            Err(_) => Done {
                bytes: 0,
                error: Some(errno),
            },
        },
    }
}
