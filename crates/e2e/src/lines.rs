//! Counts the lines that code logs for people, so that a test can say how many there may be.
//!
//! It leaves out what they say, and lines of other threads than the test's own.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    span::{Attributes, Id, Record},
    subscriber::DefaultGuard,
};

/// The warnings and errors of this thread, from now on.
pub struct Lines {
    count: Arc<AtomicUsize>,
    _ends_with_it: DefaultGuard,
}

impl Lines {
    /// Begins to count.
    pub fn begin() -> Self {
        let count = Arc::new(AtomicUsize::new(0));
        let guard = tracing::subscriber::set_default(Counting(Arc::clone(&count)));
        Self { count, _ends_with_it: guard }
    }

    /// How many there were so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

struct Counting(Arc<AtomicUsize>);

impl Subscriber for Counting {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
