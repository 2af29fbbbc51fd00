//! How far a file is good: set by who fills or checks it in order, waited for by who reads it.
//!
//! ```text
//!  one writer:    advance … advance ──► complete      the whole file is good
//!                               └─────► fail          what is above the mark will not come
//!  many readers:  wait(end) ──► good below `end`, or an error
//! ```
//! It never goes back: what was good stays good. It leaves out the file, and why it failed: the writer knows that.

use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use lvp_api::ErrorCode;

use crate::{
    error::{Error, Result},
    progress::Progress,
};

/// A reader that waits looks this often whether its job shall stop.
const LOOK: Duration = Duration::from_millis(100);

/// The mark.
#[derive(Default)]
pub struct Watermark {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    good: u64,
    end: Option<End>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Complete,
    Failed,
}

impl Watermark {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.moved.notify_all();
    }

    /// Everything below `to` is good. After [`fail`](Self::fail) it changes nothing.
    pub fn advance(&self, to: u64) {
        self.change(|state| {
            if state.end.is_none() {
                state.good = state.good.max(to);
            }
        });
    }

    /// Everything is good.
    pub fn complete(&self) {
        self.change(|state| state.end = Some(state.end.unwrap_or(End::Complete)));
    }

    /// Nothing more becomes good; a reader that needs no more says so too. After [`complete`](Self::complete) it changes nothing.
    pub fn fail(&self) {
        self.change(|state| state.end = Some(state.end.unwrap_or(End::Failed)));
    }

    /// Whether readers may have read anything.
    pub fn has_moved(&self) -> bool {
        self.state().good > 0
    }

    /// Whether nobody needs it any more, or the writer has given up.
    pub fn has_failed(&self) -> bool {
        self.state().end == Some(End::Failed)
    }

    /// The error of a mark that has failed.
    pub fn failure(&self) -> Option<Error> {
        self.has_failed().then(failed)
    }

    /// Waits until everything below `end` is good. Blocks.
    ///
    /// # Errors
    /// The stop of the job; `interrupted` when it never will be: the writer then has the reason.
    pub fn wait(&self, end: u64, progress: &Progress) -> Result<()> {
        let mut state = self.state();
        loop {
            if state.good >= end || state.end == Some(End::Complete) {
                return Ok(());
            }
            progress.check()?;
            if state.end == Some(End::Failed) {
                return Err(failed());
            }
            state = self.moved.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn failed() -> Error {
    Error::new(ErrorCode::Interrupted, "the rest of the image does not come")
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;
    use crate::progress::Stop;

    #[test]
    fn a_reader_waits_for_what_it_reads_and_no_more() {
        let mark = Arc::new(Watermark::default());
        assert!(!mark.has_moved());
        let reader = {
            let mark = mark.clone();
            thread::spawn(move || mark.wait(100, &Progress::default()))
        };
        mark.advance(99);
        mark.advance(5);
        assert!(!reader.is_finished());
        mark.advance(100);
        reader.join().unwrap().unwrap();
        mark.complete();
        mark.fail();
        mark.wait(u64::MAX, &Progress::default()).unwrap();
    }

    #[test]
    fn what_is_good_stays_so_after_a_failure() {
        let mark = Watermark::default();
        mark.advance(10);
        mark.fail();
        mark.complete();
        mark.advance(20);
        mark.wait(10, &Progress::default()).unwrap();
        assert_eq!(mark.wait(11, &Progress::default()).unwrap_err().code(), ErrorCode::Interrupted);
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let progress = Progress::default();
        progress.stop(Stop::Cancel);
        assert_eq!(Watermark::default().wait(1, &progress).unwrap_err().code(), ErrorCode::Cancelled);
    }
}
