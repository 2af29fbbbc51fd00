//! Opens the SQLite database and brings its schema up to date. It leaves out every query: `job::store` has them.
//!
//! The database holds jobs and nothing else; LVM and libvirt are the truth about volumes and VMs.

use std::{fs::Permissions, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use lvp_api::ErrorCode;
use rusqlite::{Connection, TransactionBehavior};

use crate::error::{Error, Result};

/// The schema, one entry per version; entries are only ever added. `PRAGMA user_version` counts the applied ones.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE jobs (
        id               TEXT PRIMARY KEY,
        kind             TEXT NOT NULL,
        status           TEXT NOT NULL,
        request          TEXT NOT NULL,
        record           TEXT NOT NULL DEFAULT '{}',
        exclusive        TEXT NOT NULL,
        idempotency_key  TEXT UNIQUE,
        cancel_requested INTEGER NOT NULL DEFAULT 0,
        attempts         INTEGER NOT NULL DEFAULT 0,
        progress         TEXT,
        error            TEXT,
        created_at       TEXT NOT NULL,
        started_at       TEXT,
        updated_at       TEXT NOT NULL,
        finished_at      TEXT
    ) STRICT;
    CREATE INDEX jobs_by_status ON jobs (status, id);
    CREATE TABLE steps (
        job_id   TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        name     TEXT NOT NULL,
        state    TEXT NOT NULL,
        at       TEXT NOT NULL,
        PRIMARY KEY (job_id, position)
    ) STRICT;
",
    "
    CREATE TABLE receipts (
        exclusive TEXT PRIMARY KEY,
        job_id    TEXT NOT NULL,
        receipt   TEXT NOT NULL
    ) STRICT;
    CREATE INDEX receipts_by_job ON receipts (job_id);
",
];

/// Opens (or makes) the database.
///
/// # Errors
/// `database_unavailable`: not a database, corrupt, from a newer lvp, not writable. The file is never changed then.
pub fn open(path: &Path) -> Result<Connection> {
    let mut connection = Connection::open(path).map_err(|error| unusable(path, error))?;
    // A job keeps its image's URL as it was given, which may be signed.
    std::fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(|error| Error::io("protecting", path, error))?;
    prepare(&mut connection, path)?;
    Ok(connection)
}

fn prepare(connection: &mut Connection, path: &Path) -> Result<()> {
    let at = |error| unusable(path, error);
    connection.busy_timeout(Duration::from_secs(10)).map_err(at)?;
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(at)?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    if version > MIGRATIONS.len() {
        return Err(Error::new(
            ErrorCode::DatabaseUnavailable,
            format!(
                "database {} has schema version {version}, newer than this lvp knows ({})",
                path.display(),
                MIGRATIONS.len()
            ),
        )
        .retry(false)
        .hint("run the newer lvp that wrote it, or name another database with DB_PATH"));
    }
    // WAL: readers never wait for the writer. FULL: a step that was recorded stays recorded when the power fails.
    connection.pragma_update(None, "journal_mode", "WAL").map_err(at)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(at)?;
    connection.pragma_update(None, "foreign_keys", true).map_err(at)?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(at)?;
    for migration in &MIGRATIONS[version..] {
        transaction.execute_batch(migration).map_err(at)?;
    }
    transaction.pragma_update(None, "user_version", MIGRATIONS.len() as i64).map_err(at)?;
    transaction.commit().map_err(at)
}

fn unusable(path: &Path, error: rusqlite::Error) -> Error {
    Error::new(ErrorCode::DatabaseUnavailable, format!("database {} cannot be used", path.display()))
        .source(error)
        .hint("check the file's permissions and the disk's space; volumes are not affected")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_made_and_opened_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jobs.db");
        drop(open(&path).unwrap());
        let connection = open(&path).unwrap();
        let jobs: i64 = connection.query_row("SELECT count(*) FROM jobs", [], |row| row.get(0)).unwrap();
        assert_eq!(jobs, 0);
    }

    #[test]
    fn what_is_not_ours_to_read_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jobs.db");
        let rubbish = b"this is not a database, but it is long enough to look at".repeat(100);
        std::fs::write(&path, &rubbish).unwrap();
        assert_eq!(open(&path).unwrap_err().code(), ErrorCode::DatabaseUnavailable);
        assert_eq!(std::fs::read(&path).unwrap(), rubbish);
    }

    #[test]
    fn a_newer_schema_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jobs.db");
        let connection = open(&path).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        assert!(open(&path).unwrap_err().to_string().contains("99"));
    }
}
