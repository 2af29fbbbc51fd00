//! Compressed raw images: the disk's bytes, compressed with gzip, zstd or xz as a whole, which can only be decoded from
//! the first to the last.
//!
//! ```text
//! Bytes ─► Source ─► decoder ─► Disk::fill        in order, a bounded piece at a time, in bounded memory
//!          256 KiB              checks: what the disk's first and last bytes say, its size, that nothing follows
//! ```
//! How large the disk is, xz says at its end. The first frame of zstd says only how much it has itself, and gzip says it
//! modulo 2^32 of its last member: there decoding tells. It leaves out writing.

mod fault;
mod source;
mod xz;
mod zstd;

use std::io::Read;

use flate2::bufread::MultiGzDecoder;
use lvp_api::{ImageFormat, Stage};
use lzma_rust2::XzReader;

pub use self::fault::larger_than;
use self::{
    fault::{damaged, explain},
    source::Source,
};
use super::{bytes::Bytes, magic};
use crate::{error::Result, progress::Progress};

/// The gate decodes the disk's first bytes. It looks no further into the image for them than this, in bytes.
const GATE_BYTES: u64 = 1 << 20;
/// The piece that is decoded at once where nothing is written.
const MEASURED_PIECE: usize = 1 << 20;

/// How a raw disk is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// The xz file format 1.2.
    Xz,
}

impl Compression {
    /// Its name, as its users say.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
        }
    }

    /// The format of a raw disk that is compressed so.
    pub fn format(self) -> ImageFormat {
        match self {
            Self::Gzip => ImageFormat::RawGz,
            Self::Zstd => ImageFormat::RawZst,
            Self::Xz => ImageFormat::RawXz,
        }
    }
}

/// What the gate finds out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    compression: Compression,
    /// The size of the disk in bytes, where the image says it.
    pub size: Option<u64>,
    /// The size of the disk is at least this, in bytes.
    pub least_size: u64,
}

impl Header {
    /// Looks at the image's begin and, for xz, at its end: the size as far as it is told, and what the disk's first bytes
    /// say that it is.
    ///
    /// # Errors
    /// `image_type_mismatch` when the disk is an image of another format, `image_invalid`, `image_refused`; or what
    /// reading gives.
    pub fn read(bytes: &dyn Bytes, compression: Compression) -> Result<Self> {
        let at_end = |error| explain(error, bytes, compression, bytes.len());
        let size = if compression == Compression::Xz { xz::size(bytes).map_err(at_end)? } else { None };
        let least_size = match compression {
            Compression::Gzip => 0,
            Compression::Xz => size.unwrap_or(0),
            Compression::Zstd => zstd::least_size(&mut Source::new(bytes, GATE_BYTES)).map_err(at_end)?,
        };
        let header = Self { compression, size, least_size };
        let mut disk = Disk::over(Source::new(bytes, GATE_BYTES), bytes, Self { size: None, ..header })?;
        match disk.fill(&mut [0; magic::HEAD]) {
            // The image may put the disk's first bytes behind what the gate reads; the copy looks at them again.
            Err(error) if !disk.decoder.source().is_cut_off() => Err(error),
            _ => Ok(header),
        }
    }
}

/// The disk in a compressed image, read from its first byte to its last.
pub struct Disk<'a> {
    bytes: &'a dyn Bytes,
    header: Header,
    decoder: Decoder<'a>,
    /// How much was decoded.
    decoded: u64,
    ended: bool,
    /// The last sector, where the last piece had a whole one.
    tail: Option<[u8; magic::SECTOR]>,
}

impl<'a> Disk<'a> {
    /// The disk from its first byte on. `progress` is asked at every read whether to stop; what is read of the image is
    /// counted there if `counted`.
    ///
    /// # Errors
    /// `internal` when a decoder cannot be set up.
    pub fn open(bytes: &'a dyn Bytes, header: Header, progress: &'a Progress, counted: bool) -> Result<Self> {
        Self::over(Source::new(bytes, u64::MAX).with_progress(progress, counted), bytes, header)
    }

    fn over(source: Source<'a>, bytes: &'a dyn Bytes, header: Header) -> Result<Self> {
        let decoder = Decoder::new(source, header.compression)?;
        Ok(Self { bytes, header, decoder, decoded: 0, ended: false, tail: None })
    }

