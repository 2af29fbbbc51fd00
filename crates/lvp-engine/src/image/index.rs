//! Which images are in the cache, who may go, and who may come: lookups, admission, eviction.
//!
//! ```text
//!   reserve ──► (evict the least recently used idle images) ──► Reservation ──► publish: it becomes an image
//!                  │                     ▲                           └────────► dropped: the space is free again
//!                  └─► who uses them? ───┘   asked without the lock, once each time; who is used stays
//! ```
//! Two downloads never count on the same space: what is reserved counts as used, and what of it is not written yet is
//! promised (`space`), to downloads and to volumes on the same file system alike. It leaves out sources and downloads.
//! Everything here blocks (file system, locks).

mod damaged;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use lvp_api::{ByteSize, Digest, DigestAlgorithm, ErrorCode, Image};

use super::{
    directory::{Directory, can_be_continued},
    entry::{Entry, Record},
    partial,
    sidecar::{Published, Sidecar, SourceRecord},
    source::SourceInfo,
    users::{Asked, Users},
};
use crate::{
    error::{Error, Result},
    space::{Ledger, Place, Promise, Room},
};

/// The fewest digits of a digest that name an image.
const SHORTEST_PREFIX: usize = 12;

/// The images of one directory.
pub(super) struct Index {
    directory: Directory,
    max_bytes: Option<u64>,
    ledger: Ledger,
    /// The file system of the directory.
    place: Place,
    /// Who knows which of them others use.
    users: Users,
    state: Mutex<State>,
    /// One image appears at a time, so that two downloads of the same bytes become one image.
    publishing: Mutex<()>,
}

#[derive(Default)]
struct State {
    records: BTreeMap<String, Arc<Record>>,
    /// What each download has reserved; what of it is written is taken.
    reservations: HashMap<u64, Promise>,
    next_reservation: u64,
    /// Downloads that an earlier run left and that nobody continues yet.
    left: Vec<PathBuf>,
}

/// What the cache holds, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Images.
    pub images: usize,
    /// The size of all images, and of what interrupted downloads left.
    pub used_bytes: u64,
    /// What downloads under way have reserved.
    pub reserved_bytes: u64,
    /// What the file system has free.
    pub free_bytes: u64,
    /// The limit, if there is one.
    pub max_bytes: Option<u64>,
}

impl Index {
    /// Opens a directory and finds what is in it.
    pub fn open(path: &Path, max_bytes: Option<u64>, ledger: Ledger, users: Users) -> Result<Self> {
        let directory = Directory::open(path)?;
        let place = Place::of(path)?;
        let found = directory.scan(&users)?;
        let mut state = State { left: found.left, ..State::default() };
        for (name, sidecar) in found.images {
            state.records.insert(name.clone(), Record::new(path, name, sidecar));
        }
        Ok(Self { directory, max_bytes, ledger, place, users, state: Mutex::new(state), publishing: Mutex::new(()) })
    }

    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image of this digest.
    pub fn by_digest(&self, digest: &Digest) -> Option<Entry> {
        self.latest(|sidecar| match digest.algorithm() {
            DigestAlgorithm::Sha256 => (sidecar.sha256 == *digest).then_some(sidecar.fetched_at),
            DigestAlgorithm::Sha512 => (sidecar.sha512.as_ref() == Some(digest)).then_some(sidecar.fetched_at),
        })
    }

    /// The image that this place had when it said of itself what it says now.
    pub fn by_source(&self, identity: &str, now: &SourceInfo) -> Option<Entry> {
        self.latest(|sidecar| sidecar.source(identity).filter(|seen| seen.is_same(now)).map(|seen| seen.seen_at))
    }

    /// The image that this place had last, whatever it has now.
    pub fn last_of_source(&self, identity: &str) -> Option<Entry> {
        self.latest(|sidecar| sidecar.source(identity).map(|seen| seen.seen_at))
    }

    /// The image for which `time` gives the latest.
    fn latest(&self, time: impl Fn(&Sidecar) -> Option<Timestamp>) -> Option<Entry> {
        let mut state = self.state();
        let mut found: Vec<_> =
            state.records.values().filter_map(|record| Some((time(&record.sidecar())?, record.clone()))).collect();
        found.sort_by_key(|(time, _)| *time);
        while let Some((_, record)) = found.pop() {
            if is_there(&record) {
                return Some(Entry { record });
            }
            self.forget(&mut state, &record);
        }
        None
    }

