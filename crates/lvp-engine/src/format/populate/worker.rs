//! One thread of a copy by extents: assembles chunks, which are then written.

use std::ops::Range;

use super::{
    super::{Decoder, Extent, content::leaves},
    Copy, Counts,
    plan::Piece,
    writer::Writer,
};
use crate::{
    error::{Error, Result},
    host::block::AlignedBuffer,
};

/// A worker's own memory.
pub struct Worker<'a, 'b> {
    copy: &'a Copy<'b>,
    decoder: Decoder,
    buffer: AlignedBuffer,
    writer: Writer<'b>,
}

impl<'a, 'b> Worker<'a, 'b> {
    pub fn new(copy: &'a Copy<'b>) -> Result<Self> {
        let size = usize::try_from(copy.chunk).map_err(|_| Error::internal("a chunk does not fit memory"))?;
        let writer = Writer::new(copy.target, copy.reads_zero, copy.progress);
        Ok(Self { copy, decoder: Decoder::new()?, buffer: AlignedBuffer::new(size), writer })
    }

    /// Works until the plan is at its end, the job shall stop or another worker has failed.
    pub fn run(mut self) -> Result<Counts> {
        while self.copy.crew.goes_on()? {
            let piece = self.copy.next_piece()?;
            match piece {
                None => break,
                Some(Piece::Zero(range)) => self.zero(range)?,
                Some(Piece::Data(turn, range, extents)) => self.data(turn, range, &extents)?,
            }
        }
        Ok(self.writer.done)
    }

    fn zero(&mut self, range: Range<u64>) -> Result<()> {
        let length = range.end - range.start;
        self.writer.zero(range)?;
        if !self.copy.reads_zero {
            self.copy.progress.advance(length);
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
        self.writer.done.bytes_decoded += decoded;
        self.copy.content.put(turn, leaves(&self.buffer[..length], range.start));
        self.writer.write(&self.buffer[..length], range.start)?;
        self.copy.progress.advance(if self.copy.reads_zero { decoded } else { length as u64 });
        Ok(())
    }
}
