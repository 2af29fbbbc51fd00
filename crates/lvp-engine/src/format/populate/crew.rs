//! The threads of one copy, each confined to its work: however one of them ends but well, the others stop.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use super::Counts;
use crate::{
    error::{Error, Result},
    host::{block::OpenTarget, confine::confine_decoder, priority::IoPriority},
    progress::Progress,
};

/// What the threads of one copy share about going on.
pub struct Crew<'a> {
    progress: &'a Progress,
    /// All that the threads may write to.
    target: &'a OpenTarget,
    io_priority: IoPriority,
    stopped: AtomicBool,
}

impl<'a> Crew<'a> {
    pub fn new(progress: &'a Progress, target: &'a OpenTarget, io_priority: IoPriority) -> Self {
        Self { progress, target, io_priority, stopped: AtomicBool::new(false) }
    }

    /// Whether no other thread has failed; an error when the job shall stop.
    pub fn goes_on(&self) -> Result<bool> {
        self.progress.check()?;
        Ok(!self.stopped.load(Ordering::Relaxed))
    }

    /// Starts a thread.
    pub fn spawn<'scope, 'env: 'scope>(
        &'env self,
        scope: &'scope thread::Scope<'scope, 'env>,
        name: String,
        work: impl FnOnce() -> Result<Counts> + Send + 'scope,
    ) -> std::io::Result<Member<'scope>> {
        thread::Builder::new().name(name).spawn_scoped(scope, move || self.guarded(work))
    }

    fn guarded(&self, work: impl FnOnce() -> Result<Counts>) -> Result<Counts> {
        struct StopOthers<'a>(Option<&'a AtomicBool>);
        impl Drop for StopOthers<'_> {
            fn drop(&mut self) {
                if let Some(stopped) = self.0 {
                    stopped.store(true, Ordering::Relaxed);
                }
            }
        }
        let mut guard = StopOthers(Some(&self.stopped));
        if let Err(error) = self.io_priority.take() {
            tracing::warn!(error = %error.chain(), "an image is copied with the usual I/O priority");
        }
        confine_decoder(&self.target.descriptors());
        let done = work()?;
        guard.0 = None;
        Ok(done)
    }
}

/// A thread of the crew.
pub type Member<'scope> = thread::ScopedJoinHandle<'scope, Result<Counts>>;

/// Waits for all threads; the first error in their order counts, a panic last.
pub fn collect(threads: Vec<Member<'_>>) -> Result<Counts> {
    let mut sum = Counts::default();
    let mut failed: Option<Error> = None;
    for thread in threads {
        match thread.join() {
            Ok(Ok(done)) => sum += done,
            Ok(Err(error)) => failed = failed.or(Some(error)),
            Err(_) => failed = failed.or_else(|| Some(Error::internal("a thread that copied the image panicked"))),
        }
    }
    failed.map_or(Ok(sum), Err)
}

/// No thread at all could be started.
pub fn not_started(error: std::io::Error) -> Error {
    Error::internal("no thread could be started").source(error)
}
