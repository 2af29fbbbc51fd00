//! Decoding xz: all blocks of all streams, with the padding between them, each block against its check.
//!
//! The index at the end of a stream tells how much it decodes to, so that the size of the disk is known before any of it
//! is. A block names the memory that its decoder needs, its dictionary.

use std::io::{self, Read, Seek, SeekFrom};

use lzma_rust2::{Action, XzReader, XzStream, lzma2_get_memory_usage, xz_uncompressed_size};

use super::{super::bytes::Bytes, fault::Fault, source::Source};

/// The largest dictionary, in bytes: what `xz -7` asks for. `xz -8` and `-9` ask for two and four times as much, which
/// the 64 MiB of the whole process do not have.
const DICTIONARY_LIMIT: u32 = 16 << 20;
/// The longest header of a block, behind that of the stream (xz file format, sections 2.1.1 and 3.1).
const LONGEST_HEADER: usize = 12 + 1024;
/// To find the size, at most this much is read, in bytes and in reads: the index of a disk of 1 TiB fits, and so do some
/// dozens of streams.
const INDEX_BYTES: u64 = 4 << 20;
const INDEX_READS: u32 = 1 << 9;

/// A decoder.
pub fn decoder(source: Source<'_>) -> XzReader<Source<'_>> {
    XzReader::new_mem_limit(source, true, lzma2_get_memory_usage(DICTIONARY_LIMIT))
}

/// What to say when a block asks for a larger dictionary.
pub fn over_limit(bytes: &dyn Bytes) -> Fault {
    // It is the first block, unless someone made it otherwise on purpose.
    let mut head = vec![0; LONGEST_HEADER.min(bytes.len() as usize)];
    let mut first = XzStream::new_mem_limit(true, lzma2_get_memory_usage(DICTIONARY_LIMIT));
    let asked = bytes.read_exact_at(&mut head, 0).ok().and_then(|()| {
        // An error is what is expected here.
        let _ = first.process(&head, &mut [0], Action::Run);
        first.memory_usage().map(|kib| u64::from(kib) << 10).filter(|asked| *asked > u64::from(DICTIONARY_LIMIT))
    });
    Fault::Memory { asked, allowed: DICTIONARY_LIMIT.into() }
}

/// How many bytes all streams decode to, as their indexes say. None where these are larger than one would look through
/// for that.
pub fn size(bytes: &dyn Bytes) -> io::Result<Option<u64>> {
    let mut ends = Ends { bytes, at: 0, reads_left: INDEX_READS, bytes_left: INDEX_BYTES };
    match xz_uncompressed_size(&mut ends) {
        Ok(size) => Ok(Some(size)),
        Err(_) if ends.reads_left == 0 || ends.bytes_left == 0 => Ok(None),
        Err(error) => Err(error),
    }
}

/// The image, to be read here and there, but not much.
struct Ends<'a> {
    bytes: &'a dyn Bytes,
    at: u64,
    reads_left: u32,
    bytes_left: u64,
}

impl Read for Ends<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = (into.len() as u64).min(self.bytes.len().saturating_sub(self.at));
        if self.reads_left == 0 || self.bytes_left < count {
            self.bytes_left = 0;
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        self.reads_left -= 1;
        self.bytes_left -= count;
        self.bytes.read_exact_at(&mut into[..count as usize], self.at).map_err(io::Error::other)?;
        self.at += count;
        Ok(count as usize)
    }
}

impl Seek for Ends<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(distance) => self.bytes.len().checked_add_signed(distance),
            SeekFrom::Current(distance) => self.at.checked_add_signed(distance),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