    /// Fills `into`, at first with at least [`magic::HEAD`] bytes, with what comes next of the disk. Fewer bytes than
    /// asked for are the last: then the whole image was found in order.
    ///
    /// # Errors
    /// `image_invalid` for damage, trailing bytes, a size that is not what the image says, a disk without bytes;
    /// `image_type_mismatch` when the disk is an image of another format; `image_refused` for memory over the bound; what
    /// reading and `progress` give.
    pub fn fill(&mut self, into: &mut [u8]) -> Result<usize> {
        let mut filled = 0;
        while filled < into.len() && !self.ended {
            match self.decoder.read(&mut into[filled..]) {
                Ok(0) => self.ended = true,
                Ok(count) => filled += count,
                Err(error) => return Err(self.failed(error)),
            }
        }
        self.check(&into[..filled])?;
        Ok(filled)
    }

    fn check(&mut self, piece: &[u8]) -> Result<()> {
        let declared = self.header.compression.format();
        if self.decoded == 0 {
            magic::check_disk_head(self.bytes, declared, piece)?;
        }
        self.decoded += piece.len() as u64;
        if !piece.is_empty() {
            self.tail = piece.last_chunk().copied();
        }
        let decoded = self.decoded;
        let wrong_size =
            self.header.size.filter(|told| decoded > *told || (self.ended && decoded < *told)).map(|told| {
                let more = if decoded > told { "at least " } else { "" };
                format!("its index promises a disk of {told} bytes, and it has {more}{decoded}")
            });
        let empty = (self.ended && decoded == 0).then(|| "the disk in it has no bytes".to_owned());
        if let Some(what) = wrong_size.or(empty) {
            return Err(damaged(self.bytes, what, self.decoder.source().position()));
        }
        match &self.tail {
            Some(tail) if self.ended => magic::check_disk_tail(self.bytes, declared, tail),
            _ => Ok(()),
        }
    }

    fn failed(&self, error: std::io::Error) -> crate::error::Error {
        let compression = self.header.compression;
        let error = if compression == Compression::Xz && error.kind() == std::io::ErrorKind::OutOfMemory {
            xz::over_limit(self.bytes).into()
        } else {
            error
        };
        explain(error, self.bytes, compression, self.decoder.source().position())
    }
}

/// How large the disk is, found by decoding all of it: so the image is known to be in order to its last byte, too.
/// Enters the stage `verifying`, whose total is the size of the image.
///
/// # Errors
/// `image_too_large` as soon as the disk is seen to have more than `limit` bytes; as [`Disk::fill`].
pub fn measure(bytes: &dyn Bytes, header: Header, limit: u64, progress: &Progress) -> Result<u64> {
    progress.enter(Stage::Verifying, bytes.len());
    let mut disk = Disk::open(bytes, header, progress, true)?;
    let mut piece = vec![0; MEASURED_PIECE];
    loop {
        progress.check()?;
        let filled = disk.fill(&mut piece)?;
        if disk.decoded > limit {
            return Err(larger_than(limit));
        }
        if filled < piece.len() {
            return Ok(disk.decoded);
        }
    }
}

/// The decoders, as one reader.
enum Decoder<'a> {
    Gzip(Box<MultiGzDecoder<Source<'a>>>),
    Zstd(Box<zstd::Decoder<'a>>),
    Xz(Box<XzReader<Source<'a>>>),
}

impl<'a> Decoder<'a> {
    fn new(source: Source<'a>, compression: Compression) -> Result<Self> {
        Ok(match compression {
            Compression::Gzip => Self::Gzip(Box::new(MultiGzDecoder::new(source))),
            Compression::Zstd => Self::Zstd(Box::new(zstd::Decoder::new(source)?)),
            Compression::Xz => Self::Xz(Box::new(xz::decoder(source))),
        })
    }

    fn source(&self) -> &Source<'a> {
        match self {
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Zstd(decoder) => decoder.source(),
            Self::Xz(decoder) => decoder.inner(),
        }
    }

    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Gzip(decoder) => decoder.read(into),
            Self::Zstd(decoder) => decoder.read(into),
            Self::Xz(decoder) => decoder.read(into),
        }
    }
}
