//! Accesses that are answered with an error where a load would be a signal.

/// Whether a system call can read a byte.
pub(crate) fn can_read(at: usize) -> bool {
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: the kernel looks whether there is a byte at the address, and says so if there is none.
    let written = unsafe { libc::write(ends[1], at as *const _, 1) };
    for end in ends {
        // SAFETY: it is ours, and nobody else has it.
        unsafe { libc::close(end) };
    }
    written == 1
}
