//! How results and errors are printed: tables for people, JSON and YAML for programs. Results go to stdout, everything
//! else to stderr.

use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets::NOTHING};
use jiff::{Timestamp, tz::TimeZone};
use lvp_api::{ErrorBody, ErrorCode};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::cli::Output;

/// Prints a result: `table` makes the form for people.
pub fn print<T: Serialize>(value: &T, output: Output, table: impl FnOnce(&T) -> String) -> Result<(), Box<ErrorBody>> {
    let text = match output {
        Output::Table => table(value),
        Output::Json => serde_json::to_string_pretty(value).map_err(|error| failed(&error.to_string()))?,
        Output::Yaml => serde_saphyr::to_string(value).map_err(|error| failed(&error.to_string()))?,
    };
    print_text(&text)
}

/// Prints a text as it is, and one end of line.
pub fn print_text(text: &str) -> Result<(), Box<ErrorBody>> {
    match writeln!(io::stdout().lock(), "{}", text.trim_end()) {
        // The reader of a pipe has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|error| failed(&error.to_string())),
    }
}

fn failed(why: &str) -> Box<ErrorBody> {
    Box::new(
        lvp_engine::Error::new(ErrorCode::InputOutput, format!("the result could not be printed: {why}")).to_body(),
    )
}

/// Prints an error, to stderr: its sentence and hint, or its body.
pub fn print_error(error: &ErrorBody, output: Output) {
    match output {
        Output::Json => eprintln!("{}", serde_json::to_string_pretty(error).unwrap_or_default()),
        Output::Yaml => eprint!("{}", serde_saphyr::to_string(error).unwrap_or_default()),
        Output::Table => {
            eprintln!("error: {} [{}]", error.message, error.error);
            if let Some(hint) = &error.hint {
                eprintln!("hint: {hint}");
            }
            left(&error.details).for_each(|left| eprintln!("left: {left}"));
        }
    }
}

/// What a job could not take back, as the details of its error say.
pub fn left(details: &Map<String, Value>) -> impl Iterator<Item = &str> {
    details.get("not_undone").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

/// Rows with a head, aligned, without lines. With no rows: `nothing`.
pub fn table(head: &[&str], rows: Vec<Vec<String>>, nothing: &str) -> String {
    if rows.is_empty() {
        return nothing.to_owned();
    }
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head.iter().map(|name| name.to_uppercase()));
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// Facts, one a line, aligned; those without a value are left out.
pub fn facts(rows: Vec<(&str, Option<String>)>) -> String {
    let rows: Vec<(&str, String)> =
        rows.into_iter().filter_map(|(name, value)| value.map(|value| (name, value))).collect();
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    rows.iter().map(|(name, value)| format!("{name:width$}{value}\n")).collect()
}

/// A moment in this machine's time zone, to the second.
pub fn moment(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}
