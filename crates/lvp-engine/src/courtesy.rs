//! Courtesy to the guests of the host: while they wait for their disks, work goes slower; then faster again.
//!
//! ```text
//!  each second       pressure: the share of it in which a guest waited for I/O
//!
//!  above the limit   half of what came and was written in that second, or of the rate, but never less than LEAST
//!  below it          a quarter more; no rate any more once it is twice what is written
//! ```
//! This is how TCP shares a line (RFC 5681, section 3.1): down by a factor, up in small steps. What comes over the network
//! and what is written keep the rate each, because the cache may be on the guests' disks too. It leaves out how pressure is
//! read (`host::pressure`) and how a rate is kept (`limit`).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use lvp_api::ByteSize;

use crate::{
    error::Result,
    host::pressure::PressureFile,
    limit::{Limits, RateLimit},
};

/// How long a look takes in: long enough to be no accident, short enough that nobody calls for help.
const LOOK: Duration = Duration::from_secs(1);
/// Work goes on at least so fast, in bytes a second.
const LEAST: u64 = 4 << 20;

/// From which pressure on work goes slower.
#[derive(Debug, Clone)]
pub struct CourtesySettings {
    /// The percent of the time in which somebody may wait for I/O.
    pub limit: u8,
    /// The file that tells it; `None`: the guests'.
    pub file: Option<PathBuf>,
}

/// What looks after the pressure.
pub struct Courtesy {
    settings: CourtesySettings,
    pressure: PressureFile,
    download: Arc<RateLimit>,
    write: Arc<RateLimit>,
}

impl Courtesy {
    /// # Errors
    /// `invalid_configuration` when pressure is not told here.
    pub fn new(settings: CourtesySettings) -> Result<Self> {
        let pressure = PressureFile::open(settings.file.as_deref())?;
        let unlimited = || Arc::new(RateLimit::unlimited());
        Ok(Self { settings, pressure, download: unlimited(), write: unlimited() })
    }

    /// What work keeps to.
    pub fn limits(&self) -> Limits {
        Limits::of(Arc::clone(&self.download), Arc::clone(&self.write))
    }

    fn tell_change(&self, before: Option<&Look>, now: &Look) {
        tell_group(self.pressure.path(), self.settings.limit, before, now);
    }

    /// Looks after it until dropped.
    pub async fn look_always(self) {
        let mut before = Look::at(&self);
        self.tell_change(None, &before);
        let mut rate = None;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = Look::at(&self);
            self.tell_change(Some(&before), &now);
            let (pressure, speed) = now.since(&before);
            let next = next_rate(rate, pressure > f64::from(self.settings.limit), speed);
            tell(rate, next, pressure);
            for limit in [&self.download, &self.write] {
                limit.set(next);
            }
            (before, rate) = (now, next);
        }
    }
}

/// What is known at one moment.
struct Look {
    at: Instant,
    /// How long guests have waited so far; nothing where there are none.
    waited: Result<Option<Duration>>,
    /// Bytes that came and bytes that were written so far; the more of them counts.
    bytes: [u64; 2],
}

impl Look {
    fn at(courtesy: &Courtesy) -> Self {
        let waited = courtesy.pressure.waited();
        Self { at: Instant::now(), waited, bytes: [courtesy.download.taken(), courtesy.write.taken()] }
    }

    /// The percent of the time since then in which somebody waited, and the bytes a second.
    fn since(&self, before: &Self) -> (f64, u64) {
        let seconds = (self.at - before.at).as_secs_f64().max(f64::MIN_POSITIVE);
        // Its count begins anew with the group, when the first guest comes.
        let told = |look: &Self| look.waited.as_ref().ok().copied().flatten();
        let waited = told(self).zip(told(before)).map_or(Duration::ZERO, |(now, then)| now.saturating_sub(then));
        let bytes = self.bytes.iter().zip(before.bytes).map(|(now, then)| now - then).max().unwrap_or_default();
        (100.0 * waited.as_secs_f64() / seconds, (bytes as f64 / seconds) as u64)
    }
}

