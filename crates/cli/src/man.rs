//! `pgmap man`: the manual, made from the definition of the command line.
//!
//! What stands after the options in `--help` (examples, exit statuses) becomes sections of the page.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::output;

/// Prints the page of a command, or that of pgmap itself.
pub(crate) fn print(pgmap: Command, name: Option<&str>) -> anyhow::Result<()> {
    let pgmap = complete(pgmap);
    let command = match name {
        None | Some("pgmap") => &pgmap,
        Some(name) => {
            let name = name.strip_prefix("pgmap-").unwrap_or(name);
            let Some(command) = pgmap.find_subcommand(name) else {
                let names: Vec<_> = pgmap.get_subcommands().map(Command::get_name).collect();
                bail!("there is no page `{name}`: there are {}", names.join(", "));
            };
            command
        }
    };
    output::print(&page(command)?)
}

/// Writes all pages to a directory, which is made if it is not there.
pub(crate) fn write(pgmap: Command, directory: &Path) -> anyhow::Result<()> {
    let pgmap = complete(pgmap);
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    for command in [&pgmap].into_iter().chain(pgmap.get_subcommands()) {
        let path = directory.join(Man::new(command.clone()).get_filename());
        fs::write(&path, page(command)?)
            .with_context(|| format!("cannot write the page {}", path.display()))?;
    }
    Ok(())
}

/// With the names that the pages have, such as pgmap-run; without `help`, which needs no page.
fn complete(pgmap: Command) -> Command {
    let mut pgmap = pgmap.disable_help_subcommand(true);
    pgmap.build();
    pgmap
}

fn page(command: &Command) -> anyhow::Result<Vec<u8>> {
    let man = Man::new(command.clone());
    let mut page = title(&man.get_filename()).into_bytes();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(text) = command.get_after_help() {
        sections(&text.to_string()).to_writer(&mut page)?;
    }
    Ok(page)
}

/// The page's first line. (`render_title` leaves the empty date out, and what follows takes its place.)
fn title(file: &str) -> String {
    let name = file.strip_suffix(".1").unwrap_or(file);
    let version = env!("CARGO_PKG_VERSION");
    format!(".TH {name} 1 \"\" \"pgmap {version}\" \"pgmap manual\"\n")
}

/// Paragraphs that start with a heading and a colon, as sections whose lines stay as they are.
fn sections(text: &str) -> Roff {
    let mut roff = Roff::new();
    for paragraph in text.split("\n\n") {
        let (heading, lines) = paragraph.split_once(":\n").unwrap_or(("Notes", paragraph));
        roff.control("SH", [heading.to_uppercase().as_str()]);
        roff.control("nf", []);
        for line in lines.lines() {
            roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]);
        }
        roff.control("fi", []);
    }
    roff
}
