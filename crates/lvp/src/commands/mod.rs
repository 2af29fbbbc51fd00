//! The commands, one file each.

mod config;
mod database;
mod doctor;
mod image;
mod job;
mod provision;
mod serve;
mod volume;

use std::process::ExitCode;

use clap::CommandFactory;
use lvp_api::ErrorBody;
use lvp_engine::Recovery;

use crate::{
    cli::{Cli, Command},
    config::Config,
    connection::{Connection, body},
    logging, output,
};

/// What commands return: an exit code, or the error that is printed.
pub type Outcome = Result<ExitCode, Box<ErrorBody>>;

/// Runs the command.
pub fn run(cli: Cli) -> Outcome {
    if let Command::Completions { shell } = &cli.command {
        // By way of memory: the generator panics when its reader goes away.
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut Cli::command(), "lvp", &mut script);
        output::print_text(&String::from_utf8_lossy(&script))?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = Config::load(cli.global.config.clone(), cli.flags()).map_err(body)?;
    logging::start(&config, if matches!(cli.command, Command::Serve(_)) { "info" } else { "error" });
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    if let Command::Config(_) = &cli.command {
        return config::show(&config, cli.global.output);
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(|error| {
            body(lvp_engine::Error::new(lvp_api::ErrorCode::Internal, "no threads could be started").source(error))
        })?;
    let outcome = runtime.block_on(dispatch(cli, &config));
    // A program in an uninterruptible wait must not keep this process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome
}

async fn dispatch(cli: Cli, config: &Config) -> Outcome {
    let recovery = match &cli.command {
        Command::Serve(_) => return serve::run(config).await,
        Command::Doctor => return doctor::run(config, cli.global.output).await,
        Command::Db(command) => return database::run(config, command, cli.global.output),
        Command::Provision(provision) if !provision.dry_run => Recovery::Undo,
        Command::Image(crate::cli::Image::Prefetch { .. }) | Command::Job(crate::cli::Job::Cancel { .. }) => {
            Recovery::Undo
        }
        _ => Recovery::Leave,
    };
    let connection = Connection::open(&cli.global, config, recovery).await?;
    let output = cli.global.output;
    let outcome = match cli.command {
        Command::Provision(command) => provision::run(&connection, command, output).await,
        Command::Job(command) => job::run(&connection, command, output).await,
        Command::Image(command) => image::run(&connection, command, output).await,
        Command::Volume(command) => volume::run(&connection, command, output).await,
        Command::Serve(_) | Command::Doctor | Command::Db(_) | Command::Config(_) | Command::Completions { .. } => {
            unreachable!("these need no connection")
        }
    };
    connection.close().await;
    outcome
}
