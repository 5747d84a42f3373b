//! Whatever a client says from the beginning on, the server answers or hangs up, and lives.
#![no_main]

#[path = "../../crates/server/tests/common/session.rs"]
mod session;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    session::whole(bytes);
});
