//! How fast work may go: rates in bytes a second that several jobs and threads keep together.
//!
//! ```text
//!  time ──────────────────────────────────────────────────────►
//!        │ thread 1: 2 MiB │ thread 2: 2 MiB │ thread 1: 2 MiB │      each waits for the begin of its part
//! ```
//! Parts are given out in the order in which they are asked for, so nobody starves. Who comes late may catch up a little,
//! so that a timer's delay does not lower the rate. It leaves out the waiting itself: see `progress`.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// What was not used may be used so much later: longer than a timer is late, shorter than anybody notices.
const CATCH_UP: Duration = Duration::from_millis(50);

/// One rate, or none for now. Whoever has it keeps it together with the others who have it.
#[derive(Debug)]
pub struct RateLimit {
    /// [`UNLIMITED`] for none.
    bytes_per_second: AtomicU64,
    /// What was given out so far.
    taken: AtomicU64,
    /// The end of the last part that was given out.
    free: Mutex<Instant>,
}

const UNLIMITED: u64 = u64::MAX;

impl RateLimit {
    /// Slower than this many bytes a second, no disk would ever be written; a limit below is a mistake.
    pub const LEAST: u64 = 64 << 10;

    /// So many bytes a second; fewer than [`LEAST`](Self::LEAST) are raised to it.
    pub fn new(bytes_per_second: u64) -> Self {
        let limit = Self::unlimited();
        limit.set(Some(bytes_per_second));
        limit
    }

    /// None, until one is [`set`](Self::set).
    pub fn unlimited() -> Self {
        Self {
            bytes_per_second: AtomicU64::new(UNLIMITED),
            taken: AtomicU64::default(),
            free: Mutex::new(Instant::now()),
        }
    }

    /// From now on so many bytes a second, as in [`new`](Self::new), or no limit. Who waits already waits for its part.
    pub fn set(&self, bytes_per_second: Option<u64>) {
        let rate = bytes_per_second.map_or(UNLIMITED, |rate| rate.max(Self::LEAST));
        self.bytes_per_second.store(rate, Ordering::Relaxed);
    }

    /// The bytes of all parts that were given out so far.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Takes the next part, of so many bytes, and says how long after `now` it begins.
    fn take(&self, now: Instant, bytes: u64) -> Duration {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        let rate = self.bytes_per_second.load(Ordering::Relaxed);
        if rate == UNLIMITED {
            return Duration::ZERO;
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = (*free).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        *free = begin + Duration::from_secs_f64(bytes as f64 / rate as f64);
        begin.saturating_duration_since(now)
    }
}

/// The rates that a piece of work keeps: the process's and its job's, the slower one counts.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    download: Vec<Arc<RateLimit>>,
    /// Of images that are files of this machine.
    copy: Vec<Arc<RateLimit>>,
    write: Vec<Arc<RateLimit>>,
}

impl Limits {
    /// Limits in bytes a second of what comes over the network, and of what is written to volumes; `None`: no limit.
    pub fn new(download: Option<u64>, write: Option<u64>) -> Self {
        let rates = |rate: Option<u64>| rate.map(|rate| Arc::new(RateLimit::new(rate))).into_iter().collect();
        Self { download: rates(download), copy: Vec::new(), write: rates(write) }
    }

    /// Rates that somebody else may change: of what comes into the cache, from wherever, and of what is written to volumes.
    pub fn of(cache: Arc<RateLimit>, write: Arc<RateLimit>) -> Self {
        Self { download: vec![Arc::clone(&cache)], copy: vec![cache], write: vec![write] }
    }

    /// These and those together.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let joined = |one: &[Arc<RateLimit>], two: &[Arc<RateLimit>]| one.iter().chain(two).cloned().collect();
        Self {
            download: joined(&self.download, &other.download),
            copy: joined(&self.copy, &other.copy),
            write: joined(&self.write, &other.write),
        }
    }

    /// How long who downloaded so many bytes waits before it takes more.
    pub fn after_download(&self, bytes: u64) -> Duration {
        longest(&self.download, bytes)
    }

    /// How long who copied so many bytes of a file of this machine waits before it takes more.
    pub fn after_copy(&self, bytes: u64) -> Duration {
        longest(&self.copy, bytes)
    }

    /// How long who writes so many bytes waits before.
    pub fn before_write(&self, bytes: u64) -> Duration {
        longest(&self.write, bytes)
    }
}

fn longest(rates: &[Arc<RateLimit>], bytes: u64) -> Duration {
    if rates.is_empty() {
        return Duration::ZERO;
    }
    let now = Instant::now();
    rates.iter().map(|rate| rate.take(now, bytes)).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn parts_follow_each_other_at_the_rate() {
        let rate = RateLimit::new(MIB);
        let now = Instant::now() + SECOND;
        assert_eq!(rate.take(now, MIB), Duration::ZERO);
        // What was not used before counts for a moment only.
        assert_eq!(rate.take(now, MIB), SECOND - CATCH_UP);
        assert_eq!(rate.take(now, MIB / 2), 2 * SECOND - CATCH_UP);
        // Who comes late pays no more than who comes at once.
        let late = now + 3 * SECOND;
        assert_eq!(rate.take(late, MIB), Duration::ZERO);
        assert_eq!(rate.take(late, MIB), SECOND - CATCH_UP);
    }

    #[test]
    fn timers_that_are_late_do_not_lower_the_rate() {
        let rate = RateLimit::new(MIB);
        let begin = Instant::now() + SECOND;
        let mut now = begin;
        for _ in 0..1000 {
            now += rate.take(now, MIB / 100) + Duration::from_millis(2);
        }
        let took = (now - begin).as_secs_f64();
        assert!((9.9..10.1).contains(&took), "{took}");
    }

    #[test]
    fn the_slower_of_two_rates_counts_and_one_is_shared() {
        let process = Limits::new(Some(4 * MIB), None);
        let (one, two) = (process.and(&Limits::new(Some(MIB), Some(MIB))), process);
        assert_eq!(one.before_write(0), Duration::ZERO);
        one.after_download(4 * MIB);
        let (slow, shared) = (one.after_download(1), two.after_download(1));
        assert!(slow > 3 * SECOND && shared > SECOND / 2 && shared < 2 * SECOND, "{slow:?} {shared:?}");
        assert_eq!(two.before_write(1 << 40), Duration::ZERO);
        assert_eq!(two.before_write(1 << 40), Duration::ZERO, "no limit");
    }

    #[test]
    fn no_rate_is_so_low_that_nothing_ever_ends() {
        let now = Instant::now() + SECOND;
        let rate = RateLimit::new(0);
        rate.take(now, RateLimit::LEAST);
        assert_eq!(rate.take(now, 1), SECOND - CATCH_UP);
    }

    #[test]
    fn a_rate_that_changes_counts_from_the_next_part_on() {
        let rate = RateLimit::unlimited();
        let now = Instant::now() + SECOND;
        assert_eq!((rate.take(now, 1 << 40), rate.take(now, 1 << 40)), (Duration::ZERO, Duration::ZERO));
        rate.set(Some(MIB));
        assert_eq!(rate.take(now, MIB), Duration::ZERO, "what was taken before is not paid for");
        rate.set(Some(2 * MIB));
        assert_eq!(rate.take(now, MIB), SECOND - CATCH_UP);
        assert_eq!(rate.take(now, MIB), SECOND + SECOND / 2 - CATCH_UP);
        rate.set(None);
        assert_eq!(rate.take(now, MIB), Duration::ZERO);
        assert_eq!(rate.taken(), (1 << 41) + 4 * MIB);
    }
}
