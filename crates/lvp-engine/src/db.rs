//! Opens the SQLite database and brings its schema up to date; copies it while others use it; says what is wrong with it.
//! It leaves out every query: `job::store` has them.
//!
//! The database holds jobs and nothing else; LVM and libvirt are the truth about volumes and VMs. So a database that is lost
//! loses the history of jobs, and nothing on any volume.

use std::{
    fs::{File, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

use lvp_api::ErrorCode;
use rusqlite::{Connection, ErrorCode as SqliteCode, OpenFlags, TransactionBehavior, backup::Backup};

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
    // Of a job before, nobody knows; to leave it to the daemon loses nothing.
    "ALTER TABLE jobs ADD COLUMN run_by TEXT NOT NULL DEFAULT 'daemon';",
];

/// Pages that a copy takes at once: others may write between.
const PAGES_AT_ONCE: i32 = 256;
/// How long a copy waits for who writes.
const BETWEEN_PAGES: Duration = Duration::from_millis(5);

/// The version of the schema that is known here.
pub const VERSION: usize = MIGRATIONS.len();
/// How to go on with a row that cannot be read.
pub const OUT_OF_UNREADABLE: &str = "run the newer lvp that wrote it, if there was one; else stop lvp and put a backup in the \
                                     database's place, or move the database away: only the history of jobs is lost then, \
                                     volumes and cached images are not affected; `lvp doctor` names such jobs";

/// What a database is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// The version of its schema.
    pub version: usize,
    /// The jobs in it.
    pub jobs: u64,
}

/// Opens (or makes) the database.
///
/// # Errors
/// `database_unavailable`: not a database, corrupt, from a newer lvp, not writable. The file is never changed then.
pub fn open(path: &Path) -> Result<Connection> {
    let mut connection = Connection::open(path).map_err(|error| unusable_file(path, error))?;
    // A job keeps its image's URL as it was given, which may be signed.
    std::fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(|error| Error::io("protecting", path, error))?;
    prepare(&mut connection, path)?;
    Ok(connection)
}

fn prepare(connection: &mut Connection, path: &Path) -> Result<()> {
    let at = |error| unusable_file(path, error);
    connection.busy_timeout(Duration::from_secs(10)).map_err(at)?;
    let version = version(connection, path)?;
    check(connection, path)?;
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

/// The version of the schema, which must be one that is known here.
fn version(connection: &Connection, path: &Path) -> Result<usize> {
    let at = |error| unusable_file(path, error);
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(at)?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    if version <= MIGRATIONS.len() {
        return Ok(version);
    }
    let (shown, known) = (path.display(), MIGRATIONS.len());
    Err(Error::new(
        ErrorCode::DatabaseUnavailable,
        format!("database {shown} has schema version {version}, newer than this lvp knows ({known})"),
    )
    .retry(false)
    .hint("run the newer lvp that wrote it, or name another database with DB_PATH"))
}

/// Reads all of the database and compares what must agree (sqlite.org/pragma.html#pragma_quick_check).
fn check(connection: &Connection, path: &Path) -> Result<()> {
    let said: String = connection
        .pragma_query_value(None, "quick_check", |row| row.get(0))
        .map_err(|error| unusable_file(path, error))?;
    if said == "ok" {
        return Ok(());
    }
    Err(Error::new(ErrorCode::DatabaseUnavailable, format!("database {} is damaged: {said}", path.display()))
        .retry(false)
        .hint(way_out(path)))
}

/// Looks at a database that is there, and changes nothing.
///
/// # Errors
/// As [`open`].
pub fn examine(path: &Path) -> Result<Facts> {
    let at = |error| unusable_file(path, error);
    let connection = open_to_read(path)?;
    let version = version(&connection, path)?;
    check(&connection, path)?;
    let jobs = match version {
        0 => 0,
        _ => connection
            .query_row("SELECT count(*) FROM jobs", [], |row| row.get::<_, i64>(0))
            .map_err(at)?
            .unsigned_abs(),
    };
    Ok(Facts { version, jobs })
}

/// Copies the database to a new file, also while a daemon uses it, and checks the copy. Gives what is in it.
///
/// # Errors
/// `file_in_the_way` when there is something at `to`; as [`open`]. Nothing is left at `to` then.
pub fn backup(from: &Path, to: &Path) -> Result<Facts> {
    let failed = |error| Error::io("creating", to, error);
    let source = open_to_read(from)?;
    match File::create_new(to) {
        Ok(file) => file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Error::new(ErrorCode::FileInTheWay, format!("{} exists", to.display()))
                .hint("name a new file for the backup"));
        }
        Err(error) => return Err(failed(error)),
    }
    let copied = copy(&source, from, to);
    if copied.is_err() {
        let _ = std::fs::remove_file(to);
    }
    copied
}