    /// Forgets an image whose file was removed or changed by someone else. The file, if there is one, is not lvp's from
    /// then on.
    fn forget(&self, state: &mut State, record: &Record) {
        tracing::warn!(image = record.name, "a cached image was removed or changed by someone else; forgetting it");
        state.records.remove(&record.name);
        if let Err(error) = self.directory.forget(&record.name) {
            tracing::warn!(image = record.name, error = %error.chain(), "what is remembered of it could not be removed");
        }
    }

    /// Forgets all such images.
    fn forget_lost(&self, state: &mut State) {
        let lost: Vec<_> = state.records.values().filter(|record| !is_there(record)).cloned().collect();
        for record in lost {
            self.forget(state, &record);
        }
    }

    /// The image of this name, or of the digest that begins so (`sha256:` may stand before it).
    ///
    /// # Errors
    /// `image_not_found`, also when several digests begin so.
    pub fn find(&self, text: &str) -> Result<Entry> {
        let mut state = self.state();
        self.forget_lost(&mut state);
        if let Some(record) = state.records.get(text) {
            return Ok(Entry { record: record.clone() });
        }
        let prefix = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
        let refused = |why: &str| {
            Error::new(ErrorCode::ImageNotFound, format!("{why} '{}'", text.escape_debug()))
                .hint("name an image of the cache's list, or 12 or more digits of its SHA-256")
        };
        if prefix.len() < SHORTEST_PREFIX {
            return Err(refused("no cached image has the name"));
        }
        let mut found = state.records.values().filter(|record| record.sidecar().sha256.hex().starts_with(&prefix));
        match (found.next(), found.next()) {
            (Some(record), None) => Ok(Entry { record: record.clone() }),
            (Some(_), Some(_)) => Err(refused("more than one cached image has a digest that begins with")),
            _ => Err(refused("no cached image has the name or digest")),
        }
    }

    /// All images, by name.
    pub fn list(&self) -> Vec<Image> {
        let mut state = self.state();
        self.forget_lost(&mut state);
        state.records.values().map(|record| record.view(in_use(record))).collect()
    }

    /// What the cache holds.
    pub fn usage(&self) -> Result<Usage> {
        let free_bytes = self.directory.free()?;
        let state = self.state();
        Ok(Usage {
            images: state.records.len(),
            used_bytes: state.used(),
            reserved_bytes: state.reserved(),
            free_bytes,
            max_bytes: self.max_bytes,
        })
    }

    /// Changes what is remembered about an image, on disk too; there only as long as it is in the cache.
    pub fn update(&self, entry: &Entry, change: impl FnOnce(&mut Sidecar)) -> Result<()> {
        let listed = self.state().records.get(entry.name()).is_some_and(|record| Arc::ptr_eq(record, &entry.record));
        if !listed {
            return Ok(());
        }
        let mut sidecar = entry.record.sidecar();
        change(&mut sidecar);
        self.directory.remember(entry.name(), &sidecar)
    }

    /// Removes an image that is neither pinned nor in use. One whose file somebody changed is forgotten: the file is his.
    ///
    /// # Errors
    /// Those of [`Index::refuse_delete`]; `file_in_the_way` for such an image.
    pub fn delete(&self, text: &str) -> Result<()> {
        let name = self.refuse_delete(text)?;
        let mut state = self.state();
        let Some(record) = state.records.get(&name) else { return Ok(()) };
        refuse_held(record)?;
        let removed = self.directory.remove(&name, &record.sidecar())?;
        let kept = (!removed).then(|| changed(record));
        state.records.remove(&name);
        kept.map_or(Ok(()), Err)
    }

    /// Refuses an image that may not be deleted now, and gives the name of one that may.
    ///
    /// # Errors
    /// `image_not_found`, `image_pinned`, `image_in_use` with who uses it; `libvirt_unavailable`.
    pub fn refuse_delete(&self, text: &str) -> Result<String> {
        let found = self.find(text)?.record;
        let (name, path) = (found.name.clone(), found.path.clone());
        drop(found);
        self.state().records.get(&name).map_or(Ok(()), refuse_held)?;
        let users = self.users.look()?(&path)?;
        if users.is_empty() {
            return Ok(name);
        }
        let message = format!("the cached image {name} is in use: {}", users.join("; "));
        Err(Error::new(ErrorCode::ImageInUse, message)
            .hint("what uses it would lose its disk: give it a copy, or remove it first")
            .detail("users", users))
    }

