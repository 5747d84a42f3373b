//! What lints cannot keep: the direction of dependencies, the length of files, where atomics and unsafe code may be
//! named, and that the kernel map tells the truth.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The longest file, in lines.
const MOST_LINES: usize = 600;
/// Who may depend on whom: on crates that stand before it.
const ORDER: [&str; 11] = [
    "pgmap-sync",
    "pgmap-core",
    "pgmap-mm",
    "pgmap-lab",
    "pgmap-host",
    "pgmap-drivers",
    "pgmap",
    "pgmap-preload",
    "pgmap-server",
    "pgmap-cli",
    "xtask",
];
/// Where the machine's atomics may be named besides the facade, and why.
const ATOMICS: [(&str, &str); 3] = [
    ("crates/sync/", "the facade itself"),
    (
        "crates/preload/",
        "statics of a process that no model runs; the models' atomics cannot be in statics",
    ),
    (
        "crates/cli/src/supervisor.rs",
        "a static that signal handlers read",
    ),
];
/// Where unsafe code may be.
const UNSAFE: [&str; 31] = [
    "crates/sync/",
    "crates/core/",
    "crates/host/",
    "crates/preload/",
    "crates/lab/",
    "crates/drivers/tests/common/mapping.rs",
    "crates/mm/src/devices.rs",
    "crates/mm/src/fault.rs",
    "crates/mm/src/fork.rs",
    "crates/mm/src/mmu.rs",
    // The modelled memory below a page cache.
    "crates/mm/src/page_cache/model.rs",
    "crates/mm/src/reclaim.rs",
    "crates/mm/src/shared_mmu.rs",
    "crates/pgmap/src/file.rs",
    "crates/pgmap/src/io.rs",
    "crates/pgmap/src/memory.rs",
    "crates/pgmap/src/shared.rs",
    "crates/pgmap/src/space.rs",
    // They fork.
    "crates/pgmap/tests/blocks.rs",
    "crates/pgmap/tests/common/fork.rs",
    "crates/pgmap/tests/common/touch.rs",
    "crates/pgmap/tests/forks.rs",
    // It drops pages past the library.
    "crates/pgmap/tests/private_files.rs",
    "crates/cli/src/supervisor.rs",
    "crates/cli/src/workload.rs",
    "crates/cli/tests/",
    "xtask/src/bench/files/random.rs",
    "xtask/src/bench/files/registered.rs",
    "xtask/src/bench/files/streams.rs",
    "xtask/src/bench/floor.rs",
    "xtask/src/bench/pages.rs",
];

/// Checks the repository, and names everything that is wrong.
pub(crate) fn tidy(root: &Path) -> anyhow::Result<()> {
    let mut wrong = Vec::new();
    let mut sources = BTreeMap::new();
    for path in rust_files(root)? {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let name = path
            .strip_prefix(root)
            .unwrap_or(&path)
            .display()
            .to_string();
        wrong.extend(source(&name, &text));
        sources.insert(name, text);
    }
    for manifest in manifests(root)? {
        let text = fs::read_to_string(&manifest)?;
        wrong.extend(self::manifest(&manifest.display().to_string(), &text));
    }
    let map = fs::read_to_string(root.join("docs/kernel-map.md"))?;
    wrong.extend(kernel_map(&map, &sources));
    for line in &wrong {
        eprintln!("{line}");
    }
    if !wrong.is_empty() {
        bail!("{} things are not tidy", wrong.len());
    }
    println!("tidy: {} files", sources.len());
    Ok(())
}

fn rust_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut directories = vec![root.join("crates"), root.join("xtask")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    Ok(files)
}

fn manifests(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut manifests = vec![root.join("xtask/Cargo.toml")];
    for entry in fs::read_dir(root.join("crates"))? {
        manifests.push(entry?.path().join("Cargo.toml"));
    }
    Ok(manifests)
}

