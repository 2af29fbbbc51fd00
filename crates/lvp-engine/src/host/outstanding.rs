//! Questions that may never be answered, each asked in a thread of its own: how many of a kind are out at once.
//!
//! ```text
//!  begin ─► asked, at most AT_ONCE of a kind ─► answered: the turn ends, whoever still waits for it
//!    │                  │
//!    │                  └─ overdue: whoever asks the same is refused at once, until an answer comes
//!    └─ all turns are taken: waits for one, as long as for an answer
//! ```
//! So who does not answer costs a few threads and connections, however often and however long he is asked. It leaves out the
//! asking.

use std::{
    collections::BTreeMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// So many questions of one kind are out at once.
const AT_ONCE: usize = 4;

/// The questions that are out: for each kind, when they were asked.
#[derive(Default)]
pub struct Outstanding {
    asked: Mutex<BTreeMap<String, Vec<Instant>>>,
    answered: Condvar,
}

/// The right to ask one question; ends when dropped, by who has the answer.
pub struct Turn<'a> {
    outstanding: &'a Outstanding,
    kind: String,
    since: Instant,
}

impl Outstanding {
    /// None.
    pub const fn new() -> Self {
        Self { asked: Mutex::new(BTreeMap::new()), answered: Condvar::new() }
    }

    /// A turn to ask a question of this kind. Blocks for `limit` at most, which is also what an answer may take.
    ///
    /// # Errors
    /// How long the oldest question of the kind has been out, where that is too long.
    pub fn begin(&self, kind: &str, limit: Duration) -> Result<Turn<'_>, Duration> {
        let begun = Instant::now();
        let mut asked = self.lock();
        loop {
            let out = asked.get(kind).map(Vec::as_slice).unwrap_or_default();
            let oldest = out.iter().min().map(Instant::elapsed).unwrap_or_default();
            if oldest >= limit {
                return Err(oldest);
            }
            if out.len() < AT_ONCE {
                let since = Instant::now();
                asked.entry(kind.to_owned()).or_default().push(since);
                return Ok(Turn { outstanding: self, kind: kind.to_owned(), since });
            }
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(oldest);
            }
            let waited = self.answered.wait_timeout(asked, left.min(limit - oldest));
            asked = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Instant>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut asked = self.outstanding.lock();
        if let Some(out) = asked.get_mut(&self.kind) {
            // Of two that were asked in the same moment, either.
            if let Some(place) = out.iter().position(|since| *since == self.since) {
                out.swap_remove(place);
            }
            if out.is_empty() {
                asked.remove(&self.kind);
            }
        }
        self.outstanding.answered.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(50);

    #[test]
    fn who_does_not_answer_is_asked_a_few_times_and_again_when_he_does() {
        let outstanding = Outstanding::new();
        let turns: Vec<_> = (0..AT_ONCE).map(|_| outstanding.begin("a", LONG).map_err(drop).unwrap()).collect();
        // All turns are taken: it is waited for one, for as long as an answer may take.
        assert!(outstanding.begin("a", SHORT).is_err_and(|out| out >= SHORT));
        // They are overdue now, so nobody waits; what is overdue says the limit of who asks.
        assert!(outstanding.begin("a", SHORT).is_err());
        assert!(outstanding.begin("b", SHORT).is_ok(), "another kind waits for itself");
        drop(turns);
        assert!(outstanding.begin("a", SHORT).is_ok());
        assert!(outstanding.lock().is_empty(), "nothing is left of what was answered");
    }

    #[test]
    fn one_question_that_is_overdue_is_enough() {
        let outstanding = Outstanding::new();
        let _turn = outstanding.begin("a", LONG).map_err(drop).unwrap();
        thread::sleep(SHORT);
        assert!(outstanding.begin("a", SHORT).is_err());
    }

    #[test]
    fn who_waits_has_the_turn_of_who_is_answered() {
        let outstanding = Outstanding::new();
        let mut turns: Vec<_> = (0..AT_ONCE).map(|_| outstanding.begin("a", LONG).map_err(drop).unwrap()).collect();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| outstanding.begin("a", LONG).is_ok());
            turns.pop();
            assert!(waiting.join().unwrap());
        });
    }
}
