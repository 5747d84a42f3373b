//! Whatever an image begins with, it is a label that can be believed, or refused.
#![no_main]

#[path = "../../crates/drivers/tests/common/any_label.rs"]
mod any_label;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    any_label::look(bytes);
});