/// What is wrong with one source file.
fn source(name: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if text.lines().count() > MOST_LINES {
        wrong.push(format!("{name}: more than {MOST_LINES} lines"));
    }
    let code = || {
        text.lines()
            .filter(|line| !line.trim_start().starts_with("//"))
    };
    let named = |what: &str| code().any(|line| line.contains(what));
    let atomic = ["core", "std"].map(|root| format!("{root}::sync::atomic"));
    let excepted = ATOMICS.iter().any(|(place, _)| name.starts_with(place));
    if !excepted && atomic.iter().any(|atomic| named(atomic)) {
        wrong.push(format!("{name}: atomics come from pgmap_sync::atomic"));
    }
    let shapes = [" {", " fn", " impl", " trait", " extern", "("];
    let mut shapes = shapes.map(|rest| format!("{}{rest}", "unsafe")).into_iter();
    let allowed = UNSAFE.iter().any(|place| name.starts_with(place));
    if !allowed && shapes.any(|shape| named(&shape)) {
        wrong.push(format!("{name}: unsafe code has no place here"));
    }
    if named(&format!("#[{}", "ignore")) {
        wrong.push(format!("{name}: a test is ignored"));
    }
    wrong
}

/// What is wrong with one crate's manifest.
fn manifest(path: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if !text.contains("[lints]\nworkspace = true") {
        wrong.push(format!("{path}: no `[lints] workspace = true`"));
    }
    let place = |name: &str| ORDER.iter().position(|other| *other == name);
    let (mut section, mut own) = ("", "");
    for line in text.lines() {
        if line.starts_with('[') {
            section = line;
        }
        let key = line.split(['=', ' ', '.']).next().unwrap_or_default();
        if section == "[package]" && key == "name" {
            own = line.split('"').nth(1).unwrap_or_default();
        }
        // Tests may use what stands above: a crate's tests are no part of it.
        let depends = section.ends_with("dependencies]") && !section.contains("dev-dependencies");
        if !depends || !key.starts_with("pgmap") {
            continue;
        }
        match (place(own), place(key)) {
            (Some(own), Some(other)) if other < own => {}
            _ => wrong.push(format!("{path}: {own} must not depend on {key}")),
        }
    }
    wrong
}

/// Which Rust paths of the kernel map do not exist.
fn kernel_map(map: &str, sources: &BTreeMap<String, String>) -> Vec<String> {
    let mut wrong = Vec::new();
    for row in map.lines().filter(|line| line.starts_with("| `")) {
        let Some(path) = row.rsplit('`').nth(1) else {
            continue;
        };
        if !exists(path, sources) {
            wrong.push(format!("docs/kernel-map.md: {path} does not exist"));
        }
    }
    wrong
}

/// Whether `crate::module::Item::member` exists, as far as its text tells: the module is a file that defines the item,
/// and some file of the crate defines the member. The module may be left out.
fn exists(path: &str, sources: &BTreeMap<String, String>) -> bool {
    let mut parts = path.split("::");
    let name = parts.next().unwrap_or_default();
    let directory = name.strip_prefix("pgmap_").unwrap_or(name);
    let mut place = format!("crates/{directory}/src/");
    let mut parts = parts.peekable();
    let is_module = |part: &&str| part.starts_with(|first: char| first.is_ascii_lowercase());
    let file = |module: &str| sources.contains_key(&format!("{module}.rs"));
    let whole = place.clone();
    let modules = parts.next_if(|part| is_module(part) && file(&format!("{place}{part}")));
    if let Some(module) = modules {
        place.push_str(module);
    }
    let item = parts.next();
    let defined = |item: Option<&str>, place: &str| {
        item.is_none_or(|item| {
            let mut files = sources.iter().filter(|(name, _)| name.starts_with(place));
            files.any(|(_, text)| defines(text, item))
        })
    };
    item.is_some()
        && defined(item, &place)
        && defined(parts.next(), &whole)
        && parts.next().is_none()
}