/// Says whether there is somebody to heed, and whether that can be told, whenever that is another answer than before.
fn tell_group(file: &Path, limit: u8, before: Option<&Look>, now: &Look) {
    let kind = |look: &Look| look.waited.as_ref().map(Option::is_some).map_err(drop);
    if before.is_some_and(|before| kind(before) == kind(now)) {
        return;
    }
    let file = file.display().to_string();
    match &now.waited {
        Ok(Some(_)) => tracing::info!(file, limit, "jobs heed how long guests wait for their disks"),
        Ok(None) => tracing::info!(file, "there is no such group: no guest's wait for its disk is told"),
        Err(error) => {
            tracing::warn!(file, error = %error.chain(), "nobody knows how long guests wait for their disks");
        }
    }
}

/// The next rate, in bytes a second; `None`: no limit.
fn next_rate(rate: Option<u64>, is_pressed: bool, speed: u64) -> Option<u64> {
    match (rate, is_pressed) {
        // Who does nothing presses nobody.
        (None, true) if speed == 0 => None,
        (rate, true) => Some((rate.unwrap_or(u64::MAX).min(speed.max(LEAST)) / 2).max(LEAST)),
        (None, false) => None,
        (Some(rate), false) => {
            let more = rate.saturating_add(rate / 4);
            (more / 2 < speed.max(LEAST)).then_some(more)
        }
    }
}

/// Says when work begins to go slower, and when it does not any more.
fn tell(before: Option<u64>, now: Option<u64>, pressure: f64) {
    let percent = pressure.round();
    match (before, now) {
        (None, Some(rate)) => {
            tracing::info!(percent, rate = %ByteSize(rate), "guests wait for their disks: copies go slower");
        }
        (Some(_), None) => tracing::info!(percent, "guests do not wait for their disks: copies go as fast as they can"),
        (Some(before), Some(rate)) if before != rate => {
            tracing::debug!(percent, rate = %ByteSize(rate), "copies go at another rate");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use e2e::lines::Lines;

    use super::*;
    use crate::error::Error;

    #[test]
    fn a_file_that_cannot_be_read_is_told_once_until_it_can() {
        let lines = Lines::begin();
        let look = |waited| Look { at: Instant::now(), waited, bytes: [0; 2] };
        let broken = || look(Err(Error::internal("it cannot be read")));
        let mut before = None;
        let looks = [broken(), broken(), broken(), look(Ok(Some(LOOK))), look(Ok(None)), broken(), broken()];
        for now in looks {
            tell_group(Path::new("/x"), 20, before.as_ref(), &now);
            before = Some(now);
        }
        assert_eq!(lines.count(), 2);
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn pressure_halves_what_is_written_and_calm_gives_it_back() {
        assert_eq!(next_rate(None, false, 900 * MIB), None);
        let slower = next_rate(None, true, 400 * MIB);
        assert_eq!(slower, Some(200 * MIB));
        assert_eq!(next_rate(slower, true, 200 * MIB), Some(100 * MIB));
        assert_eq!(next_rate(Some(100 * MIB), false, 100 * MIB), Some(125 * MIB));
        // Something else holds it back: there is no need for a rate.
        assert_eq!(next_rate(Some(100 * MIB), false, 40 * MIB), None);
    }

    #[test]
    fn work_always_goes_on_and_idleness_is_no_reason() {
        let mut rate = Some(100 * MIB);
        for _ in 0..20 {
            rate = next_rate(rate, true, rate.unwrap());
        }
        assert_eq!(rate, Some(LEAST));
        assert_eq!(next_rate(None, true, 0), None);
        assert_eq!(next_rate(Some(LEAST), false, 0), Some(LEAST + LEAST / 4), "a pause of a second proves nothing");
    }

    /// A disk of which guests want a part, and work takes what it may of the rest.
    #[test]
    fn work_settles_below_what_the_disk_can_do() {
        let (disk, guests) = (500 * MIB, 200 * MIB);
        let (mut rate, mut pressed, mut written) = (None, 0, 0);
        for _ in 0..100 {
            let speed = rate.unwrap_or(disk).min(disk);
            let is_pressed = speed + guests > disk;
            pressed += u32::from(is_pressed);
            written += speed;
            rate = next_rate(rate, is_pressed, speed);
        }
        let share = written as f64 / (100 * (disk - guests)) as f64;
        assert!(pressed <= 30 && (0.5..1.1).contains(&share), "{pressed} of 100 looks, {share} of the rest");
    }
}
