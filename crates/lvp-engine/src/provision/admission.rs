//! Whether there is room for what a job will write, and the promise that it stays: before a byte moves, a job is promised
//! its space, and what running jobs will still take is not promised again (`space`).
//!
//! | volume | takes |
//! |---|---|
//! | new, thick | its size, at once: the promise ends when it is there |
//! | new, where new space reads zero | the image's data; where nobody can tell how much that is, all that is left, and no more |
//! | new, in a pool that does not zero | its size |
//! | there before, thick | nothing |
//! | there before, a file | the image's data, but no more than it has not got yet |
//! | there before, thin | what it has not got yet, since zeros are written there; and what it shares with its base |
//! | a copy of a base | nothing now |
//!
//! It leaves out the image cache, which asks the same ledger for its downloads.

use lvp_api::{ByteSize, DiskFormat, ErrorCode, ZeroPolicy};

use super::{
    order::VolumeOrder,
    plan::Examined,
    services::{Keeping, Services},
};
use crate::{
    error::{Error, Result},
    format,
    space::{Place, Promise, Room, Spender},
    volume::{Capabilities, MetadataSpace, PoolSpace, Space, Volume, VolumeBackend},
};

/// What a thin pool notes of each of its chunks, in bytes (the kernel's admin-guide/device-mapper/thin-provisioning).
const METADATA_PER_CHUNK: u64 = 48;
/// One part in so many of a pool's metadata is kept free.
const METADATA_KEPT: u64 = 20;

/// What a volume will take of its place, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// So many.
    Known(u64),
    /// Nobody knows; no more than this.
    AtMost(u64),
}

/// The space that one job was promised.
#[derive(Debug)]
pub struct Admission {
    data: Promise,
    /// Whether the volume has all its space from the moment when it is made.
    at_once: bool,
    /// Held only.
    _metadata: Option<Promise>,
}

impl Admission {
    /// What tells that the space is taken.
    pub fn spender(&self) -> Spender {
        self.data.spender()
    }

    /// The volume is made.
    pub fn made(&self) {
        if self.at_once {
            self.data.set_taken(self.data.bytes());
        }
    }
}

/// What an image has in data, where that is known, else the most that it can have.
fn data_of(examined: Option<&Examined>, size: u64) -> Need {
    let Some(examined) = examined else { return Need::AtMost(size) };
    match examined.data_bytes {
        Some(data) if !examined.header.is_stream() => Need::Known(data),
        _ => Need::AtMost(examined.header.virtual_size.unwrap_or(size).min(size)),
    }
}

/// What a new volume takes.
pub fn need_of_new(
    wanted: &VolumeOrder,
    examined: Option<&Examined>,
    capabilities: &Capabilities,
    space: &Space,
) -> Need {
    let size = wanted.size.checked_next_multiple_of(capabilities.granularity).unwrap_or(u64::MAX);
    if capabilities.allocates_whole_size {
        return Need::Known(size);
    }
    if let Some(pool) = space.pool.filter(|pool| !pool.zeroes) {
        return Need::Known(in_chunks(written_to_end(wanted, examined, size), &pool));
    }
    let tables = if wanted.format == DiskFormat::Qcow2 { format::qcow2_data_offset(size) } else { 0 };
    match (data_of(examined, size), space.pool) {
        (Need::Known(data), Some(pool)) => Need::Known(in_chunks(data, &pool)),
        (Need::Known(data), None) => Need::Known(data.saturating_add(tables)),
        (Need::AtMost(most), _) => Need::AtMost(most.saturating_add(tables)),
    }
}

/// What a volume that was there before takes when it is overwritten.
pub fn need_of_existing(
    backend: &dyn VolumeBackend,
    volume: &Volume,
    wanted: &VolumeOrder,
    examined: Option<&Examined>,
    space: &Space,
) -> Result<Need> {
    // What is shared with a base is not its own: to write there takes new space.
    let base = match (&volume.tags.image, backend.bases()?) {
        (Some(digest), Some(bases)) => bases.find(digest)?,
        _ => None,
    };
    let shared = base.map_or(0, |base| base.used_bytes.unwrap_or(base.size));
    let own = volume.allocated.unwrap_or(0).saturating_sub(shared);
    let missing = volume.size.saturating_sub(own);
    Ok(Need::Known(match (space.pool, data_of(examined, volume.size)) {
        (Some(pool), _) => in_chunks(written_to_end(wanted, examined, volume.size).min(missing), &pool),
        (None, Need::Known(bytes) | Need::AtMost(bytes)) => bytes.min(missing),
    }))
}