    /// The image that has the bytes of a complete download already; notes what the download knows of it.
    pub fn adopt(&self, sidecar: &Sidecar, seen: &SourceRecord) -> Result<Option<Entry>> {
        let Some(entry) = self.by_digest(&sidecar.sha256) else { return Ok(None) };
        self.update(&entry, |known| {
            known.verified |= sidecar.verified;
            known.sha512 = known.sha512.take().or_else(|| sidecar.sha512.clone());
            known.last_used_at = Timestamp::now();
            known.see(seen.clone());
        })?;
        Ok(Some(entry))
    }

    /// Makes an image of a complete download, or finds the one that has the same bytes already.
    pub fn publish(
        &self,
        partial: &Path,
        file_name: &str,
        sidecar: Sidecar,
        seen: SourceRecord,
        reservation: &Reservation,
    ) -> Result<Entry> {
        let _one_at_a_time = self.publishing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = self.adopt(&sidecar, &seen)? {
            return Ok(entry);
        }
        let mut sidecar = sidecar;
        sidecar.see(seen);
        let facts = partial.symlink_metadata().map_err(|error| Error::io("looking at", partial, error))?;
        sidecar.published = Some(Published::of(&facts));
        let name = self.directory.publish(partial, file_name, &sidecar)?;
        let record = Record::new(self.directory.path(), name.clone(), sidecar);
        let entry = Entry { record: record.clone() };
        let mut state = self.state();
        state.reservations.remove(&reservation.id);
        state.records.insert(name, record);
        Ok(entry)
    }

    /// Where the download of a key goes. What an earlier run left there is not removed any more to make room.
    pub fn partial(&self, key: &str) -> PathBuf {
        let path = self.directory.partial(key);
        self.state().left.retain(|left| *left != path);
        path
    }

    /// Removes what interrupted downloads left, where nobody came back for it in its time, and damaged images that nobody uses
    /// any more.
    ///
    /// # Errors
    /// Those of [`Directory::remove_damaged`].
    pub fn sweep(&self) -> Result<()> {
        self.state().left.retain(|left| {
            let is_kept = can_be_continued(left);
            if !is_kept {
                tracing::info!(file = %left.display(), "removing what an interrupted download left: nobody goes on with it");
                partial::discard(left);
            }
            is_kept
        });
        self.directory.remove_damaged(&self.users)
    }

    /// Reserves space for a download, of which so much is there already; says also how many images had to go.
    ///
    /// # Errors
    /// `cache_full` with the figures, and then no image was evicted; `libvirt_unavailable`, when an image would have to go and
    /// nobody knows which ones domains use.
    pub fn reserve(self: &Arc<Self>, bytes: u64, written: u64) -> Result<(Reservation, usize)> {
        let mut state = self.state();
        let id = state.next_reservation;
        state.next_reservation += 1;
        // So that what is there counts once.
        let promise = self.ledger.at(&self.place, |room| room.promise(written));
        promise.set_taken(written);
        state.reservations.insert(id, promise);
        drop(state);
        let reservation = Reservation { index: self.clone(), id };
        let evicted = reservation.ensure(bytes)?;
        Ok((reservation, evicted))
    }

    /// Refuses a download of so many bytes for which there would be no room. Nothing is reserved, and nobody goes.
    ///
    /// # Errors
    /// Those of [`Index::reserve`].
    pub fn refuse_full(&self, bytes: u64) -> Result<()> {
        let mut asked = Asked::default();
        loop {
            let mut state = self.state();
            let unknown = self.ledger.at(&self.place, |room| {
                // What interrupted downloads left goes first.
                let lack = self.lack_of_ours(&mut state, room, bytes)?.saturating_sub(state.left());
                let idle = self.evictable(&state, room, (bytes, lack), &asked)?;
                Ok::<_, Error>(unknown(&idle, lack, &asked))
            })?;
            drop(state);
            if unknown.is_empty() {
                return Ok(());
            }
            asked.ask(&self.users, unknown.into_iter().map(|image| (image.name, image.path)))?;
        }
    }

    /// The images that may go, which are enough to gain `lack` bytes for the `more` that are asked for.
    fn evictable(&self, state: &State, room: &mut Room, (more, lack): (u64, u64), asked: &Asked) -> Result<Vec<Idle>> {
        let mut idle = idle(state);
        idle.retain(|image| !asked.used.contains_key(&image.name));
        let evictable: u64 = idle.iter().map(|image| image.size).sum();
        if lack > evictable { Err(self.full(state, room, more, (evictable, asked))?) } else { Ok(idle) }
    }

