//! One thread of a copy: assembles chunks and writes what is not zero of them.

use std::ops::Range;

use super::{
    super::{Decoder, Extent},
    Copy, Populated,
    plan::Piece,
};
use crate::{
    error::{Error, Result},
    host::block::{AlignedBuffer, BLOCK},
};

/// Zeros found in data are left out of a write, or zeroed by the target, from this length on; shorter runs cost less
/// written than another write would.
const ZERO_RUN: usize = 64 << 10;

/// A worker's own memory.
pub struct Worker<'a, 'b> {
    copy: &'a Copy<'b>,
    decoder: Decoder,
    buffer: AlignedBuffer,
    done: Populated,
}

impl<'a, 'b> Worker<'a, 'b> {
    pub fn new(copy: &'a Copy<'b>) -> Result<Self> {
        let size = usize::try_from(copy.chunk).map_err(|_| Error::internal("a chunk does not fit memory"))?;
        Ok(Self { copy, decoder: Decoder::new()?, buffer: AlignedBuffer::new(size), done: Populated::default() })
    }

    /// Works until the plan is at its end, the job shall stop or another worker has failed.
    pub fn run(mut self) -> Result<Populated> {
        while self.copy.goes_on()? {
            let piece = self.copy.next_piece()?;
            match piece {
                None => break,
                Some(Piece::Zero(range)) => self.zero(range, true)?,
                Some(Piece::Data(range, extents)) => self.data(range, &extents)?,
            }
        }
        Ok(self.done)
    }

    /// Makes a range zero, if it is not. `counts` says whether it is progress of its own.
    fn zero(&mut self, range: Range<u64>, counts: bool) -> Result<()> {
        let length = range.end - range.start;
        if self.copy.reads_zero {
            self.done.bytes_skipped += length;
            return Ok(());
        }
        let progress = self.copy.progress;
        let mut check = || progress.check();
        self.copy.target.zero(range.start, length, &mut check)?;
        self.done.bytes_zeroed += length;
        if counts {
            progress.advance(length);
        }
        Ok(())
    }

    /// Assembles a chunk and writes it.
    fn data(&mut self, range: Range<u64>, extents: &[Extent]) -> Result<()> {
        let length = (range.end - range.start) as usize;
        let mut filled = 0;
        let mut decoded = 0;
        for extent in extents {
            let from = (extent.guest - range.start) as usize;
            self.buffer[filled..from].fill(0);
            self.copy.image.read(extent, &mut self.decoder, &mut self.buffer[from..])?;
            filled = from + extent.length as usize;
            decoded += extent.length;
            self.copy.progress.check()?;
        }
        self.buffer[filled..length].fill(0);
        self.done.bytes_decoded += decoded;
        self.write(range.start, length)?;
        self.copy.progress.advance(if self.copy.reads_zero { decoded } else { length as u64 });
        Ok(())
    }

    /// Writes the first `length` bytes of the buffer at `offset`, but for long runs of zeros.
    fn write(&mut self, offset: u64, length: usize) -> Result<()> {
        let mut at = 0;
        while at < length {
            let (is_zero, end) = run(&self.buffer[..length], at);
            if is_zero {
                self.zero(offset + at as u64..offset + end as u64, false)?;
            } else {
                self.copy.target.write_at(&self.buffer[at..end], offset + at as u64)?;
                self.done.bytes_written += (end - at) as u64;
            }
            at = end;
        }
        Ok(())
    }
}

/// The run that begins at `at`, a block's start: whether it is a long run of zero blocks, and where it ends.
fn run(bytes: &[u8], at: usize) -> (bool, usize) {
    let zeros = zeros_from(bytes, at);
    if is_long(bytes, at, zeros) {
        return (true, zeros);
    }
    let mut end = zeros;
    while end < bytes.len() {
        end = (end + BLOCK).min(bytes.len());
        let zeros = zeros_from(bytes, end);
        if is_long(bytes, end, zeros) {
            break;
        }
        end = zeros;
    }
    (false, end)
}

/// A run of zeros is long enough for itself, or is all there is.
fn is_long(bytes: &[u8], start: usize, end: usize) -> bool {
    end - start >= ZERO_RUN || (start < end && start == 0 && end == bytes.len())
}

/// Where the zero blocks that begin at `at` end.
fn zeros_from(bytes: &[u8], at: usize) -> usize {
    let zeros: usize = bytes[at..].chunks(BLOCK).take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
    at + zeros
}

/// Whether all bytes are zero; in steps that the compiler makes wide instructions of.
fn is_zero(bytes: &[u8]) -> bool {
    let (steps, rest) = bytes.as_chunks::<64>();
    steps.iter().all(|step| step.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}