/// How much is written where zeros are written too.
fn written_to_end(wanted: &VolumeOrder, examined: Option<&Examined>, size: u64) -> u64 {
    match (wanted.zero, examined.and_then(|examined| examined.header.virtual_size)) {
        (ZeroPolicy::Image, Some(disk)) => disk.min(size),
        _ => size,
    }
}

fn in_chunks(bytes: u64, pool: &PoolSpace) -> u64 {
    bytes.checked_next_multiple_of(pool.chunk.max(1)).unwrap_or(u64::MAX)
}

/// Refuses a volume that is larger than any can be in this place.
pub fn refuse_larger(backend: &dyn VolumeBackend, wanted: &VolumeOrder, largest: u64) -> Result<()> {
    if wanted.size <= largest {
        return Ok(());
    }
    let (size, most) = (ByteSize(wanted.size), ByteSize(largest));
    Err(Error::new(
        ErrorCode::InsufficientSpace,
        format!("volume {} of {size} is larger than all of {}, which has {most}", wanted.name, backend.label()),
    )
    .hint("ask for a smaller volume, or use another target")
    .detail("asked_bytes", wanted.size)
    .detail("largest_bytes", largest)
    .retry(false))
}

/// Promises a new volume its space, or refuses it. Blocks.
///
/// # Errors
/// `insufficient_space`; what the backend says.
pub fn admit_new(
    services: &Services,
    backend: &dyn VolumeBackend,
    wanted: &VolumeOrder,
    examined: Option<&Examined>,
) -> Result<Admission> {
    let capabilities = backend.capabilities()?;
    refuse_larger(backend, wanted, capabilities.largest)?;
    admit(services, backend, &capabilities, wanted, |space| Ok(need_of_new(wanted, examined, &capabilities, space)))
}

/// Promises a volume that was there before the space that it takes when it is overwritten, or refuses that. Blocks.
///
/// # Errors
/// As [`admit_new`].
pub fn admit_existing(
    services: &Services,
    backend: &dyn VolumeBackend,
    volume: &Volume,
    wanted: &VolumeOrder,
    examined: Option<&Examined>,
) -> Result<Option<Admission>> {
    let capabilities = backend.capabilities()?;
    if capabilities.allocates_whole_size {
        return Ok(None);
    }
    admit(services, backend, &capabilities, wanted, |space| need_of_existing(backend, volume, wanted, examined, space))
        .map(Some)
}

/// Refuses what there is no room for even if it takes nothing: a pool that is as full as it may be. Promises nothing.
///
/// # Errors
/// As [`admit_new`].
pub fn refuse_full(services: &Services, backend: &dyn VolumeBackend, wanted: &VolumeOrder) -> Result<()> {
    let capabilities = backend.capabilities()?;
    refuse_larger(backend, wanted, capabilities.largest)?;
    let whole = capabilities.allocates_whole_size;
    let need = |space: &Space| Ok(if whole { need_of_new(wanted, None, &capabilities, space) } else { Need::Known(0) });
    admit(services, backend, &capabilities, wanted, need).map(drop)
}

fn admit(
    services: &Services,
    backend: &dyn VolumeBackend,
    capabilities: &Capabilities,
    wanted: &VolumeOrder,
    need: impl FnOnce(&Space) -> Result<Need>,
) -> Result<Admission> {
    let (label, at_once) = (backend.label(), capabilities.allocates_whole_size);
    services.ledger.at(&capabilities.place, |room| {
        let promised = room.promised();
        // What is free is asked after what was promised: what is written in between counts twice.
        let space = backend.space()?;
        let asked = Asked { wanted, label: &label, what: "" };
        let kept = room.kept().saturating_add(kept_in(&space, &services.keeping));
        let data = asked.promise(room, need(&space)?, Stock { free: space.free, promised, kept })?;
        let metadata = match space.pool.and_then(|pool| Some((pool, pool.metadata?))) {
            Some((pool, metadata)) => Some(admit_metadata(services, &asked, data.bytes(), &pool, metadata)?),
            None => None,
        };
        Ok(Admission { data, at_once, _metadata: metadata })
    })
}