fn copy(source: &Connection, from: &Path, to: &Path) -> Result<Facts> {
    let at = |error| unusable_file(to, error);
    let mut target = Connection::open(to).map_err(at)?;
    let backup = Backup::new(source, &mut target).map_err(|error| unusable_file(from, error))?;
    backup.run_to_completion(PAGES_AT_ONCE, BETWEEN_PAGES, None).map_err(|error| unusable_file(from, error))?;
    drop(backup);
    // One file, whatever the journal of the source is.
    target.pragma_update(None, "journal_mode", "DELETE").map_err(at)?;
    drop(target);
    File::open(to).and_then(|file| file.sync_all()).map_err(|error| Error::io("syncing", to, error))?;
    examine(to)
}

/// Opens a database that is there, to look at it.
pub fn open_to_read(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(|error| unusable_file(path, error))?;
    connection.busy_timeout(Duration::from_secs(10)).map_err(|error| unusable_file(path, error))?;
    Ok(connection)
}

fn unusable_file(path: &Path, error: rusqlite::Error) -> Error {
    let hint = match error.sqlite_error_code() {
        Some(SqliteCode::NotADatabase | SqliteCode::DatabaseCorrupt) => way_out(path),
        _ => hint(&error).to_owned(),
    };
    let message = format!("database {} cannot be used", path.display());
    Error::new(ErrorCode::DatabaseUnavailable, message).retry(is_passing(&error)).source(error).hint(hint)
}

/// The database in use failed in the middle, or a row of it cannot be read.
pub fn unusable(error: rusqlite::Error) -> Error {
    if is_unreadable(&error) {
        return unreadable().source(error);
    }
    let hint = hint(&error);
    Error::new(ErrorCode::DatabaseUnavailable, "the job database cannot be used")
        .retry(is_passing(&error))
        .source(error)
        .hint(hint)
}

/// What a row says cannot be understood here.
pub fn unreadable() -> Error {
    Error::new(ErrorCode::DatabaseUnavailable, "a job cannot be read in the job database")
        .retry(false)
        .hint(OUT_OF_UNREADABLE)
}

/// Whether the database is in order, and what a row holds is not what can be read here.
pub fn is_unreadable(error: &rusqlite::Error) -> bool {
    use rusqlite::Error as E;
    matches!(
        error,
        E::FromSqlConversionFailure(..) | E::InvalidColumnType(..) | E::IntegralValueOutOfRange(..) | E::Utf8Error(..)
    )
}

/// Whether the same may work later with nothing done to the database.
fn is_passing(error: &rusqlite::Error) -> bool {
    !matches!(error.sqlite_error_code(), Some(SqliteCode::NotADatabase | SqliteCode::DatabaseCorrupt))
}

/// What to do about an error (sqlite.org/rescode.html).
fn hint(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(SqliteCode::DiskFull) => {
            "free space on the file system of the state directory; volumes are not affected, and jobs go on then"
        }
        Some(SqliteCode::ReadOnly | SqliteCode::CannotOpen | SqliteCode::PermissionDenied) => {
            "check that the file and its directory may be written, and that their file system is not read-only; \
             volumes are not affected"
        }
        Some(SqliteCode::DatabaseBusy | SqliteCode::DatabaseLocked) => {
            "another program keeps the database locked: end it, or wait; volumes are not affected"
        }
        Some(SqliteCode::NotADatabase | SqliteCode::DatabaseCorrupt) => {
            "`lvp doctor` tells the way out; volumes are not affected"
        }
        _ => "check the disk, and the permissions of the state directory; volumes are not affected",
    }
}

