//! When a failed request is tried again, and after how long.
//!
//! ```text
//!   failed ──► Again::Never ──────────────────► the error
//!          ──► Again::Soon / After(t) ──► wait ──► next attempt     at most `retry_attempts` in a row,
//!                                                                   TOTAL_FACTOR times as many in all
//! ```
//! It leaves out what is tried: see `source` and `download`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;

use super::settings::SourceSettings;
use crate::{
    error::{Error, Result},
    progress::Progress,
};

/// The longest wait that a `Retry-After` can ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A transfer that moves on between its failures may fail this many times as often as a request.
const TOTAL_FACTOR: u32 = 32;

/// So many failures of one transfer are told each; then only every one whose number is a power of two, so that a bad line
/// fills no log, however large the image is.
const TOLD: u32 = 4;

/// An attempt that brought so many bytes was worth it: failures in a row are counted anew after it.
pub(super) const WORTHWHILE: u64 = 64 << 10;

/// Whether the same request can succeed when it is sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// No: the answer was definite.
    Never,
    /// Yes, after our own back-off.
    Soon,
    /// Yes, after what the server asked for (or our back-off, when longer).
    After(Duration),
}

/// A failed attempt.
#[derive(Debug)]
pub(super) struct Failure {
    pub error: Error,
    pub again: Again,
}

impl Failure {
    /// A failure that trying again does not change.
    pub fn never(error: Error) -> Self {
        Self { error, again: Again::Never }
    }

    /// A failure that may pass.
    pub fn soon(error: Error) -> Self {
        Self { error, again: Again::Soon }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::never(error)
    }
}

/// The attempts of one operation.
pub(super) struct Retries<'a> {
    settings: &'a SourceSettings,
    in_a_row: u32,
    total: u32,
    /// Failures of the whole transfer, of which this may be a part.
    of_all: Arc<AtomicU32>,
}

impl<'a> Retries<'a> {
    pub fn new(settings: &'a SourceSettings) -> Self {
        Self::of_part(settings, Arc::default())
    }

    /// Those of a part: the failures of all parts are counted together, for the log.
    pub fn of_part(settings: &'a SourceSettings, of_all: Arc<AtomicU32>) -> Self {
        Self { settings, in_a_row: 0, total: 0, of_all }
    }

    /// Waits until the next attempt is due.
    ///
    /// `moved_on` says that the failed attempt brought bytes that need not be brought again.
    ///
    /// # Errors
    /// The failure's own error when there is no next attempt, or the stop of the job.
    pub async fn pause(&mut self, failure: Failure, moved_on: bool, progress: &Progress) -> Result<()> {
        if moved_on {
            self.in_a_row = 0;
        }
        let allowed = self.settings.retry_attempts;
        if failure.again == Again::Never || self.in_a_row >= allowed || self.total >= allowed * TOTAL_FACTOR {
            return Err(match self.total {
                0 => failure.error,
                retries => failure.error.detail("attempts", retries + 1),
            });
        }
        let wait = self.wait(failure.again);
        self.in_a_row += 1;
        self.total += 1;
        self.tell(&failure.error, wait);
        progress.until_stopped(tokio::time::sleep(wait)).await
    }

    fn tell(&self, error: &Error, wait: Duration) {
        let failures = self.of_all.fetch_add(1, Ordering::Relaxed) + 1;
        if failures <= TOLD || failures.is_power_of_two() {
            tracing::warn!(
                error = %error.chain(), attempt = self.total, failures, wait_ms = wait.as_millis(),
                "reading the image's source failed; trying again"
            );
        }
    }

    /// The back-off of this attempt, between half and all of it, but no less than the server asked for.
    fn wait(&self, again: Again) -> Duration {
        let steps = &self.settings.retry_backoff;
        let step = steps.get(self.in_a_row as usize).or(steps.last()).copied().unwrap_or_default();
        let jittered = step.mul_f64(0.5 + fastrand::f64() / 2.0);
        match again {
            Again::After(asked) => jittered.max(asked),
            _ => jittered,
        }
    }
}

/// Reads a `Retry-After` header: seconds, or an HTTP date (RFC 9110, section 10.2.3). At most [`LONGEST_WAIT`].
pub(super) fn retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    let wait = match value.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
            Duration::try_from(date.duration_since(now)).unwrap_or_default()
        }
    };
    Some(wait.min(LONGEST_WAIT))
}

#[cfg(test)]
mod tests {
    use e2e::lines::Lines;
    use lvp_api::ErrorCode;

    use super::*;
    use crate::progress::Stop;

    fn failure(again: Again) -> Failure {
        Failure { error: Error::new(ErrorCode::SourceFailed, "x"), again }
    }

    fn settings(attempts: u32, backoff_ms: u64) -> SourceSettings {
        SourceSettings {
            retry_attempts: attempts,
            retry_backoff: vec![Duration::from_millis(backoff_ms)],
            ..SourceSettings::default()
        }
    }

    #[test]
    fn reads_both_forms_of_retry_after() {
        let now = "2015-10-21T07:28:00Z".parse().unwrap();
        let wait = |value| retry_after(value, now);
        assert_eq!(wait("7"), Some(Duration::from_secs(7)));
        assert_eq!(wait("Wed, 21 Oct 2015 07:28:30 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(wait("Wed, 21 Oct 2015 07:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(wait("99999999"), Some(LONGEST_WAIT));
        assert_eq!(wait("soon"), None);
    }

    #[tokio::test]
    async fn attempts_are_bounded_even_when_each_moves_on() {
        let settings = settings(2, 0);
        let progress = Progress::default();
        let mut retries = Retries::new(&settings);
        for _ in 0..2 {
            retries.pause(failure(Again::Soon), false, &progress).await.unwrap();
        }
        assert!(retries.pause(failure(Again::Soon), false, &progress).await.is_err());
        let mut retries = Retries::new(&settings);
        for _ in 0..2 * TOTAL_FACTOR {
            retries.pause(failure(Again::Soon), true, &progress).await.unwrap();
        }
        assert!(retries.pause(failure(Again::Soon), true, &progress).await.is_err());
    }

    #[tokio::test]
    async fn a_large_image_over_a_bad_line_fills_no_log() {
        let (settings, progress, lines) = (settings(2, 0), Progress::default(), Lines::begin());
        let of_all = Arc::default();
        // 4 GiB in pieces of 4 MiB, each of which fails once.
        for _ in 0..1024 {
            let mut retries = Retries::of_part(&settings, Arc::clone(&of_all));
            retries.pause(failure(Again::Soon), true, &progress).await.unwrap();
        }
        assert_eq!(lines.count(), 4 + 8, "1 to 4, then 8, 16, … 1024");
    }

    #[tokio::test]
    async fn a_definite_answer_is_not_tried_again() {
        let settings = settings(3, 0);
        let mut retries = Retries::new(&settings);
        assert!(retries.pause(failure(Again::Never), true, &Progress::default()).await.is_err());
    }

    #[tokio::test]
    async fn a_wait_ends_when_the_job_is_stopped() {
        let settings = settings(3, 60_000);
        let progress = Progress::default();
        progress.stop(Stop::Cancel);
        let error = Retries::new(&settings).pause(failure(Again::Soon), false, &progress).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::Cancelled);
    }

    #[test]
    fn the_server_s_wish_is_a_lower_bound() {
        let settings = settings(3, 100);
        let retries = Retries::new(&settings);
        assert_eq!(retries.wait(Again::After(Duration::from_secs(5))), Duration::from_secs(5));
        let wait = retries.wait(Again::Soon).as_millis();
        assert!((50..=100).contains(&wait), "{wait}");
    }
}
