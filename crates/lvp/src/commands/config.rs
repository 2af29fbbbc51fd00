//! `lvp config show`: each setting, its value, and where it came from.

use std::process::ExitCode;

use serde::Serialize;

use super::Outcome;
use crate::{
    cli::Output,
    config::{Config, SETTINGS},
    output,
};

#[derive(Serialize)]
struct Row {
    setting: String,
    value: String,
    origin: String,
    /// What the setting does; a target has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    meaning: Option<&'static str>,
}

/// Runs the command.
pub fn show(config: &Config, output: Output) -> Outcome {
    let row = |(setting, value, origin): (String, String, String)| {
        let meaning = SETTINGS.iter().find(|known| known.key == setting).map(|known| known.meaning);
        Row { setting, value, origin, meaning }
    };
    let rows: Vec<Row> = config.shown().into_iter().map(row).collect();
    output::print(&rows, output, |rows| {
        let rows = rows.iter().map(|row| vec![row.setting.clone(), row.value.clone(), row.origin.clone()]);
        output::table(&["setting", "value", "origin"], rows.collect(), "no settings")
    })?;
    Ok(ExitCode::SUCCESS)
}
