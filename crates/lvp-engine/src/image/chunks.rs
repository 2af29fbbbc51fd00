//! Digests of an image's chunks, taken when it came and checked whenever it is read again: BLAKE3, several times as fast
//! as SHA-256, so that a hit is verified while it is read and needs no pass of its own.
//!
//! They guard against a cache that changed, not against a source that lies: that is what the image's own digest is for.

use std::{
    cell::LazyCell,
    fs::File,
    io::{self, Read, Seek},
    path::Path,
};

use lvp_api::ErrorCode;
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    progress::Progress,
    watermark::Watermark,
};

/// Bytes of a chunk. The last one of an image may be shorter.
const CHUNK: usize = 4 << 20;
/// What is read at once.
const READ: usize = 1 << 20;

/// The chunk digests of one image, as its sidecar keeps them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chunks {
    /// Bytes of a chunk.
    size: usize,
    /// BLAKE3 of each, in hexadecimal.
    blake3: Vec<String>,
}

/// A running hash of chunks.
pub(super) struct ChunkHasher {
    current: blake3::Hasher,
    filled: usize,
    done: Vec<String>,
}

impl ChunkHasher {
    pub fn new() -> Self {
        Self { current: blake3::Hasher::new(), filled: 0, done: Vec::new() }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(CHUNK - self.filled));
            self.current.update(now);
            self.filled += now.len();
            if self.filled == CHUNK {
                self.end_chunk();
            }
            bytes = rest;
        }
    }

    fn end_chunk(&mut self) {
        self.done.push(self.current.finalize().to_hex().to_string());
        self.current.reset();
        self.filled = 0;
    }

    /// Ends.
    pub fn finish(mut self) -> Chunks {
        if self.filled > 0 {
            self.end_chunk();
        }
        Chunks { size: CHUNK, blake3: self.done }
    }
}

impl Chunks {
    /// Reads a file from its begin to its end and compares each chunk; `progress` counts, and `mark` follows.
    ///
    /// # Errors
    /// `checksum_mismatch` when the file is not what it was, or gone; the stop of the job; `interrupted` when its reader has failed
    /// the mark; `input_output`.
    pub fn compare(&self, path: &Path, mark: &Watermark, progress: &Progress) -> Result<()> {
        let failed = |error| Error::io("reading", path, error);
        let mut file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(gone(path)),
            opened => opened.map_err(failed)?,
        };
        let mut buffer = vec![0; READ.min(self.size.max(1))];
        let (mut hasher, mut filled, mut offset) = (blake3::Hasher::new(), 0, 0_u64);
        let mut expected = self.blake3.iter();
        let zeros = LazyCell::new(|| of_zeros(self.size));
        loop {
            progress.check()?;
            if mark.has_failed() {
                return Err(Error::new(ErrorCode::Interrupted, "nobody reads the image any more"));
            }
            // Nobody need read the holes of a sparse disk to know that they are zero.
            let chunk = offset + self.size as u64;
            if filled == 0
                && is_hole(&mut file, offset, chunk).map_err(failed)?
                && expected.as_slice().first() == Some(&*zeros)
            {
                file.seek(io::SeekFrom::Start(chunk)).map_err(failed)?;
                expected.next();
                offset = chunk;
                progress.advance(self.size as u64);
                mark.advance(offset);
                continue;
            }
            let most = buffer.len().min(self.size - filled);
            let count = file.read(&mut buffer[..most]).map_err(failed)?;
            hasher.update(&buffer[..count]);
            filled += count;
            offset += count as u64;
            progress.advance(count as u64);
            if filled == self.size || (count == 0 && filled > 0) {
                if expected.next().is_none_or(|digest| *digest != hasher.finalize().to_hex().as_str()) {
                    return Err(damaged(path, offset - filled as u64));
                }
                mark.advance(offset);
                hasher.reset();
                filled = 0;
            }
            if count == 0 {
                return if expected.next().is_none() { Ok(()) } else { Err(damaged(path, offset)) };
            }
        }
    }
}

/// The digest of a chunk of zeros, as a sidecar has it.
fn of_zeros(size: usize) -> String {
    let mut hasher = blake3::Hasher::new();
    io::copy(&mut io::repeat(0).take(size as u64), &mut hasher).expect("hashing is no input or output");
    hasher.finalize().to_hex().to_string()
}

