//! One download per image: requests that come while it runs wait for it.
//!
//! ```text
//!  join ──► nobody there ──────────────► Lead ──► publish ──► waiters get the same entry
//!       └─► somebody leads ──► wait ──┐    ├────► fails ────► waiters for whom that holds get the same error
//!                   ▲                 │    └────► cancelled ─► the next waiter leads
//!                   └── their turn ◄──┘
//! ```
//! A waiter takes only an outcome that came while it waited; what was before is not its answer. One digest may be wanted from
//! several places: what one of them did wrong says nothing of the others, so who named another place takes only errors that
//! are about the image or the cache.
//! It leaves out what a download is.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use lvp_api::{ErrorBody, ErrorCode};
use tokio::sync::OwnedMutexGuard;

use super::{entry::Entry, location::ImageUrl};
use crate::{
    error::{Error, Result},
    progress::Progress,
};

/// How often a waiter's progress follows the leader's.
const TICK: Duration = Duration::from_millis(200);

/// The downloads under way, by key.
#[derive(Default)]
pub(super) struct Flights {
    under_way: Mutex<HashMap<String, Weak<Flight>>>,
}

#[derive(Default)]
struct Flight {
    turn: Arc<tokio::sync::Mutex<Option<Ended>>>,
    bytes: AtomicU64,
    total: AtomicU64,
}

struct Ended {
    at: Instant,
    /// Where it was to come from.
    source: ImageUrl,
    outcome: Outcome,
}

enum Outcome {
    Published(Entry),
    Failed(ErrorBody),
}

impl Ended {
    /// Whether it is the answer for who wants the image from there. A signature is a part of the place: it may have expired.
    fn holds_for(&self, source: &ImageUrl) -> bool {
        match &self.outcome {
            Outcome::Published(_) => true,
            Outcome::Failed(body) => self.source == *source || is_of_any_source(body.error),
        }
    }
}

/// Whether an error is about what is in the image, or the room for it, and not about who sends it. Bytes with another digest
/// are not the image's.
fn is_of_any_source(code: ErrorCode) -> bool {
    matches!(
        code,
        ErrorCode::ImageInvalid | ErrorCode::ImageRefused | ErrorCode::ImageTypeMismatch | ErrorCode::CacheFull
    )
}

/// What a request finds.
pub(super) enum Joined {
    /// Nobody does it: this request does.
    Lead(Lead),
    /// Another request did it meanwhile.
    Done(Entry),
}

/// The right to download; the next waiter gets it when this is dropped.
pub(super) struct Lead {
    flight: Arc<Flight>,
    source: ImageUrl,
    turn: OwnedMutexGuard<Option<Ended>>,
}

impl Flights {
    fn flight(&self, key: &str) -> Arc<Flight> {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = under_way.get(key).and_then(Weak::upgrade) {
            return flight;
        }
        under_way.retain(|_, flight| flight.strong_count() > 0);
        let flight = Arc::new(Flight::default());
        under_way.insert(key.to_owned(), Arc::downgrade(&flight));
        flight
    }

    /// Takes the lead, or waits for who has it, showing the leader's progress as this request's own.
    pub async fn join(&self, key: &str, source: &ImageUrl, progress: &Progress) -> Result<Joined> {
        let flight = self.flight(key);
        let since = Instant::now();
        let mut turn = std::pin::pin!(flight.turn.clone().lock_owned());
        let turn = loop {
            tokio::select! {
                biased;
                () = progress.stopped() => return Err(progress.check().expect_err("stopped")),
                turn = &mut turn => break turn,
                () = tokio::time::sleep(TICK) => {
                    progress.set_total(flight.total.load(Ordering::Relaxed));
                    progress.set_processed(flight.bytes.load(Ordering::Relaxed));
                }
            }
        };
        match turn.as_ref().filter(|ended| ended.at >= since && ended.holds_for(source)).map(|ended| &ended.outcome) {
            Some(Outcome::Published(entry)) => Ok(Joined::Done(entry.clone())),
            Some(Outcome::Failed(body)) => Err(Error::from(body.clone())),
            None => {
                flight.bytes.store(0, Ordering::Relaxed);
                Ok(Joined::Lead(Lead { flight, source: source.clone(), turn }))
            }
        }
    }
}

impl Lead {
    /// Shows waiters how far the download is, in bytes.
    pub fn show(&self, bytes: u64, total: u64) {
        self.flight.bytes.store(bytes, Ordering::Relaxed);
        self.flight.total.store(total, Ordering::Relaxed);
    }

    /// Gives the image to those who wait.
    pub fn publish(mut self, entry: &Entry) {
        self.end(Outcome::Published(entry.clone()));
    }

    /// Gives the error to those who wait; but a stop concerns this request only.
    pub fn fail(mut self, error: &Error) {
        if !matches!(error.code(), ErrorCode::Cancelled | ErrorCode::ShuttingDown) {
            self.end(Outcome::Failed(error.to_body()));
        }
    }

    fn end(&mut self, outcome: Outcome) {
        *self.turn = Some(Ended { at: Instant::now(), source: self.source.clone(), outcome });
    }
}
