//! The stored bytes of an image as a stream for a decoder: read in order, a bounded piece at a time, never further ahead
//! than one piece. Each read counts as progress and asks whether the job shall stop, so that a decoder which gets much
//! input and gives little output stops as well. It leaves out what the bytes mean.

use std::io::{self, BufRead, Read};

use super::super::bytes::Bytes;
use crate::progress::Progress;

/// What one read takes, in bytes.
const PIECE: u64 = 256 << 10;

/// Image bytes from the first on.
pub struct Source<'a> {
    bytes: &'a dyn Bytes,
    /// Asked before each read; none where nobody waits.
    progress: Option<&'a Progress>,
    /// Whether what is read counts as progress.
    counted: bool,
    /// Where reading ends, in bytes: the image's end, or before.
    end: u64,
    /// How much was read.
    read: u64,
    buffer: Vec<u8>,
    /// How much of the buffer was taken.
    taken: usize,
}

impl<'a> Source<'a> {
    /// Reads the first `end` bytes, or all where there are fewer.
    pub fn new(bytes: &'a dyn Bytes, end: u64) -> Self {
        let end = end.min(bytes.len());
        Self { bytes, progress: None, counted: false, end, read: 0, buffer: Vec::new(), taken: 0 }
    }

    /// Asks this progress whether to stop, and counts on it what is read if `counted`.
    pub fn with_progress(self, progress: &'a Progress, counted: bool) -> Self {
        Self { progress: Some(progress), counted, ..self }
    }

    /// Where the next byte lies in the image.
    pub fn position(&self) -> u64 {
        self.read - (self.buffer.len() - self.taken) as u64
    }

    /// Whether all was read that may be, and the image goes on.
    pub fn is_cut_off(&self) -> bool {
        self.read == self.end && self.end < self.bytes.len()
    }

    /// What comes next, without taking it: `count` bytes, or fewer at the end.
    pub fn peek(&mut self, count: usize) -> io::Result<&[u8]> {
        if self.buffer.len() - self.taken < count && self.read < self.end {
            self.read_more()?;
        }
        let rest = &self.buffer[self.taken..];
        Ok(&rest[..count.min(rest.len())])
    }

    /// Reads a piece behind what is not taken yet.
    fn read_more(&mut self) -> io::Result<()> {
        if let Some(progress) = self.progress {
            progress.check().map_err(io::Error::other)?;
        }
        let count = PIECE.min(self.end - self.read);
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let kept = self.buffer.len();
        self.buffer.resize(kept + count as usize, 0);
        self.bytes.read_exact_at(&mut self.buffer[kept..], self.read).map_err(io::Error::other)?;
        self.read += count;
        if let Some(progress) = self.progress.filter(|_| self.counted) {
            progress.advance(count);
        }
        Ok(())
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.taken == self.buffer.len() && self.read < self.end {
            self.read_more()?;
        }
        Ok(&self.buffer[self.taken..])
    }

    fn consume(&mut self, count: usize) {
        self.taken = (self.taken + count).min(self.buffer.len());
    }
}

impl Read for Source<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(into)?;
        self.consume(count);
        Ok(count)
    }
}
