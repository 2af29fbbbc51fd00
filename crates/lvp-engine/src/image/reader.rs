//! Random access to an image that need not be here: for reading its metadata before its data is fetched.
//!
//! Over HTTP a few blocks are kept, since an image's tables lie close together. It blocks, and over HTTP waits for the
//! runtime: it may be used on threads that may block only (`spawn_blocking`). It leaves out what is read.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use tokio::runtime::Handle;

use super::{
    entry::Entry,
    source::{Source, SourceInfo},
};
use crate::{error::Result, progress::Progress};

/// What one request reads, in bytes: a table of an image with the usual clusters.
const BLOCK: u64 = 64 << 10;
/// Blocks that are kept.
const KEPT: usize = 32;

/// Reads an image at any offset.
pub struct Reader {
    length: u64,
    from: From,
}

enum From {
    Cache { file: File, _entry: Entry },
    Source(Box<Remote>),
}

struct Remote {
    source: Source,
    info: SourceInfo,
    progress: Progress,
    runtime: Handle,
    /// Blocks by number, least recently used first.
    blocks: Mutex<VecDeque<(u64, Bytes)>>,
}

impl Reader {
    /// Of a cached image.
    pub(super) fn cached(file: File, entry: Entry) -> Self {
        Self { length: entry.size(), from: From::Cache { file, _entry: entry } }
    }

    /// Of an image at its source; made inside a runtime.
    pub(super) fn remote(source: Source, info: SourceInfo, length: u64, progress: Progress) -> Self {
        let blocks = Mutex::new(VecDeque::with_capacity(KEPT));
        let runtime = Handle::current();
        Self { length, from: From::Source(Box::new(Remote { source, info, progress, runtime, blocks })) }
    }

    /// The image's size in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Fills `buffer` with what lies at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` past the end. An error of the source is in it as an [`Error`](crate::Error), to be had with
    /// `into_inner` and `downcast`.
    pub fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match &self.from {
            From::Cache { file, .. } => file.read_exact_at(buffer, offset),
            From::Source(remote) => remote.read(offset, buffer, self.length).map_err(io::Error::other),
        }
    }
}

impl Remote {
    fn read(&self, mut offset: u64, mut buffer: &mut [u8], length: u64) -> Result<()> {
        if buffer.len() as u64 >= 2 * BLOCK {
            // One large piece, such as a table of an image with large clusters, is not read again.
            let bytes = self.source.read_range(&self.info, offset, buffer.len(), &self.progress);
            buffer.copy_from_slice(&self.runtime.block_on(bytes)?);
            return Ok(());
        }
        while !buffer.is_empty() {
            let block = self.block(offset / BLOCK, length)?;
            let within = (offset % BLOCK) as usize;
            let count = buffer.len().min(block.len() - within);
            buffer[..count].copy_from_slice(&block[within..within + count]);
            buffer = &mut buffer[count..];
            offset += count as u64;
        }
        Ok(())
    }

    fn block(&self, number: u64, length: u64) -> Result<Bytes> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = blocks.iter().position(|(known, _)| *known == number)
            && let Some(found) = blocks.remove(at)
        {
            let bytes = found.1.clone();
            blocks.push_back(found);
            return Ok(bytes);
        }
        let start = number * BLOCK;
        let size = BLOCK.min(length - start) as usize;
        let bytes = self.runtime.block_on(self.source.read_range(&self.info, start, size, &self.progress))?;
        if blocks.len() == KEPT {
            blocks.pop_front();
        }
        blocks.push_back((number, bytes.clone()));
        Ok(bytes)
    }
}