/// How to go on with a database that is damaged.
fn way_out(path: &Path) -> String {
    let shown = path.display();
    format!(
        "stop lvp; `mv {shown} {shown}.damaged` (its -wal and -shm files too), put a backup in its place if there is one \
         (`lvp db backup`), and start lvp: only the history of jobs is lost, volumes and cached images are not affected"
    )
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
        assert!(examine(&path).unwrap_err().to_string().contains("99"));
    }

    /// The database as an lvp of this schema version left it, with a job.
    fn of_version(path: &Path, version: usize) {
        let connection = Connection::open(path).unwrap();
        for migration in &MIGRATIONS[..version] {
            connection.execute_batch(migration).unwrap();
        }
        connection.pragma_update(None, "user_version", version as i64).unwrap();
        if version > 0 {
            let sql = "INSERT INTO jobs (id, kind, status, request, exclusive, created_at, updated_at)
                       VALUES ('0193f2b0-0000-7000-8000-000000000001', 'provision', 'completed', '{}', 'x', 'then', 'then')";
            connection.execute(sql, []).unwrap();
        }
    }

    #[test]
    fn every_version_is_brought_up_to_date_with_its_jobs() {
        let directory = tempfile::tempdir().unwrap();
        for version in 0..=MIGRATIONS.len() {
            let path = directory.path().join(format!("{version}.db"));
            of_version(&path, version);
            assert_eq!(examine(&path).unwrap(), Facts { version, jobs: u64::from(version > 0) });
            drop(open(&path).unwrap());
            assert_eq!(examine(&path).unwrap(), Facts { version: MIGRATIONS.len(), jobs: u64::from(version > 0) });
            let connection = open(&path).unwrap();
            let sql = "SELECT count(*) FROM jobs WHERE run_by <> 'daemon'";
            assert_eq!(connection.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap(), 0, "none is a command's");
        }
    }

    #[test]
    fn an_upgrade_that_fails_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jobs.db");
        of_version(&path, 1);
        // What the next version makes is there already, and is something else.
        Connection::open(&path).unwrap().execute_batch("CREATE TABLE receipts (other TEXT)").unwrap();
        assert_eq!(open(&path).unwrap_err().code(), ErrorCode::DatabaseUnavailable);
        assert_eq!(examine(&path).unwrap(), Facts { version: 1, jobs: 1 });
    }

    #[test]
    fn damage_is_found_at_the_start_and_the_way_out_is_said() {
        use std::os::unix::fs::FileExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("jobs.db");
        of_version(&path, MIGRATIONS.len());
        let before = std::fs::read(&path).unwrap();
        // The root of the first table, behind the page of the schema.
        File::options().write(true).open(&path).unwrap().write_all_at(&[0xff; 64], 4096).unwrap();
        let damaged = std::fs::read(&path).unwrap();
        assert_ne!(before, damaged);
        for error in [open(&path).unwrap_err(), examine(&path).unwrap_err()] {
            assert!(!error.retryable() && error.code() == ErrorCode::DatabaseUnavailable, "{error:?}");
            assert!(
                error.to_body().hint.is_some_and(|hint| hint.contains("mv ") && hint.contains("backup")),
                "{error:?}"
            );
        }
        assert_eq!(std::fs::read(&path).unwrap(), damaged, "it is left as it is");
    }

    #[test]
    fn a_backup_is_whole_while_the_database_is_used_and_replaces_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (path, copy) = (directory.path().join("jobs.db"), directory.path().join("copy.db"));
        of_version(&path, MIGRATIONS.len());
        let used = open(&path).unwrap();
        // It stands in the journal still, not in the file.
        used.execute("UPDATE jobs SET status = 'failed'", []).unwrap();
        assert_eq!(backup(&path, &copy).unwrap(), Facts { version: MIGRATIONS.len(), jobs: 1 });
        assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
        let copied = open(&copy).unwrap();
        let status: String = copied.query_row("SELECT status FROM jobs", [], |row| row.get(0)).unwrap();
        assert_eq!(status, "failed");
        assert_eq!(backup(&path, &copy).unwrap_err().code(), ErrorCode::FileInTheWay);
        let absent = directory.path().join("absent.db");
        let nowhere = directory.path().join("new.db");
        assert_eq!(backup(&absent, &nowhere).unwrap_err().code(), ErrorCode::DatabaseUnavailable);
        assert!(!nowhere.exists() && !absent.exists());
    }
}
