//! Who has what an exclusive key stands for: a job, or somebody outside of one. It leaves out what the key means.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use lvp_api::{ErrorCode, JobId};
use tokio::sync::Notify;

use crate::{db, error::Error};

/// The right to change what an exclusive key stands for outside of a job: until it is dropped, no job with this key begins.
pub struct Held {
    pub(super) key: String,
    pub(super) held: Arc<Mutex<Vec<String>>>,
    pub(super) wake: Arc<Notify>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|key| *key != self.key);
        self.wake.notify_one();
    }
}

/// The job that has an exclusive key, or is to have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// It runs.
    Running(JobId),
    /// It waits for its turn.
    Awaited(JobId),
    /// It waits for the daemon, and this process is a command.
    LeftToDaemon(JobId),
    /// It has not ended, and cannot be read: what stands in the place of its id.
    Unreadable(String),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running(job) => write!(f, "being written by job {job}"),
            Self::Awaited(job) => write!(f, "to be written by job {job}, which waits for its turn"),
            Self::LeftToDaemon(job) => write!(f, "to be written by job {job}, which the next daemon goes on with"),
            Self::Unreadable(job) => {
                write!(f, "in the hands of job {job}, which has not ended and cannot be read in the database")
            }
        }
    }
}

impl Holder {
    /// The refusal of what would change `what`, which this job has.
    pub fn refusal(self, what: &str) -> Error {
        let passes = !matches!(self, Self::Unreadable(_));
        let error = Error::new(ErrorCode::VolumeInUse, format!("{what} is {self}")).retry(passes);
        match self {
            Self::Running(_) | Self::Awaited(_) => error.hint("wait for its end, or cancel the job, then try again"),
            Self::LeftToDaemon(job) => {
                error.hint(format!("start `lvp serve` to have it done, or take it back with `lvp job cancel {job}`"))
            }
            Self::Unreadable(_) => error.hint(db::OUT_OF_UNREADABLE),
        }
    }
}