    /// Evicts until `more` bytes fit the limit and the file system; first what interrupted downloads left. Gives the images
    /// of which it must be known first whether others use them: none when there is room.
    fn make_room(&self, state: &mut State, room: &mut Room, more: u64, asked: &mut Asked) -> Result<Vec<Idle>> {
        if more == 0 {
            return Ok(Vec::new());
        }
        while self.lack(state, room, more)? > 0
            && let Some(left) = state.left.pop()
        {
            tracing::info!(file = %left.display(), "removing what an interrupted download left, to make room");
            partial::discard(&left);
        }
        let mut lack = self.lack_of_ours(state, room, more)?;
        let idle = self.evictable(state, room, (more, lack), asked)?;
        let mut unknown = unknown(&idle, lack, asked);
        let mut oldest_first = idle.into_iter();
        while unknown.is_empty() && lack > 0 {
            match oldest_first.next() {
                Some(image) if asked.free.contains(&image.name) => {
                    asked.evicted += usize::from(self.evict(state, &image)?);
                    lack = self.lack(state, room, more)?;
                }
                Some(image) => unknown.push(image),
                None => return Err(self.full(state, room, more, (0, asked))?),
            }
        }
        Ok(unknown)
    }

    /// Removes an image; says whether that made room. One whose file somebody changed since is forgotten.
    fn evict(&self, state: &mut State, image: &Idle) -> Result<bool> {
        let Idle { last_used_at, size, name, .. } = image;
        let Some(record) = state.records.get(name) else { return Ok(false) };
        let removed = self.directory.remove(name, &record.sidecar())?;
        state.records.remove(name);
        if removed {
            tracing::info!(image = name, size, %last_used_at, "evicted a cached image to make room");
        }
        Ok(removed)
    }

    /// How many bytes are missing for `more`, once the images are forgotten that somebody changed: they are not lvp's to
    /// remove, and count no more.
    fn lack_of_ours(&self, state: &mut State, room: &mut Room, more: u64) -> Result<u64> {
        let lack = self.lack(state, room, more)?;
        if lack == 0 {
            return Ok(0);
        }
        let idle = state.records.values().filter(|record| !in_use(record) && !record.sidecar().pinned);
        let theirs: Vec<_> = idle.filter(|record| !is_ours(record)).cloned().collect();
        theirs.iter().for_each(|record| self.forget(state, record));
        drop(theirs);
        self.lack(state, room, more)
    }

    /// How many bytes are missing for `more`.
    fn lack(&self, state: &State, room: &mut Room, more: u64) -> Result<u64> {
        // Before what is free is asked: what is written in between counts twice.
        let taken = room.promised().saturating_add(room.kept()).saturating_add(more);
        let used = state.used() + state.reserved();
        let over_limit = self.max_bytes.map_or(0, |limit| used.saturating_add(more).saturating_sub(limit));
        Ok(over_limit.max(taken.saturating_sub(self.directory.free()?)))
    }

    fn full(&self, state: &State, room: &mut Room, more: u64, (evictable, asked): (u64, &Asked)) -> Result<Error> {
        let (promised, kept) = (room.promised(), room.kept());
        let free = self.directory.free()?;
        let reserved = state.reserved();
        let limit = self.max_bytes.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {}", ByteSize(limit)));
        let kept = if kept > 0 { format!(" and {} are kept free", ByteSize(kept)) } else { String::new() };
        let used: String = asked.used.iter().map(|(name, users)| format!("; {name} stays: {users}")).collect();
        let error = Error::new(
            ErrorCode::CacheFull,
            format!(
                "the image cache {} has no room for {}: {limit}, {} in images, {} reserved by other downloads, {} could \
                 be evicted, {} free on the file system, of which running jobs will still take {}{kept}{used}",
                self.directory.path().display(),
                ByteSize(more),
                ByteSize(state.used()),
                ByteSize(reserved),
                ByteSize(evictable),
                ByteSize(free),
                ByteSize(promised),
            ),
        )
        .detail("wanted_bytes", more)
        .detail("used_bytes", state.used())
        .detail("reserved_bytes", reserved)
        .detail("free_bytes", free)
        .detail("promised_bytes", promised)
        .hint("unpin or delete images, raise LVP_CACHE_MAX_BYTES, or move the cache to a larger file system");
        let never_fits = self.max_bytes.is_some_and(|limit| more > limit);
        Ok(if never_fits { error.retry(false) } else { error })
    }
}

impl State {
    /// What lies in the cache and is not being written.
    fn used(&self) -> u64 {
        let images: u64 = self.records.values().map(|record| record.sidecar().size).sum();
        images.saturating_add(self.left())
    }