/// Whether a file defines something of this name.
fn defines(text: &str, name: &str) -> bool {
    let kinds = ["fn ", "struct ", "enum ", "trait ", "const ", "type "];
    let ends = [' ', '(', '<', '{', ';', ':'];
    let mut starts = kinds.iter().map(|kind| format!("{kind}{name}"));
    starts.any(|start| {
        ends.iter()
            .any(|end| text.contains(&format!("{start}{end}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "crates/mm/src/pte.rs";

    /// What is not wrong is left alone.
    #[test]
    fn tidy_sources_pass() {
        assert!(source(HERE, "fn a() {}\n").is_empty());
    }

    /// A file of 600 lines passes, a longer one does not.
    #[test]
    fn long_files_are_found() {
        assert!(source(HERE, &"//\n".repeat(MOST_LINES)).is_empty());
        assert_eq!(source(HERE, &"//\n".repeat(MOST_LINES + 1)).len(), 1);
    }

    /// Atomics are named in the facade and the listed exceptions only.
    #[test]
    fn atomics_outside_the_facade_are_found() {
        for root in ["core", "std"] {
            let text = format!("use {root}::sync::atomic::AtomicU8;");
            assert_eq!(source(HERE, &text).len(), 1);
            assert!(source("crates/sync/src/lib.rs", &text).is_empty());
        }
        assert!(source(HERE, "use pgmap_sync::atomic::AtomicU8;").is_empty());
    }

    /// Unsafe code is found in whatever shape, and not in comments.
    #[test]
    fn misplaced_unsafe_code_is_found() {
        for rest in ["{ b() }", "fn b() {}", "impl A for B {}", "(no_mangle)"] {
            let space = if rest.starts_with('(') { "" } else { " " };
            let text = format!("{}{space}{rest}", "unsafe");
            assert_eq!(source(HERE, &text).len(), 1, "{text}");
            assert!(source("crates/mm/src/fault.rs", &text).is_empty());
            assert!(source(HERE, &format!("    // {text}")).is_empty());
        }
    }

    /// An ignored test is found, with a reason or without.
    #[test]
    fn ignored_tests_are_found() {
        for rest in ["]", " = \"slow\"]"] {
            let text = format!("#[{}{rest}\nfn a() {{}}", "ignore");
            assert_eq!(source("crates/host/tests/a.rs", &text).len(), 1, "{text}");
        }
    }

    const MANIFEST: &str = "[package]\nname = \"pgmap-mm\"\n[lints]\nworkspace = true\n[dependencies]\n\
        pgmap-core = { workspace = true }\n[dev-dependencies]\npgmap-lab = { workspace = true }\n";

    /// A crate may depend on those below it only, in whatever table; its tests may use what they like.
    #[test]
    fn dependencies_that_point_up_are_found() {
        assert!(manifest("a", MANIFEST).is_empty());
        let up = MANIFEST.replace("pgmap-core =", "pgmap-host =");
        assert_eq!(manifest("a", &up).len(), 1);
        let own = MANIFEST.replace("pgmap-core =", "pgmap-mm =");
        assert_eq!(manifest("a", &own).len(), 1);
        let target =
            format!("{MANIFEST}[target.\"cfg(unix)\".dependencies]\npgmap.workspace = true\n");
        assert_eq!(manifest("a", &target).len(), 1);
    }

    /// A crate that the order does not know has no place.
    #[test]
    fn unknown_crates_are_found() {
        let unknown = MANIFEST.replace("pgmap-mm", "pgmap-new");
        assert_eq!(manifest("a", &unknown).len(), 1);
    }

    /// Every crate takes part in the workspace's lints.
    #[test]
    fn crates_without_lints_are_found() {
        let without = MANIFEST.replace("[lints]\nworkspace = true\n", "");
        assert_eq!(manifest("a", &without).len(), 1);
    }

    /// A path in the kernel map must exist: crate, module, item and member.
    #[test]
    fn wrong_paths_in_the_kernel_map_are_found() {
        let source = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        let sources = BTreeMap::from([
            source("crates/core/src/page.rs", "pub struct Frame {\n"),
            source(
                "crates/core/src/holders.rs",
                "impl Frame { pub fn put(&self) {} }",
            ),
            source("crates/sync/src/wait.rs", "pub struct Wait<T>(T);"),
            source("crates/mm/src/gup.rs", "pub fn pin(at: u8) {}"),
        ]);
        let wrong = |path: &str| kernel_map(&format!("| `put_page` | `{path}` |"), &sources).len();
        for right in [
            "pgmap_core::page::Frame",
            "pgmap_core::page::Frame::put",
            "pgmap_sync::Wait",
            "pgmap_mm::gup::pin",
        ] {
            assert_eq!(wrong(right), 0, "{right}");
        }
        for gone in [
            "pgmap_core::page::Frame::gone",
            "pgmap_core::page::Gone",
            "pgmap_core::holders::Frame",
            "pgmap_core::nowhere::Frame",
            "pgmap_mm::page::Frame",
            "pgmap_mm::gup",
            "pgmap_core",
        ] {
            assert_eq!(wrong(gone), 1, "{gone}");
        }
    }
}
