//! The writing part of one thread of a copy: what is not zero is written, long runs of zeros are made by the target, and
//! what reads as zero already is left alone.

use std::ops::Range;

use super::{super::content::is_zero, Counts};
use crate::{
    error::Result,
    fault,
    host::block::{BLOCK, OpenTarget},
    progress::Progress,
};

/// Zeros found in data are made by the target from this length on, if it does not read zero: shorter runs cost less
/// written with the data than by a call of their own.
const ZEROED_RUN: usize = 64 << 10;

/// Writes to one target, and notes what was done. Progress is the caller's to count.
pub struct Writer<'a> {
    target: &'a OpenTarget,
    /// Whether what was never written reads as zero.
    pub reads_zero: bool,
    /// Asked how fast to go, and in long work whether to stop.
    progress: &'a Progress,
    /// What was done.
    pub done: Counts,
}

impl<'a> Writer<'a> {
    pub fn new(target: &'a OpenTarget, reads_zero: bool, progress: &'a Progress) -> Self {
        Self { target, reads_zero, progress, done: Counts::default() }
    }

    /// Makes a range zero, if it is not.
    pub fn zero(&mut self, range: Range<u64>) -> Result<()> {
        let length = range.end - range.start;
        if self.reads_zero {
            self.done.bytes_skipped += length;
            return Ok(());
        }
        let progress = self.progress;
        let mut zeros = 0;
        let mut may = |written| {
            zeros += written;
            progress.pace_write(written)
        };
        self.done.bytes_offloaded += self.target.zero(range.start, length, &mut may)?;
        progress.wrote(zeros);
        fault::point("populate.zeroed")?;
        self.done.bytes_zeroed += length;
        Ok(())
    }

    /// Writes bytes at `offset`, both aligned: no zero block where the target reads zero, no long run of them elsewhere.
    pub fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        let least = if self.reads_zero { BLOCK } else { ZEROED_RUN };
        let mut at = 0;
        while at < bytes.len() {
            let (is_zero, end) = run(bytes, at, least);
            if is_zero {
                self.zero(offset + at as u64..offset + end as u64)?;
            } else {
                self.progress.pace_write((end - at) as u64)?;
                self.target.write_at(&bytes[at..end], offset + at as u64)?;
                fault::point("populate.written")?;
                self.done.bytes_written += (end - at) as u64;
                self.progress.wrote((end - at) as u64);
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