    /// What interrupted downloads left.
    fn left(&self) -> u64 {
        self.left.iter().filter_map(|path| path.metadata().ok()).map(|facts| facts.len()).sum()
    }

    fn reserved(&self) -> u64 {
        self.reservations.values().map(Promise::bytes).sum()
    }
}

/// An image that no job uses and nobody pinned. The one that was not used for longest is the first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Idle {
    last_used_at: Timestamp,
    size: u64,
    name: String,
    path: PathBuf,
}

/// The images that may go, in the order in which they go, unless others use them.
fn idle(state: &State) -> Vec<Idle> {
    let candidates = state.records.values().filter(|record| !in_use(record));
    let mut idle: Vec<_> = candidates
        .filter_map(|record| {
            let sidecar = record.sidecar();
            let (last_used_at, size) = (sidecar.last_used_at, sidecar.size);
            let (name, path) = (record.name.clone(), record.path.clone());
            (!sidecar.pinned).then_some(Idle { last_used_at, size, name, path })
        })
        .collect();
    idle.sort();
    idle
}

/// Those of these images that would go for so many bytes and of which it is not known yet whether others use them.
fn unknown(idle: &[Idle], lack: u64, asked: &Asked) -> Vec<Idle> {
    let mut gained = 0;
    let needed = idle.iter().take_while(|image| {
        let is_needed = gained < lack;
        gained += image.size;
        is_needed
    });
    needed.filter(|image| !asked.free.contains(&image.name)).cloned().collect()
}

/// Refuses an image that is pinned, or that a job uses.
fn refuse_held(record: &Arc<Record>) -> Result<()> {
    let name = &record.name;
    if record.sidecar().pinned {
        let error = Error::new(ErrorCode::ImagePinned, format!("the cached image {name} is pinned"));
        return Err(error.hint("unpin it first"));
    }
    if in_use(record) {
        let error = Error::new(ErrorCode::ImageInUse, format!("a running job uses the cached image {name}"));
        return Err(error.hint("wait for the job to end, or cancel it"));
    }
    Ok(())
}

/// Whether an entry lives. Under the lock, "no" stays true.
fn in_use(record: &Arc<Record>) -> bool {
    Arc::strong_count(record) > 1
}

/// Whether the file still lies where the cache put it. One that cannot be looked at now is not lost.
fn is_there(record: &Record) -> bool {
    let size = record.sidecar().size;
    match record.path.symlink_metadata() {
        Ok(metadata) => metadata.is_file() && metadata.len() == size,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Whether the file still is the one that the cache put there, and nobody wrote to it. One that cannot be looked at now is.
fn is_ours(record: &Record) -> bool {
    match record.path.symlink_metadata() {
        Ok(facts) => !record.sidecar().is_changed(&facts),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// The error for an image whose file is not lvp's to remove.
fn changed(record: &Record) -> Error {
    let (name, path) = (&record.name, record.path.display());
    let message = format!(
        "the file of the cached image {name} is not removed: somebody wrote to it or put another one in its place, so that it \
         is not lvp's any more"
    );
    Error::new(ErrorCode::FileInTheWay, message).hint(format!("remove {path} yourself if nobody needs it"))
}

/// Space for one download, given back when dropped.
pub(super) struct Reservation {
    index: Arc<Index>,
    id: u64,
}

impl Reservation {
    /// Makes sure that `size` bytes are reserved in all. Says how many images had to go.
    pub fn ensure(&self, size: u64) -> Result<usize> {
        let mut asked = Asked::default();
        loop {
            let mut state = self.index.state();
            let unknown = self.index.ledger.at(&self.index.place, |room| {
                let reserved = state.reservations.get(&self.id).map_or(0, Promise::bytes);
                let more = size.saturating_sub(reserved);
                let unknown = self.index.make_room(&mut state, room, more, &mut asked)?;
                if unknown.is_empty() {
                    state.reservations.get(&self.id).into_iter().for_each(|promise| promise.raise(size));
                }
                Ok::<_, Error>(unknown)
            })?;
            drop(state);
            if unknown.is_empty() {
                return Ok(asked.evicted);
            }
            asked.ask(&self.index.users, unknown.into_iter().map(|image| (image.name, image.path)))?;
        }
    }

    /// Notes how much of it lies on the file system already.
    pub fn set_written(&self, bytes: u64) {
        if let Some(promise) = self.index.state().reservations.get(&self.id) {
            promise.set_taken(bytes);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.index.state().reservations.remove(&self.id);
    }
}
