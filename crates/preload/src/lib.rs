//! The library that `pgmap run` preloads into a program.
//!
//! It interposes the C library's allocator and the calls that make, change and drop anonymous memory, and serves them from
//! memory that pgmap manages. Without a run to join, or where it cannot, every call goes to the C library as if this
//! library were not there. What must never happen here: our own code allocating from managed memory, or a signal
//! handler running while a thread holds one of the pager's locks.

mod advice;
mod alloc;
mod fds;
mod forks;
mod glibc;
mod maps;
mod own;
mod raw;
mod state;

#[global_allocator]
static GLOBAL: own::Own = own::Own::new();

/// Runs when the program is loaded, before its `main`.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

/// Runs when the program ends by returning from `main` or calling `exit`.
#[used]
#[unsafe(link_section = ".fini_array")]
static STOP: extern "C" fn() = stop;

extern "C" fn start() {
    match pgmap::run::start() {
        // Memory is managed from here on: the pager's threads run already, and what they need at their start was
        // allocated by the C library.
        Ok(Some(space)) => state::manage(space),
        Ok(None) => {}
        Err(reason) => eprintln!("pgmap: this process runs in plain memory: {reason}"),
    }
}

extern "C" fn stop() {
    pgmap::run::stop();
}
