//! Who counts on which space: what running work was promised and has not taken yet, kept for each place.
//!
//! ```text
//!  promise ──► bytes ──took──► fewer bytes are still to come ──dropped──► nothing of it is left
//!                                  └─ they are gone from what the place itself says is free
//! ```
//! What a place has free is asked while nobody else is promised anything there, after what was promised before: so a byte
//! that is written in between counts twice, and none counts for two. Promises are of this process and survive nothing: a
//! job that runs again is promised its space again.
//!
//! It leaves out what a place has free, how much somebody needs, and the words of a refusal.

use std::{
    collections::HashMap,
    fmt,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use lvp_api::{ByteSize, ErrorCode};

use crate::error::{Error, Result};

/// Something that space is taken from: all that is taken from the same has the same place.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Place {
    /// A file system, by its device number: directories on it share its space.
    FileSystem(u64),
    /// A volume group or thin pool, or the metadata of one, by a name of its own.
    Named(String),
}

impl Place {
    /// The file system of a path that exists.
    ///
    /// # Errors
    /// `input_output`.
    pub fn of(path: &Path) -> Result<Self> {
        let facts = path.metadata().map_err(|error| Error::io("looking at", path, error))?;
        Ok(Self::FileSystem(facts.dev()))
    }
}

/// All promises. Clones are the same ledger.
#[derive(Clone, Default)]
pub struct Ledger {
    rooms: Arc<Mutex<HashMap<Place, Arc<Mutex<Room>>>>>,
}

/// One place, while nobody else is promised anything there.
#[derive(Default)]
pub struct Room {
    amounts: Vec<Weak<Amount>>,
    kept: u64,
}

/// What one piece of work was promised, in bytes.
#[derive(Debug)]
struct Amount {
    promised: AtomicU64,
    /// So much of it is taken: gone from what the place says is free.
    taken: AtomicU64,
    /// Of one that is not to be exceeded: what was begun to be taken.
    begun: Option<AtomicU64>,
}

impl Amount {
    fn to_come(&self) -> u64 {
        self.promised.load(Ordering::Relaxed).saturating_sub(self.taken.load(Ordering::Relaxed))
    }
}

/// Space that nobody else counts on, until this is dropped.
#[derive(Debug)]
pub struct Promise {
    amount: Arc<Amount>,
}

/// What takes promised space tells so. One of no promise, or of one that is gone, tells nobody.
#[derive(Clone, Default)]
pub struct Spender {
    amount: Weak<Amount>,
}