/// What is kept free of a thin pool's data: the volumes that are in it grow too.
fn kept_in(space: &Space, keeping: &Keeping) -> u64 {
    if space.pool.is_none() {
        return 0;
    }
    u64::try_from(u128::from(space.total) * u128::from(keeping.thin_floor) / 100).unwrap_or(u64::MAX)
}

/// Refuses a volume whose blocks the thin pool could not note: a pool that is out of metadata fails for all its volumes.
fn admit_metadata(
    services: &Services,
    asked: &Asked<'_>,
    data: u64,
    pool: &PoolSpace,
    metadata: MetadataSpace,
) -> Result<Promise> {
    let needed = data.div_ceil(pool.chunk.max(1)).saturating_mul(METADATA_PER_CHUNK);
    services.ledger.at(&Place::Named(format!("{} metadata", asked.label)), |room| {
        let stock = Stock { free: metadata.free, promised: room.promised(), kept: metadata.total / METADATA_KEPT };
        Asked { what: " of metadata", ..*asked }.promise(room, Need::Known(needed), stock)
    })
}

/// What there is, in bytes.
#[derive(Clone, Copy)]
struct Stock {
    free: u64,
    /// What running jobs will still take of it.
    promised: u64,
    /// What is kept free.
    kept: u64,
}

/// For whom space is asked for.
#[derive(Clone, Copy)]
struct Asked<'a> {
    wanted: &'a VolumeOrder,
    label: &'a str,
    what: &'a str,
}

