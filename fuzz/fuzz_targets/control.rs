//! Whatever a peer says to the control socket, it is answered or refused, and the service lives.
#![no_main]

#[path = "../../crates/server/tests/common/conversation.rs"]
mod conversation;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    conversation::whole(bytes);
});