impl Ledger {
    /// Decides about a place while nobody else does. `decide` may ask what is free there; that keeps only those waiting
    /// who ask for the same place.
    pub fn at<T>(&self, place: &Place, decide: impl FnOnce(&mut Room) -> T) -> T {
        let room = {
            let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(rooms.entry(place.clone()).or_default())
        };
        decide(&mut room.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps so many bytes of a place free of promises.
    pub fn keep(&self, place: &Place, bytes: u64) {
        self.at(place, |room| room.kept = room.kept.max(bytes));
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").finish_non_exhaustive()
    }
}

impl Room {
    /// What running work was promised and has not taken yet. To be asked before what is free.
    pub fn promised(&mut self) -> u64 {
        self.amounts.retain(|amount| amount.strong_count() > 0);
        let amounts = self.amounts.iter().filter_map(Weak::upgrade);
        amounts.fold(0, |sum, amount| sum.saturating_add(amount.to_come()))
    }

    /// What is kept free of promises.
    pub fn kept(&self) -> u64 {
        self.kept
    }

    /// Promises so many bytes, whatever is free.
    pub fn promise(&mut self, bytes: u64) -> Promise {
        self.enter(bytes, None)
    }

    /// As [`promise`](Self::promise), for work of which nobody knows how much it takes: it fails before it takes more.
    pub fn promise_at_most(&mut self, bytes: u64) -> Promise {
        self.enter(bytes, Some(AtomicU64::new(0)))
    }

    fn enter(&mut self, bytes: u64, begun: Option<AtomicU64>) -> Promise {
        let amount = Arc::new(Amount { promised: AtomicU64::new(bytes), taken: AtomicU64::new(0), begun });
        self.amounts.push(Arc::downgrade(&amount));
        Promise { amount }
    }
}

impl Promise {
    /// So many bytes in all.
    pub fn bytes(&self) -> u64 {
        self.amount.promised.load(Ordering::Relaxed)
    }

    /// Makes it so many bytes in all; never fewer. To be called where the place is decided about.
    pub fn raise(&self, bytes: u64) {
        self.amount.promised.fetch_max(bytes, Ordering::Relaxed);
    }

    /// Notes how much of it is taken.
    pub fn set_taken(&self, bytes: u64) {
        self.amount.taken.store(bytes, Ordering::Relaxed);
    }

    /// What tells that it is taken.
    pub fn spender(&self) -> Spender {
        Spender { amount: Arc::downgrade(&self.amount) }
    }
}

impl Spender {
    /// To be asked before so many bytes are taken.
    ///
    /// # Errors
    /// `insufficient_space` when the promise is not to be exceeded, and would be.
    pub fn may_take(&self, bytes: u64) -> Result<()> {
        let Some(amount) = self.amount.upgrade() else { return Ok(()) };
        let Some(begun) = &amount.begun else { return Ok(()) };
        let before = begun.fetch_add(bytes, Ordering::Relaxed);
        let promised = amount.promised.load(Ordering::Relaxed);
        if before.saturating_add(bytes) <= promised {
            return Ok(());
        }
        Err(Error::new(
            ErrorCode::InsufficientSpace,
            format!("the image has more data than the {} that were free for it", ByteSize(promised)),
        )
        .hint("remove volumes, or use a target with more space; an image in qcow2 says before how much it takes")
        .detail("promised_bytes", promised))
    }

    /// Tells that so many bytes were taken.
    pub fn took(&self, bytes: u64) {
        if let Some(amount) = self.amount.upgrade() {
            amount.taken.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn pool() -> Place {
        Place::Named("lvm:vg0/pool0".to_owned())
    }

    fn promised(ledger: &Ledger, place: &Place) -> u64 {
        ledger.at(place, |room| room.promised())
    }

    #[test]
    fn a_promise_shrinks_as_it_is_taken_and_is_gone_when_dropped() {
        let ledger = Ledger::default();
        let (first, second) = ledger.at(&pool(), |room| (room.promise(100), room.promise(50)));
        let spender = first.spender();
        assert_eq!(promised(&ledger, &pool()), 150);
        spender.took(30);
        assert_eq!(promised(&ledger, &pool()), 120);
        // More than was promised is not taken from another's.
        spender.took(1000);
        assert_eq!(promised(&ledger, &pool()), 50);
        first.set_taken(0);
        second.raise(60);
        second.raise(10);
        assert_eq!((promised(&ledger, &pool()), second.bytes()), (160, 60));
        drop(first);
        spender.took(1);
        assert_eq!(promised(&ledger, &pool()), 60);
        drop(second);
        assert_eq!(promised(&ledger, &pool()), 0);
        assert_eq!(ledger.at(&pool(), |room| room.amounts.len()), 0);
    }

    #[test]
    fn places_are_counted_apart_and_directories_of_one_file_system_together() {
        let ledger = Ledger::default();
        let directory = tempfile::tempdir().unwrap();
        let inside = directory.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        let (one, other) = (Place::of(directory.path()).unwrap(), Place::of(&inside).unwrap());
        assert_eq!(one, other);
        let _promise = ledger.at(&one, |room| room.promise(7));
        assert_eq!((promised(&ledger, &other), promised(&ledger, &pool())), (7, 0));
        assert!(Place::of(&directory.path().join("absent")).is_err());
        ledger.keep(&one, 5);
        ledger.keep(&other, 3);
        assert_eq!(ledger.at(&one, |room| room.kept()), 5);
    }

    #[test]
    fn work_of_unknown_size_takes_no_more_than_it_was_promised() {
        let ledger = Ledger::default();
        let promise = ledger.at(&pool(), |room| room.promise_at_most(100));
        let spender = promise.spender();
        spender.may_take(60).unwrap();
        spender.may_take(40).unwrap();
        let error = spender.may_take(1).unwrap_err();
        assert_eq!((error.code(), error.retryable()), (ErrorCode::InsufficientSpace, true));
        // Others may: what they need is known, and only rounded otherwise.
        ledger.at(&pool(), |room| room.promise(1)).spender().may_take(100).unwrap();
        Spender::default().may_take(u64::MAX).unwrap();
    }

    /// Many at once, each of whom looks what is free: what they are given is never more than there is.
    #[test]
    fn no_byte_is_promised_twice() {
        const FREE: u64 = 1000;
        let ledger = Ledger::default();
        let given = thread::scope(|scope| {
            let ask = || {
                ledger.at(&pool(), |room| {
                    let promised = room.promised();
                    // As long as it takes to ask what is free.
                    thread::yield_now();
                    (promised + 70 <= FREE).then(|| room.promise(70))
                })
            };
            let threads: Vec<_> = (0..40).map(|_| scope.spawn(ask)).collect();
            threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(given.len() as u64, FREE / 70);
        assert!(given.iter().map(Promise::bytes).sum::<u64>() <= FREE);
    }
}
