//! `lvp config show`: each setting, its value, and where it came from.

use std::process::ExitCode;

use serde::Serialize;

use super::Outcome;
use crate::{cli::Output, config::Config, output};

#[derive(Serialize)]
struct Row {
    setting: String,
    value: String,
    origin: String,
}

/// Runs the command.
pub fn show(config: &Config, output: Output) -> Outcome {
    let rows: Vec<Row> =
        config.shown().into_iter().map(|(setting, value, origin)| Row { setting, value, origin }).collect();
    output::print(&rows, output, |rows| {
        let rows = rows.iter().map(|row| vec![row.setting.clone(), row.value.clone(), row.origin.clone()]);
        output::table(&["setting", "value", "origin"], rows.collect(), "no settings")
    })?;
    Ok(ExitCode::SUCCESS)
}
