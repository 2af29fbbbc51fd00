//! One thread of a copy: assembles chunks and writes what is not zero of them.

use std::ops::Range;

use super::{
    super::{
        Decoder, Extent,
        content::{is_zero, leaves},
    },
    Copy, Counts,
    plan::Piece,
};
use crate::{
    error::{Error, Result},
    host::block::{AlignedBuffer, BLOCK},
};

/// Zeros found in data are made by the target from this length on, if it does not read zero: shorter runs cost less
/// written with the data than by a call of their own.
const ZEROED_RUN: usize = 64 << 10;

/// A worker's own memory.
pub struct Worker<'a, 'b> {
    copy: &'a Copy<'b>,
    decoder: Decoder,
    buffer: AlignedBuffer,
    done: Counts,
}

impl<'a, 'b> Worker<'a, 'b> {
    pub fn new(copy: &'a Copy<'b>) -> Result<Self> {
        let size = usize::try_from(copy.chunk).map_err(|_| Error::internal("a chunk does not fit memory"))?;
        Ok(Self { copy, decoder: Decoder::new()?, buffer: AlignedBuffer::new(size), done: Counts::default() })
    }

    /// Works until the plan is at its end, the job shall stop or another worker has failed.
    pub fn run(mut self) -> Result<Counts> {
        while self.copy.goes_on()? {
            let piece = self.copy.next_piece()?;
            match piece {
                None => break,
                Some(Piece::Zero(range)) => self.zero(range, true)?,
                Some(Piece::Data(turn, range, extents)) => self.data(turn, range, &extents)?,
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
        self.done.bytes_offloaded += self.copy.target.zero(range.start, length, &mut check)?;
        self.done.bytes_zeroed += length;
        if counts {
            progress.advance(length);
        }
        Ok(())
    }

    /// Assembles a chunk, hashes and writes it.
    fn data(&mut self, turn: u64, range: Range<u64>, extents: &[Extent]) -> Result<()> {
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
        self.copy.content.put(turn, leaves(&self.buffer[..length], range.start));
        self.write(range.start, length)?;
        self.copy.progress.advance(if self.copy.reads_zero { decoded } else { length as u64 });
        Ok(())
    }

    /// Writes the first `length` bytes of the buffer at `offset`: no zero block where the target reads zero, no long run
    /// of them elsewhere.
    fn write(&mut self, offset: u64, length: usize) -> Result<()> {
        let least = if self.copy.reads_zero { BLOCK } else { ZEROED_RUN };
        let mut at = 0;
        while at < length {
            let (is_zero, end) = run(&self.buffer[..length], at, least);
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

/// The run that begins at `at`, a block's start: whether it is of zero blocks, at least `least` bytes or all there are,
/// and where it ends.
fn run(bytes: &[u8], at: usize, least: usize) -> (bool, usize) {
    let is_long = |start: usize, end: usize| {
        start < end && (end - start >= least || end == bytes.len() && (start == 0 || least <= BLOCK))
    };
    let mut zeros = zeros_from(bytes, at);
    if is_long(at, zeros) {
        return (true, zeros);
    }
    loop {
        let end = (zeros + BLOCK).min(bytes.len());
        zeros = zeros_from(bytes, end);
        if end == bytes.len() || is_long(end, zeros) {
            return (false, end);
        }
    }
}

/// Where the zero blocks that begin at `at` end.
fn zeros_from(bytes: &[u8], at: usize) -> usize {
    let zeros: usize = bytes[at..].chunks(BLOCK).take_while(|block| is_zero(block)).map(<[u8]>::len).sum();
    at + zeros
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The runs of so many blocks of these bytes, without the last `tail` bytes.
    fn runs(blocks: &[u8], tail: usize, least: usize) -> Vec<(bool, usize)> {
        let mut bytes: Vec<u8> = blocks.iter().flat_map(|value| [*value; BLOCK]).collect();
        bytes.truncate(bytes.len() - tail);
        let mut found = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let (is_zero, end) = run(&bytes, at, least);
            assert!(end > at);
            found.push((is_zero, end - at));
            at = end;
        }
        found
    }

    #[test]
    fn every_zero_block_is_left_out_where_the_target_reads_zero() {
        assert_eq!(
            runs(&[0, 1, 1, 0, 1, 0, 0], 100, BLOCK),
            [(true, BLOCK), (false, 2 * BLOCK), (true, BLOCK), (false, BLOCK), (true, 2 * BLOCK - 100)]
        );
        assert_eq!(runs(&[1, 0], 96, BLOCK), [(false, BLOCK), (true, BLOCK - 96)]);
    }

    #[test]
    fn only_long_runs_are_zeroed_by_the_target() {
        assert_eq!(runs(&[0, 1, 0, 1, 0], 0, 2 * BLOCK), [(false, 5 * BLOCK)]);
        assert_eq!(
            runs(&[1, 0, 0, 1, 0, 0], 0, 2 * BLOCK),
            [(false, BLOCK), (true, 2 * BLOCK), (false, BLOCK), (true, 2 * BLOCK)]
        );
        assert_eq!(runs(&[0], 512, 2 * BLOCK), [(true, BLOCK - 512)]);
    }
}
