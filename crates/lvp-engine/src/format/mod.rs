//! Disk images: the gate that refuses what is not safe to write, the map of what an image holds, and the parallel copy
//! of it to a target.
//!
//! An image is hostile until shown otherwise: its type is declared, never guessed; it may name no other file; every
//! number in it is bounded before it is used; and no memory depends on its size.
//!
//! ```text
//! Bytes           where the stored bytes come from: a file here, a remote object elsewhere
//! inspect         the cheap gate: header and first table, few reads, for before a byte is fetched or reserved
//! Image::open     the whole gate: every table
//! Image::unproven behind the cheap gate only: to write a new volume while the image still comes
//! populate        image → target, in parallel; after it every byte of the target is image or zero
//! measure         how large the disk is, where only decoding all of it tells
//! ```
//! An image is read by its extents, in any order; but a compressed raw image only as a stream, from its begin to its end.
//!
//! It leaves out fetching, digests and making volumes.

mod bytes;
mod container;
mod content;
mod error;
mod magic;
mod overlay;
mod populate;
mod qcow2;
mod raw;
mod stream;
#[cfg(test)]
mod tests;
mod verify;

use std::{iter, path::Path, sync::Arc, thread};

use lvp_api::{ErrorCode, ImageFormat};

pub use bytes::{Bytes, FileBytes, GrowingBytes};
pub use container::{begin_qcow2, end_qcow2, qcow2_data_offset};
pub use overlay::OverlayBytes;
pub use populate::{Counts, PopulateOptions, Populated, populate};
pub use qcow2::Decoder;
use stream::{Compression, Disk};
pub use verify::{content_digest, first_difference};

use crate::{
    error::{Error, Result},
    host::confine::confine_decoder,
    progress::Progress,
};

/// The largest virtual size that is accepted, in bytes: 1 PiB, more than any volume that a host can make.
pub const VIRTUAL_SIZE_LIMIT: u64 = 1 << 50;

/// What an image's header says, found to be possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The size of the disk in the image, in bytes; not always a multiple of 512. None where only decoding all of a
    /// compressed image tells: see [`measure`].
    pub virtual_size: Option<u64>,
    /// The size of the disk is at least this, in bytes; where [`virtual_size`](Self::virtual_size) is known it is that.
    pub least_size: u64,
    /// The size of the image itself, in bytes.
    pub stored_size: u64,
    layout: Layout,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Layout {
    Raw,
    Qcow2(qcow2::Header),
    Stream(stream::Header),
}

/// A run of the guest's bytes that are stored in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins on the disk, in bytes.
    pub guest: u64,
    /// How long it is, in bytes.
    pub length: u64,
    /// How it is stored.
    pub content: Content,
}

/// How the bytes of an extent are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Not at all: they are zero.
    Zero,
    /// As they are, at this offset of the image; what lies past the image's end is zero.
    Plain {
        /// Offset in the image, in bytes.
        stored: u64,
    },
    /// One compressed cluster.
    Compressed {
        /// Offset in the image, in bytes.
        stored: u64,
        /// How many bytes at most, rounded up to sectors, so that they may pass the image's end.
        stored_length: u64,
    },
}

impl Header {
    /// About how many bytes the whole gate reads: of the image's tables, or of nothing.
    pub fn table_bytes(&self) -> u64 {
        match &self.layout {
            Layout::Raw | Layout::Stream(_) => 0,
            Layout::Qcow2(header) => header.l1_used().saturating_mul(header.cluster_size()),
        }
    }

    /// Whether it is a compressed raw image: how much data its disk has shows only when it is decoded.
    pub fn is_stream(&self) -> bool {
        matches!(self.layout, Layout::Stream(_))
    }
}

/// The cheap gate: checks the header, its extensions and the first level of tables, by a few small reads.
///
/// # Errors
/// `image_type_mismatch`, `image_invalid` or `image_refused`, with what is wrong; or what reading gives.
pub fn inspect(bytes: &dyn Bytes, declared: ImageFormat) -> Result<Header> {
    magic::check(bytes, declared)?;
    let layout = match declared {
        ImageFormat::Raw => Layout::Raw,
        ImageFormat::Qcow2 => Layout::Qcow2(qcow2::Header::read(bytes)?),
        ImageFormat::RawGz => Layout::Stream(stream::Header::read(bytes, Compression::Gzip)?),
        ImageFormat::RawZst => Layout::Stream(stream::Header::read(bytes, Compression::Zstd)?),
        ImageFormat::RawXz => Layout::Stream(stream::Header::read(bytes, Compression::Xz)?),
    };
    let (virtual_size, least_size) = match &layout {
        Layout::Raw => (Some(bytes.len()), bytes.len()),
        Layout::Qcow2(header) => (Some(header.virtual_size), header.virtual_size),
        Layout::Stream(header) => (header.size, header.least_size),
    };
    if least_size > VIRTUAL_SIZE_LIMIT {
        return Err(Error::new(
            ErrorCode::ImageRefused,
            format!(
                "{} has a virtual size of {least_size} bytes; at most {VIRTUAL_SIZE_LIMIT} are accepted",
                bytes.name()
            ),
        )
        .hint("check that the image is what it is meant to be; no volume can hold such a disk"));
    }
    if let Layout::Qcow2(header) = &layout {
        qcow2::check_first_level(bytes, header)?;
    }
    Ok(Header { virtual_size, least_size, stored_size: bytes.len(), layout })
}

