//! `lvp db`: a backup of the job database. It leaves out restoring one: that is to put the file in place while lvp is stopped.

use std::process::ExitCode;

use lvp_engine::{Recovery, backup_database};
use serde_json::json;

use super::Outcome;
use crate::{
    cli::{Db, Output},
    config::Config,
    connection::body,
    output,
};

/// Runs the command. It needs no daemon and disturbs none.
pub fn run(config: &Config, command: &Db, output: Output) -> Outcome {
    let Db::Backup { file } = command;
    let database = config.engine(Recovery::Leave).map_err(body)?.database();
    let jobs = backup_database(&database, file).map_err(body)?;
    let answer = json!({ "database": database, "backup": file, "jobs": jobs });
    output::print(&answer, output, |_| format!("{jobs} jobs of {} are in {}", database.display(), file.display()))?;
    Ok(ExitCode::SUCCESS)
}