/// Whether a file has no data from `start`, where it is read next, to `end`, and is no shorter (lseek(2), SEEK_DATA).
fn is_hole(file: &mut File, start: u64, end: u64) -> io::Result<bool> {
    let data = match seek(&*file, SeekFrom::Data(start)) {
        Ok(data) => data,
        // A hole to the end; or a file system that does not know, and then there is data for all that is known.
        Err(Errno::NXIO) => file.metadata()?.len(),
        Err(Errno::INVAL) => start,
        Err(error) => return Err(error.into()),
    };
    file.seek(io::SeekFrom::Start(start))?;
    Ok(data >= end)
}

fn gone(path: &Path) -> Error {
    Error::new(ErrorCode::ChecksumMismatch, format!("the cached image {} was removed by someone else", path.display()))
        .hint("it is fetched anew")
        .retry(true)
}

fn damaged(path: &Path, offset: u64) -> Error {
    Error::new(
        ErrorCode::ChecksumMismatch,
        format!("the cached image {} is not what was downloaded: it differs from byte {offset} on", path.display()),
    )
    .detail("offset", offset)
    .hint("it is taken out of use and fetched anew; check the disk of the image cache if this happens again")
    .retry(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(bytes: &[u8]) -> Chunks {
        let mut hasher = ChunkHasher::new();
        for part in bytes.chunks(777_777) {
            hasher.update(part);
        }
        hasher.finish()
    }

    fn compare(bytes: &[u8], chunks: &Chunks) -> Result<()> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        chunks.compare(file.path(), &Watermark::default(), &Progress::default())
    }

    #[test]
    fn what_was_downloaded_is_found_right_whatever_its_length() {
        for length in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK] {
            let bytes: Vec<u8> = (0..length).map(|at| (at / 1000) as u8).collect();
            compare(&bytes, &chunks(&bytes)).unwrap();
        }
    }

    #[test]
    fn holes_are_zeros_and_nothing_else() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let compare = |chunks: &Chunks| {
            let mark = Watermark::default();
            chunks.compare(file.path(), &mark, &Progress::default()).map(|()| mark.has_moved())
        };
        // Data, two chunks of holes, data that begins in the middle of a chunk, and a hole to the end within one.
        let mut bytes = vec![0; 5 * CHUNK + 10];
        bytes[..CHUNK].fill(7);
        bytes[3 * CHUNK + 5000..4 * CHUNK].fill(8);
        file.as_file().set_len(bytes.len() as u64).unwrap();
        file.as_file().write_all_at(&bytes[..CHUNK], 0).unwrap();
        file.as_file().write_all_at(&bytes[3 * CHUNK + 5000..4 * CHUNK], 3 * CHUNK as u64 + 5000).unwrap();
        assert!(compare(&chunks(&bytes)).unwrap());
        // A hole where data was is damage, a byte in a hole too, and so is a hole that ends early.
        let mut other = bytes.clone();
        other[CHUNK..3 * CHUNK].fill(1);
        assert_eq!(compare(&chunks(&other)).unwrap_err().code(), ErrorCode::ChecksumMismatch);
        file.as_file().write_all_at(b"x", 2 * CHUNK as u64 + 77).unwrap();
        assert_eq!(compare(&chunks(&bytes)).unwrap_err().code(), ErrorCode::ChecksumMismatch);
        let sparse = vec![0; 3 * CHUNK];
        file.as_file().set_len(0).unwrap();
        file.as_file().set_len(3 * CHUNK as u64 - 1).unwrap();
        assert_eq!(compare(&chunks(&sparse)).unwrap_err().code(), ErrorCode::ChecksumMismatch);
        file.as_file().set_len(3 * CHUNK as u64).unwrap();
        assert!(compare(&chunks(&sparse)).unwrap());
    }

    #[test]
    fn a_changed_missing_or_added_byte_is_seen() {
        let bytes = vec![7; 2 * CHUNK + 10];
        let chunks = chunks(&bytes);
        let mut changed = bytes.clone();
        changed[CHUNK + 5] ^= 1;
        for other in [&changed[..], &bytes[..2 * CHUNK], &bytes[..2 * CHUNK + 9], &[&bytes[..], b"x"].concat()] {
            assert_eq!(compare(other, &chunks).unwrap_err().code(), ErrorCode::ChecksumMismatch);
        }
    }
}