/// How large the disk in the image is, in bytes: known, or found by decoding all of it, which takes its time and finds
/// every damage. Decoding enters the stage `verifying`.
///
/// # Errors
/// `image_too_large` when it has more than `limit` bytes and that was not known; else what [`populate`] gives for the
/// image, and the stop of the job.
pub fn measure(image: &Image, limit: u64, progress: &Progress) -> Result<u64> {
    match (&image.header.layout, image.header.virtual_size) {
        // A thread of its own, because it is confined for good.
        (Layout::Stream(header), None) => thread::scope(|scope| {
            let measuring = scope.spawn(|| {
                confine_decoder(&[]);
                stream::measure(&*image.bytes, *header, limit, progress)
            });
            measuring.join().unwrap_or_else(|_| Err(Error::internal("the thread that measured the image panicked")))
        }),
        (_, size) => size.ok_or_else(|| Error::internal("an image that is no stream has a size")),
    }
}

/// An image that can be read. Only one that passed the whole gate may be written to a volume that was there before, or
/// kept in the cache.
pub struct Image {
    bytes: Arc<dyn Bytes>,
    header: Header,
    data_bytes: u64,
}

impl Image {
    /// The whole gate: [`inspect`], then every table, in constant memory.
    ///
    /// # Errors
    /// As [`inspect`].
    pub fn open(bytes: Arc<dyn Bytes>, declared: ImageFormat) -> Result<Self> {
        let header = inspect(&*bytes, declared)?;
        let data_bytes = match &header.layout {
            Layout::Raw => {
                magic::check_end(&*bytes, declared)?;
                raw::data_bytes(&*bytes)?
            }
            Layout::Qcow2(header) => qcow2::check(&*bytes, header)?,
            Layout::Stream(_) => header.stored_size,
        };
        Ok(Self { bytes, header, data_bytes })
    }

    /// An image behind the cheap gate only: `header` is what [`inspect`] said of it. Each entry of its tables is checked
    /// when it is read, so that reading it is safe; the tables are not held against one another. `data_bytes`, where it
    /// is known, is for showing progress.
    pub fn unproven(bytes: Arc<dyn Bytes>, header: Header, data_bytes: Option<u64>) -> Self {
        let data_bytes = data_bytes.unwrap_or_else(|| header.virtual_size.unwrap_or(header.stored_size));
        Self { bytes, header, data_bytes }
    }

    /// What its header says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// [`open`](Self::open) for a local file.
    ///
    /// # Errors
    /// As [`open`](Self::open), and `input_output`.
    pub fn open_file(path: &Path, declared: ImageFormat) -> Result<Self> {
        Self::open(Arc::new(FileBytes::open(path)?), declared)
    }

    /// The size of the disk, in bytes, where it is known: see [`Header::virtual_size`].
    pub fn virtual_size(&self) -> Option<u64> {
        self.header.virtual_size
    }

    /// The size of the disk is at least this, in bytes: see [`Header::least_size`].
    pub fn least_size(&self) -> u64 {
        self.header.least_size
    }

    /// The disk as a stream, where it is one and can be read in no other way. Reads ask `progress` whether to stop, and
    /// count on it what they read of the image if `counted`.
    fn stream<'a>(&'a self, progress: &'a Progress, counted: bool) -> Result<Option<Disk<'a>>> {
        let Layout::Stream(header) = &self.header.layout else { return Ok(None) };
        Disk::open(&*self.bytes, *header, progress, counted).map(Some)
    }

    /// How many of the guest's bytes are stored; all others are zero. Of a compressed image, whose zeros are not known,
    /// the size that it is stored in: so much data is in it at least, or nearly.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// The extents in guest order, without gaps, up to the virtual size. Tables are read as the iterator goes. A stream
    /// has none: an error.
    pub fn extents(&self) -> Box<dyn Iterator<Item = Result<Extent>> + Send + '_> {
        match &self.header.layout {
            Layout::Raw => Box::new(raw::Extents::new(&*self.bytes)),
            Layout::Qcow2(header) => Box::new(qcow2::Extents::new(&*self.bytes, header)),
            Layout::Stream(_) => Box::new(iter::once(Err(Error::internal("a compressed raw image has no extents")))),
        }
    }

    /// Extents that are compressed begin on multiples of this many bytes of the disk and are decoded as so many.
    pub fn cluster_size(&self) -> u64 {
        match &self.header.layout {
            Layout::Raw | Layout::Stream(_) => 512,
            Layout::Qcow2(header) => header.cluster_size(),
        }
    }

    /// Reads an extent, or a part of one that is not compressed, to the begin of `into`. A compressed extent needs room
    /// for a whole cluster there; what lies behind its length is then undefined.
    ///
    /// # Errors
    /// `image_invalid` when it cannot be decoded, or what reading gives.
    pub fn read(&self, extent: &Extent, decoder: &mut Decoder, into: &mut [u8]) -> Result<()> {
        match (extent.content, &self.header.layout) {
            (Content::Plain { stored }, _) => self.read_plain(stored, &mut into[..extent.length as usize]),
            (Content::Compressed { .. }, Layout::Qcow2(header)) => {
                let cluster = &mut into[..header.cluster_size() as usize];
                decoder.decode(&*self.bytes, header, extent, cluster)
            }
            (Content::Zero | Content::Compressed { .. }, _) => {
                into[..extent.length as usize].fill(0);
                Ok(())
            }
        }
    }

    fn read_plain(&self, stored: u64, into: &mut [u8]) -> Result<()> {
        let there = self.header.stored_size.saturating_sub(stored).min(into.len() as u64) as usize;
        let (data, past_end) = into.split_at_mut(there);
        past_end.fill(0);
        if data.is_empty() { Ok(()) } else { self.bytes.read_exact_at(data, stored) }
    }
}