impl Asked<'_> {
    fn promise(&self, room: &mut Room, need: Need, stock: Stock) -> Result<Promise> {
        let unpromised = stock.free.checked_sub(stock.promised.saturating_add(stock.kept));
        match (need, unpromised) {
            (Need::Known(needed), Some(left)) if needed <= left => Ok(room.promise(needed)),
            (Need::AtMost(most), Some(left)) => Ok(room.promise_at_most(most.min(left))),
            (Need::Known(needed), _) => Err(self.refusal(needed, stock)),
            (Need::AtMost(_), None) => Err(self.refusal(0, stock)),
        }
    }

    fn refusal(&self, needed: u64, stock: Stock) -> Error {
        let Stock { free, promised, kept } = stock;
        let mut said = format!(
            "volume {} needs {}{} in {}, where {} are free",
            self.wanted.name,
            ByteSize(needed),
            self.what,
            self.label,
            ByteSize(free)
        );
        if promised > 0 {
            said.push_str(&format!(", of which running jobs will still take {}", ByteSize(promised)));
        }
        if kept > 0 {
            said.push_str(&format!(", and {} are kept free", ByteSize(kept)));
        }
        let error = Error::new(ErrorCode::InsufficientSpace, said)
            .detail("needed_bytes", needed)
            .detail("free_bytes", free)
            .detail("promised_bytes", promised)
            .detail("kept_bytes", kept);
        if needed.saturating_add(kept) <= free {
            return error.hint("try again when the running jobs have ended");
        }
        if self.what.is_empty() {
            return error.hint("remove volumes, extend the volume group or pool, or ask for a smaller volume");
        }
        error.hint("extend the pool's metadata with `lvextend --poolmetadatasize +1G`, or remove volumes and bases")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{provision::plan::tests::wanted, space::Ledger, volume::Tags};

    const MIB: u64 = 1 << 20;

    fn space(pool: Option<PoolSpace>) -> Space {
        Space { total: 100 * MIB, free: 50 * MIB, pool }
    }

    fn pool(zeroes: bool) -> PoolSpace {
        PoolSpace { zeroes, chunk: 64 << 10, metadata: None }
    }

    fn capabilities(whole: bool) -> Capabilities {
        let place = Place::Named("here".to_owned());
        Capabilities { place, allocates_whole_size: whole, granularity: 4 * MIB, largest: u64::MAX, is_block: true }
    }

    /// What is known of a raw image of 8 MiB.
    fn image(data_bytes: Option<u64>) -> Examined {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 * MIB).unwrap();
        let image = format::Image::open_file(file.path(), lvp_api::ImageFormat::Raw).unwrap();
        Examined { header: image.header().clone(), data_bytes }
    }

    #[test]
    fn a_new_volume_takes_what_will_be_written() {
        let order = wanted(10 * MIB);
        let need =
            |image: Option<&Examined>, whole, pool| need_of_new(&order, image, &capabilities(whole), &space(pool));
        let (known, unknown) = (image(Some(MIB + 1)), image(None));
        assert_eq!(need(Some(&known), true, None), Need::Known(12 * MIB));
        assert_eq!(need(Some(&known), false, None), Need::Known(MIB + 1));
        assert_eq!(need(Some(&known), false, Some(pool(true))), Need::Known(MIB + (64 << 10)));
        assert_eq!(need(Some(&known), false, Some(pool(false))), Need::Known(12 * MIB));
        assert_eq!(need(Some(&unknown), false, None), Need::AtMost(8 * MIB));
        assert_eq!(need(None, false, Some(pool(true))), Need::AtMost(12 * MIB));
    }

    #[test]
    fn a_volume_that_was_there_takes_what_it_has_not_got() {
        let directory = tempfile::tempdir().unwrap();
        let backend = crate::volume::Directory::new(directory.path().to_owned(), DiskFormat::Raw);
        let need = |allocated, pool| {
            let volume = Volume {
                name: "web-1".parse().unwrap(),
                path: "/dev/vg0/web-1".into(),
                size: 10 * MIB,
                allocated,
                tags: Tags::default(),
                open: false,
                pool: None,
                unsuitable: None,
                link: None,
            };
            need_of_existing(&backend, &volume, &wanted(10 * MIB), Some(&image(Some(4 * MIB))), &space(pool)).unwrap()
        };
        assert_eq!(need(Some(0), None), Need::Known(4 * MIB));
        assert_eq!(need(Some(9 * MIB), None), Need::Known(MIB));
        assert_eq!(need(Some(11 * MIB), None), Need::Known(0));
        assert_eq!(need(Some(9 * MIB), Some(pool(true))), Need::Known(MIB));
        assert_eq!(need(None, Some(pool(true))), Need::Known(10 * MIB));
    }

    #[test]
    fn a_refusal_says_what_is_free_what_is_promised_and_what_is_needed() {
        let ledger = Ledger::default();
        let order = wanted(10 * MIB);
        let asked = Asked { wanted: &order, label: "lvm:vg0/pool0", what: "" };
        let place = Place::Named("lvm:vg0/pool0".to_owned());
        let ask = |need, free, kept| {
            ledger.at(&place, |room| {
                let promised = room.promised();
                asked.promise(room, need, Stock { free, promised, kept })
            })
        };
        let first = ask(Need::Known(30 * MIB), 50 * MIB, 5 * MIB).unwrap();
        let error = ask(Need::Known(20 * MIB), 50 * MIB, 5 * MIB).unwrap_err();
        assert_eq!(
            error.to_string(),
            "volume web-1 needs 20 MiB in lvm:vg0/pool0, where 50 MiB are free, of which running jobs will still take \
             30 MiB, and 5 MiB are kept free"
        );
        assert!(error.retryable());
        assert_eq!(error.to_body().details["promised_bytes"], 30 * MIB);
        assert_eq!(error.to_body().hint.unwrap(), "try again when the running jobs have ended");
        let unknown = ask(Need::AtMost(80 * MIB), 50 * MIB, 5 * MIB).unwrap();
        assert_eq!(unknown.bytes(), 15 * MIB);
        assert_eq!(ask(Need::Known(1), 50 * MIB, 5 * MIB).unwrap_err().code(), ErrorCode::InsufficientSpace);
        drop((first, unknown));
        assert!(ask(Need::Known(46 * MIB), 50 * MIB, 5 * MIB).is_err());
        assert!(ask(Need::Known(45 * MIB), 50 * MIB, 5 * MIB).is_ok());
    }
}
