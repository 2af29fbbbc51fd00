//! `lvp`, the one binary: the daemon and the command line.
//!
//! ```text
//!  main ─► cli (arguments) ─► config (flags, environment, file) ─► commands/* ─► a daemon, or an engine of its own
//! ```
//! Errors are printed once, here, with their hint; the exit code says what kind it was (`docs/reference/errors.md`).

mod cli;
mod commands;
mod config;
mod connection;
mod logging;
mod open_files;
mod output;
mod progress_bar;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let output = cli.global.output;
    match commands::run(cli) {
        Ok(code) => code,
        Err(error) => {
            output::print_error(&error, output);
            ExitCode::from(error.error.exit_code())
        }
    }
}
