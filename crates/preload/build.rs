//! How the library is linked.

fn main() {
    // Every symbol is bound before the program runs: the pager's threads must not enter the loader later.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,now");
    // The library's own calls reach its own functions: nothing that is loaded before it may interpose on it.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
