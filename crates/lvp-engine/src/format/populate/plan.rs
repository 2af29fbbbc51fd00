//! What the workers do, piece by piece: chunks with data in them, and long runs of zeros between.
//!
//! Pieces come in guest order, begin on the chunk grid, and together are the whole target. It leaves out doing them.

use std::ops::Range;

use super::super::{Content, Extent};
use crate::error::Result;

/// A run of zeros is cut into pieces of this length, so that several workers share it.
const ZERO_PIECE: u64 = 1 << 30;

/// Something for one worker to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// This range of the target is zero.
    Zero(Range<u64>),
    /// The chunk of this turn, counted from 0, is this range and has these extents in it, which do not overlap; between
    /// them it is zero.
    Data(u64, Range<u64>, Vec<Extent>),
}

/// The walk over an image's extents, cut to pieces.
pub struct Plan<'a> {
    extents: Box<dyn Iterator<Item = Result<Extent>> + Send + 'a>,
    /// The rest of the extent that is being cut.
    current: Option<Extent>,
    /// Where the next piece begins.
    at: u64,
    /// The target's size.
    end: u64,
    chunk: u64,
    /// The next chunk's.
    turn: u64,
}

impl<'a> Plan<'a> {
    /// The plan for a target of `end` bytes, which is not smaller than the disk.
    pub fn new(extents: Box<dyn Iterator<Item = Result<Extent>> + Send + 'a>, end: u64, chunk: u64) -> Self {
        Self { extents, current: None, at: 0, end, chunk, turn: 0 }
    }

    /// The next piece; none when all are given out.
    pub fn next(&mut self) -> Result<Option<Piece>> {
        if self.at >= self.end {
            return Ok(None);
        }
        let start = self.at;
        let zero_end = self.zeros_from(start)?;
        let whole = if zero_end == self.end { zero_end } else { zero_end - zero_end % self.chunk };
        let piece = if whole > start {
            self.at = whole.min(start.saturating_add(ZERO_PIECE));
            Piece::Zero(start..self.at)
        } else {
            self.at = start.saturating_add(self.chunk).min(self.end);
            self.turn += 1;
            Piece::Data(self.turn - 1, start..self.at, self.data_until(self.at)?)
        };
        Ok(Some(piece))
    }

    /// Where the zeros that begin at `from` end; `from` itself where there are none.
    fn zeros_from(&mut self, from: u64) -> Result<u64> {
        loop {
            match self.current()? {
                None => return Ok(self.end),
                Some(Extent { content: Content::Zero, guest, length }) => {
                    let end = guest + length;
                    // A piece that begins here takes only a part of it.
                    if end - from.min(end) >= ZERO_PIECE {
                        return Ok(end);
                    }
                    self.current = None;
                }
                Some(extent) => return Ok(extent.guest.max(from)),
            }
        }
    }

    /// Takes the extents that are not zero up to `end`, cutting the last.
    fn data_until(&mut self, end: u64) -> Result<Vec<Extent>> {
        let mut taken = Vec::new();
        while let Some(extent) = self.current()? {
            if extent.guest >= end {
                break;
            }
            let (before, after) = cut(extent, end);
            if before.content != Content::Zero {
                taken.push(before);
            }
            self.current = after;
        }
        Ok(taken)
    }

    /// The extent that is next; none at the end of the disk.
    fn current(&mut self) -> Result<Option<Extent>> {
        if self.current.is_none() {
            self.current = self.extents.next().transpose()?;
        }
        Ok(self.current)
    }
}

/// An extent up to `end`, and the rest of it. Compressed clusters lie on the grid and are never cut.
fn cut(extent: Extent, end: u64) -> (Extent, Option<Extent>) {
    let length = end - extent.guest;
    if extent.length <= length {
        return (extent, None);
    }
    let content = match extent.content {
        Content::Plain { stored } => Content::Plain { stored: stored + length },
        other => other,
    };
    let rest = Extent { guest: end, length: extent.length - length, content };
    (Extent { length, ..extent }, Some(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 1024;

    fn plan(extents: &[(u64, Content)], end: u64) -> Vec<Piece> {
        let mut guest = 0;
        let extents: Vec<Result<Extent>> = extents
            .iter()
            .map(|(length, content)| {
                guest += length;
                Ok(Extent { guest: guest - length, length: *length, content: *content })
            })
            .collect();
        let mut plan = Plan::new(Box::new(extents.into_iter()), end, CHUNK);
        std::iter::from_fn(|| plan.next().unwrap()).collect()
    }

    fn plain(guest: u64, length: u64, stored: u64) -> Extent {
        Extent { guest, length, content: Content::Plain { stored } }
    }

    #[test]
    fn zeros_are_joined_and_the_tail_is_one_of_them() {
        let stored = Content::Plain { stored: 5000 };
        let pieces = plan(&[(100, Content::Zero), (50, stored), (CHUNK * 3, Content::Zero)], CHUNK * 10);
        assert_eq!(pieces, [Piece::Data(0, 0..CHUNK, vec![plain(100, 50, 5000)]), Piece::Zero(CHUNK..CHUNK * 10)]);
    }

    #[test]
    fn data_is_cut_on_the_grid_and_zeros_before_it_are_whole_chunks() {
        let stored = Content::Plain { stored: 9000 };
        let pieces = plan(&[(CHUNK * 2 + 24, Content::Zero), (CHUNK + 100, stored)], CHUNK * 3 + 512);
        assert_eq!(
            pieces,
            [
                Piece::Zero(0..CHUNK * 2),
                Piece::Data(0, CHUNK * 2..CHUNK * 3, vec![plain(CHUNK * 2 + 24, 1000, 9000)]),
                Piece::Data(1, CHUNK * 3..CHUNK * 3 + 512, vec![plain(CHUNK * 3, 124, 10_000)]),
            ]
        );
    }

    #[test]
    fn an_empty_disk_is_zeros_in_pieces() {
        let end = ZERO_PIECE * 2 + 512;
        let pieces = plan(&[(end - 100, Content::Zero)], end);
        let expected = [0..ZERO_PIECE, ZERO_PIECE..ZERO_PIECE * 2, ZERO_PIECE * 2..end].map(Piece::Zero);
        assert_eq!(pieces, expected);
    }
}
