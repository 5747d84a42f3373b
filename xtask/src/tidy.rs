//! What lints cannot keep: the direction of dependencies, the length of files, where atomics and unsafe code may be
//! named, and that the kernel map tells the truth.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// The longest file, in lines.
const MOST_LINES: usize = 600;
/// Who may depend on whom: on crates that stand before it.
const ORDER: [&str; 10] = [
    "pgmap-sync",
    "pgmap-core",
    "pgmap-mm",
    "pgmap-lab",
    "pgmap-host",
    "pgmap-drivers",
    "pgmap",
    "pgmap-preload",
    "pgmap-cli",
    "xtask",
];
/// Where the machine's atomics may be named: the facade, and statics, which the models' atomics cannot be.
const ATOMICS: [&str; 5] = [
    "crates/sync/",
    "crates/preload/",
    "crates/cli/src/supervisor.rs",
    "crates/host/",
    "xtask/",
];
/// Where unsafe code may be.
const UNSAFE: [&str; 17] = [
    "crates/sync/",
    "crates/core/",
    "crates/host/",
    "crates/preload/",
    "crates/lab/",
    "crates/mm/src/fault.rs",
    "crates/mm/src/fork.rs",
    "crates/mm/src/mmu.rs",
    "crates/mm/src/reclaim.rs",
    "crates/pgmap/src/memory.rs",
    "crates/pgmap/src/shared.rs",
    "crates/pgmap/src/space.rs",
    "crates/cli/src/supervisor.rs",
    "crates/cli/src/workload.rs",
    "crates/cli/tests/",
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
    let allowed = |places: &[&str]| places.iter().any(|place| name.starts_with(place));
    let code = || {
        text.lines()
            .filter(|line| !line.trim_start().starts_with("//"))
    };
    let named = |what: &str| code().any(|line| line.contains(what));
    let atomic = ["core", "std"].map(|root| format!("{root}::sync::atomic"));
    if !allowed(&ATOMICS) && atomic.iter().any(|atomic| named(atomic)) {
        wrong.push(format!("{name}: atomics come from pgmap_sync::atomic"));
    }
    let keyword = ["unsafe ", "unsafe("];
    let forbids = text.contains("forbid(unsafe_code)");
    if !allowed(&UNSAFE) && !forbids && keyword.iter().any(|keyword| named(keyword)) {
        wrong.push(format!("{name}: unsafe code has no place here"));
    }
    if named(&format!("#[{}]", "ignore")) {
        wrong.push(format!("{name}: a test is ignored"));
    }
    wrong
}

/// What is wrong with one crate's manifest.
fn manifest(name: &str, text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    if !text.contains("[lints]\nworkspace = true") {
        wrong.push(format!("{name}: no `[lints] workspace = true`"));
    }
    let field = |line: &str| line.split(['=', ' ', '.']).next().map(str::to_owned);
    let own = text.lines().find_map(|line| line.strip_prefix("name = "));
    let own = own.map(|own| own.trim_matches('"')).unwrap_or_default();
    let place = |name: &str| ORDER.iter().position(|other| *other == name);
    let dependencies = text.split("[dev-dependencies]").next().unwrap_or(text);
    for line in dependencies
        .lines()
        .filter(|line| line.starts_with("pgmap"))
    {
        let Some(dependency) = field(line) else {
            continue;
        };
        match (place(own), place(&dependency)) {
            (Some(own), Some(dependency)) if dependency < own => {}
            _ => wrong.push(format!("{name}: {own} must not depend on {dependency}")),
        }
    }
    wrong
}

/// Which Rust paths of the kernel map do not exist: the module must be a file, and the item must be named in it or in
/// a file beside it.
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

fn exists(path: &str, sources: &BTreeMap<String, String>) -> bool {
    let mut parts = path.split("::");
    let crate_name = parts.next().unwrap_or_default();
    let directory = crate_name.strip_prefix("pgmap_").unwrap_or(crate_name);
    let item = path.rsplit("::").next().unwrap_or_default();
    let kinds = ["fn ", "struct ", "enum ", "trait ", "const ", "type "];
    let ends = [' ', '(', '<', '{', ';', ':'];
    let defined = |text: &str| {
        kinds.iter().any(|kind| {
            ends.iter()
                .any(|end| text.contains(&format!("{kind}{item}{end}")))
        })
    };
    let prefix = format!("crates/{directory}/src/");
    sources
        .iter()
        .any(|(name, text)| name.starts_with(&prefix) && defined(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each rule finds what breaks it, and leaves what keeps it alone.
    #[test]
    fn sources_are_checked() {
        assert!(source("crates/mm/src/pte.rs", "fn a() {}\n").is_empty());
        let long = "//\n".repeat(MOST_LINES + 1);
        let use_atomic = format!("use {}::sync::atomic::AtomicU8;", "core");
        let block = format!("fn a() {{ {} {{ b() }} }}", "unsafe");
        let ignored = format!("#[{}]\nfn a() {{}}", "ignore");
        for bad in [&long, &use_atomic, &block, &ignored] {
            assert_eq!(source("crates/mm/src/pte.rs", bad).len(), 1, "{bad}");
        }
        assert!(source("crates/sync/src/lib.rs", &use_atomic).is_empty());
    }

    /// A crate may only depend on those below it, and takes part in the lints.
    #[test]
    fn manifests_are_checked() {
        let good = "name = \"pgmap-mm\"\n[lints]\nworkspace = true\n[dependencies]\npgmap-core = { workspace = true }\n";
        assert!(manifest("a", good).is_empty());
        assert_eq!(
            manifest("a", &good.replace("pgmap-core =", "pgmap-host =")).len(),
            1
        );
        assert_eq!(
            manifest("a", &good.replace("[lints]\nworkspace = true\n", "")).len(),
            1
        );
    }

    /// A path in the kernel map must exist.
    #[test]
    fn the_kernel_map_is_checked() {
        let sources = BTreeMap::from([(
            "crates/core/src/page.rs".to_owned(),
            "pub struct Frame {\n    pub fn put(&self) {}".to_owned(),
        )]);
        let row = |path: &str| format!("| `put_page` | `{path}` |");
        assert!(kernel_map(&row("pgmap_core::page::Frame::put"), &sources).is_empty());
        assert_eq!(
            kernel_map(&row("pgmap_core::page::Frame::gone"), &sources).len(),
            1
        );
        assert_eq!(kernel_map(&row("pgmap_mm::page::Frame"), &sources).len(), 1);
    }
}
