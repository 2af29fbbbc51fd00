//! How a job's row is read. What only tells of a job (its error, its progress) is read as well as it can be; what says what
//! to do must be right, or the row cannot be read: then it is left as it is, and nobody acts on it.
//!
//! A row that cannot be read was written by a newer lvp, or a bit of it is wrong. It leaves out every change of a row.

use std::{borrow::Cow, path::Path};

use jiff::Timestamp;
use lvp_api::{ErrorBody, ErrorCode, JobId, Progress};
use rusqlite::{Row, types::ValueRef};
use serde_json::{Map, Value};

use super::store::{RunBy, Stored};
use crate::{db, error::Result};

/// The columns that [`read`] takes.
pub const COLUMNS: &str = "id, kind, status, request, record, cancel_requested, attempts, progress, error, \
                           created_at, started_at, updated_at, finished_at, run_by";

/// The ids of the jobs in this database that cannot be read; it changes nothing.
///
/// # Errors
/// `database_unavailable`.
pub fn unreadable(path: &Path) -> Result<Vec<String>> {
    let connection = db::open_to_read(path)?;
    let found = || {
        let mut statement = connection.prepare(&format!("SELECT {COLUMNS} FROM jobs ORDER BY id"))?;
        let ids = statement.query_map([], |row| Ok(if_readable(row, read)?.err().map(|bad| bad.id)))?;
        ids.filter_map(rusqlite::Result::transpose).collect::<rusqlite::Result<Vec<_>>>()
    };
    found().map_err(db::unusable)
}

/// A row that cannot be read.
pub struct Unreadable {
    /// What stands in the place of its id.
    pub id: String,
    /// Why.
    pub why: String,
}

/// What `read` makes of a row whose first column is its id, if it can be read; a database that fails is an error.
pub fn if_readable<T>(
    row: &Row<'_>,
    read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<std::result::Result<T, Unreadable>> {
    match read(row) {
        Ok(value) => Ok(Ok(value)),
        Err(why) if db::is_unreadable(&why) => {
            let id = text(row, 0)?.unwrap_or_default().into_owned();
            Ok(Err(Unreadable { id, why: why.to_string() }))
        }
        Err(error) => Err(error),
    }
}

/// The id in the first column.
pub fn id_of(row: &Row<'_>) -> rusqlite::Result<JobId> {
    row.get::<_, String>(0)?.parse().map_err(|error: lvp_api::Invalid| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, error.0.into())
    })
}

/// A text, whatever bytes it has.
pub fn text<'a>(row: &'a Row<'_>, index: usize) -> rusqlite::Result<Option<Cow<'a, str>>> {
    Ok(match row.get_ref(index)? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Some(String::from_utf8_lossy(bytes)),
        _ => None,
    })
}

/// A row of [`COLUMNS`].
pub fn read(row: &Row<'_>) -> rusqlite::Result<Stored> {
    let bad = |index: usize, error: String| {
        rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, error.into())
    };
    let json = |index: usize| -> rusqlite::Result<Value> {
        serde_json::from_str(&row.get::<_, String>(index)?).map_err(|error| bad(index, error.to_string()))
    };
    let time = |index: usize| -> rusqlite::Result<Option<Timestamp>> {
        row.get::<_, Option<String>>(index)?
            .map(|text| text.parse().map_err(|error: jiff::Error| bad(index, error.to_string())))
            .transpose()
    };
    let required = |index: usize| time(index)?.ok_or_else(|| bad(index, "a time is missing".to_owned()));
    Ok(Stored {
        id: id_of(row)?,
        kind: serde_json::from_value(Value::String(row.get(1)?)).map_err(|error| bad(1, error.to_string()))?,
        status: row.get::<_, String>(2)?.parse().map_err(|error: lvp_api::Invalid| bad(2, error.0))?,
        request: json(3)?,
        record: json(4)?,
        cancel_requested: row.get(5)?,
        attempts: row.get(6)?,
        progress: text(row, 7)?.map_or_else(Progress::queued, |text| progress_of(&text)),
        error: text(row, 8)?.map(|text| error_of(&text)),
        created_at: required(9)?,
        started_at: time(10)?,
        updated_at: required(11)?,
        finished_at: time(12)?,
        run_by: match row.get::<_, String>(13)?.as_str() {
            "command" => RunBy::Command,
            _ => RunBy::Daemon,
        },
    })
}

fn progress_of(text: &str) -> Progress {
    serde_json::from_str(text).unwrap_or_else(|_| {
        let known: Value = serde_json::from_str(text).unwrap_or_default();
        let number = |name: &str| known[name].as_u64().unwrap_or_default();
        Progress {
            percent: u8::try_from(number("percent")).unwrap_or_default().min(100),
            bytes_processed: number("bytes_processed"),
            bytes_total: number("bytes_total"),
            ..Progress::queued()
        }
    })
}

/// Why a job failed. A code that is not known here becomes `internal`, and the words stay.
fn error_of(text: &str) -> ErrorBody {
    serde_json::from_str(text).unwrap_or_else(|_| {
        let known: Value = serde_json::from_str(text).unwrap_or_default();
        let words = |name: &str| known[name].as_str().map(str::to_owned);
        let mut details: Map<String, Value> = known["details"].as_object().cloned().unwrap_or_default();
        details.extend(words("error").map(|code| ("unknown_code".to_owned(), code.into())));
        ErrorBody {
            error: ErrorCode::Internal,
            message: words("message").unwrap_or_else(|| text.to_owned()),
            code: ErrorCode::Internal.http_status(),
            retryable: known["retryable"].as_bool().unwrap_or_default(),
            hint: words("hint"),
            correlation_id: words("correlation_id"),
            details,
        }
    })
}
