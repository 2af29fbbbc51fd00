//! How much clients may have of the server at once. What of a request is bounded wherever it comes from stands beside it:
//! the body in `body`, the head in `listen`.

use std::{sync::Arc, time::Duration};

use lvp_api::ErrorCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Failure, Result};

/// The limits of one server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections that are open at once, over TCP, and as many over the Unix socket, so that nobody who may only connect to
    /// the one keeps the administrator from the other. More wait until one is closed.
    pub connections: usize,
    /// Streams of events that are open at once; more are refused.
    pub followers: usize,
    /// A client has this long to send the head of a request, as long again for its body, and over TCP may take nothing of an
    /// answer for as long.
    pub patience: Duration,
}

impl Limits {
    /// Limits for so many connections, half of which may follow a job.
    pub fn of_connections(connections: usize) -> Self {
        Self { connections, followers: (connections / 2).max(1), patience: Duration::from_secs(15) }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::of_connections(1024)
    }
}

/// Who follows jobs.
#[derive(Debug, Clone)]
pub struct Followers {
    most: usize,
    free: Arc<Semaphore>,
}

impl Followers {
    pub fn new(most: usize) -> Self {
        Self { most, free: Arc::new(Semaphore::new(most)) }
    }

    /// A place among them, until dropped.
    ///
    /// # Errors
    /// `too_many_followers`.
    pub fn join(&self) -> Result<OwnedSemaphorePermit> {
        self.free.clone().try_acquire_owned().map_err(|_| {
            let said = format!("{} clients follow jobs already, and no more are let in", self.most);
            Failure::new(ErrorCode::TooManyFollowers, said)
        })
    }
}
