//! The `pgmap` command.
//!
//! The verbs are in modules of their own; here is only which one runs, and how errors become exit statuses.

mod args;
mod ask;
mod doctor;
mod elf;
mod man;
mod output;
mod program;
mod progress;
mod report;
mod run;
mod serve;
mod summary;
mod supervisor;
mod workload;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use crate::args::{Cli, Command};

/// The exit status for "pgmap cannot do what was asked".
const USAGE: u8 = 2;

fn main() -> ExitCode {
    // No verb of the command line, so that no help, page or completion names it.
    if std::env::args_os().skip(1).eq([workload::VERB]) {
        return workload::workload();
    }
    let cli = Cli::try_parse().unwrap_or_else(|error| exit_with(&error));
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Serve(args) => serve::serve(&args),
        Command::Ask(verb) => ask::ask(verb),
        Command::Doctor { json } => doctor::doctor(if json {
            doctor::Format::Json
        } else {
            doctor::Format::Text
        }),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pgmap", &mut text);
            output::print(&text).map(|()| ExitCode::SUCCESS)
        }
        Command::Man { command, out } => match out {
            Some(directory) => man::write(Cli::command(), &directory),
            None => man::print(Cli::command(), command.as_deref()),
        }
        .map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        output::tell(format_args!("pgmap: {error:#}\n"));
        ExitCode::from(USAGE)
    })
}

/// Help goes to the terminal as it is; a mistake gets one line that says what to do.
fn exit_with(error: &clap::Error) -> ! {
    let kind = error.kind();
    if !error.use_stderr() || kind == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        error.exit();
    }

    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    // Some of clap's messages have what matters in the lines that follow.
    let more: String = text
        .lines()
        .skip(1)
        .map(str::trim)
        .take_while(|line| !line.is_empty() && !line.starts_with("Usage"))
        .flat_map(|line| [" ", line])
        .collect();
    let verb = std::env::args_os().nth(1).unwrap_or_default();
    let verb = match Cli::command().find_subcommand(&verb) {
        Some(known) => format!("{} ", known.get_name()),
        None => String::new(),
    };
    output::tell(format_args!(
        "pgmap: {line}{more} (try `pgmap {verb}--help`)\n"
    ));
    std::process::exit(i32::from(USAGE));
}
