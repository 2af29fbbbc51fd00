//! The copy of a disk that can only be decoded from its begin to its end: one thread decodes, the others write.
//!
//! ```text
//!                  ┌──────── empty buffers ◄────────┐
//!   Disk ─► decode ┤                                ├ write, zero ─► target
//!                  └─► data at an offset, zero runs ┘
//! ```
//! There are so many buffers and no more, so memory is bounded by them and whoever is faster waits for the other. A
//! buffer that is all zero is not handed over: it lengthens a run, which goes to a writer when it ends or is long.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread,
};

use lvp_api::ZeroPolicy;

use super::{
    super::{
        content::{ContentHasher, is_zero, leaves},
        stream::{Disk, larger_than},
    },
    CHUNK, Counts, PopulateOptions,
    crew::{self, Crew},
    writer::Writer,
};
use crate::{
    error::Result,
    host::block::{AlignedBuffer, BLOCK, BlockTarget, OpenTarget},
    progress::Progress,
};

/// The most threads that write: one decodes, and what it gives does not keep more of them busy.
const WRITERS_LIMIT: usize = 4;
/// Buffers beyond one for each writer: one is being decoded to, one waits.
const BUFFERS_BESIDE: usize = 2;
/// A run of zeros goes to a writer when it is so long, so that it is made while decoding goes on.
const ZERO_RUN: u64 = 256 << 20;

/// Something for a writer to do.
enum Piece {
    /// This range of the target is zero.
    Zero(Range<u64>),
    /// So many bytes of the buffer come at this offset; the data of this turn, counted from 0.
    Data { turn: u64, buffer: AlignedBuffer, length: usize, offset: u64 },
}

/// Copies the disk to the target and zeroes the rest of it, with as many threads as there are workers, and at most a few,
/// beside the one that decodes.
pub fn copy(
    disk: Disk<'_>,
    open: &OpenTarget,
    target: &BlockTarget,
    content: &ContentHasher,
    options: PopulateOptions,
    progress: &Progress,
) -> Result<Counts> {
    let writers = options.workers.clamp(1, WRITERS_LIMIT);
    let crew = Crew::new(progress, open, options.io_priority);
    let buffers = writers + BUFFERS_BESIDE;
    let (pieces, taken) = sync_channel(buffers);
    let (emptied, empty) = channel();
    for _ in 0..buffers {
        // The other end is right here.
        let _ = emptied.send(AlignedBuffer::new(CHUNK as usize));
    }
    let taken = Arc::new(Mutex::new(taken));
    let (size, zero_all) = (target.size, options.zero == ZeroPolicy::Full);
    let decoding = Decoding { disk, size, zero_all, at: 0, turn: 0, zeros: 0..0, pieces, empty };
    thread::scope(|scope| {
        let crew = &crew;
        let mut threads = Vec::with_capacity(writers + 1);
        for index in 0..writers {
            let (taken, emptied) = (Arc::clone(&taken), emptied.clone());
            let writer = Writer::new(open, target.reads_zero, progress);
            let work = move || write(writer, crew, content, &taken, &emptied, progress);
            match crew.spawn(scope, format!("populate-{index}"), work) {
                Ok(thread) => threads.push(thread),
                Err(error) if threads.is_empty() => return Err(crew::not_started(error)),
                Err(_) => break,
            }
        }
        // These ends are the writers' alone: when all of them are gone, the decoder does not wait for ever.
        drop((taken, emptied));
        threads.push(crew.spawn(scope, "decode".to_owned(), move || decoding.run(crew)).map_err(crew::not_started)?);
        crew::collect(threads)
    })
}

/// One thread that writes, until the decoder is done, the job shall stop or another thread has failed.
fn write(
    mut writer: Writer<'_>,
    crew: &Crew<'_>,
    content: &ContentHasher,
    taken: &Mutex<Receiver<Piece>>,
    emptied: &Sender<AlignedBuffer>,
    progress: &Progress,
) -> Result<Counts> {
    while crew.goes_on()? {
        let piece = taken.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let length = match piece {
            // The decoder is gone and nothing is left.
            Err(_) => break,
            Ok(Piece::Zero(range)) => {
                let length = range.end - range.start;
                writer.zero(range)?;
                length
            }
            Ok(Piece::Data { turn, buffer, length, offset }) => {
                content.put(turn, leaves(&buffer[..length], offset));
                writer.write(&buffer[..length], offset)?;
                // Without a decoder nobody needs it.
                let _ = emptied.send(buffer);
                length as u64
            }
        };
        if !writer.reads_zero {
            progress.advance(length);
        }
    }
    Ok(writer.done)
}

/// The thread that decodes.
struct Decoding<'a> {
    disk: Disk<'a>,
    /// The target's size.
    size: u64,
    /// Whether what lies behind the disk is zeroed.
    zero_all: bool,
    /// Everything before this was handed over, but the run of zeros.
    at: u64,
    /// The next buffer's.
    turn: u64,
    /// The run of zeros that ends at `at`, maybe empty.
    zeros: Range<u64>,
    pieces: SyncSender<Piece>,
    empty: Receiver<AlignedBuffer>,
}

impl Decoding<'_> {
    /// Decodes the whole disk, and has the rest of the target zeroed.
    fn run(mut self, crew: &Crew<'_>) -> Result<Counts> {
        let mut done = Counts::default();
        let mut spare = None;
        loop {
            let room = CHUNK.min(self.size - self.at) as usize;
            if room == 0 && self.disk.fill(&mut [0])? > 0 {
                return Err(larger_than(self.size));
            }
            let buffer = if crew.goes_on()? { spare.take().or_else(|| self.empty.recv().ok()) } else { None };
            // There is none when all writers are gone; one of them says why.
            let Some(mut buffer) = buffer else { return Ok(done) };
            let length = self.disk.fill(&mut buffer[..room])?;
            done.bytes_decoded += length as u64;
            // A block is written as a whole.
            let used = if self.zero_all { room } else { length.next_multiple_of(BLOCK).min(room) };
            buffer[length..used].fill(0);
            spare = self.hand_over(buffer, used);
            if length < room || room == 0 {
                if self.zero_all {
                    self.zero_until(self.size);
                }
                self.end_zeros();
                done.bytes_left = self.size - self.at;
                return Ok(done);
            }
        }
    }

    /// Hands over what comes next on the target: the first `length` bytes of the buffer. Gives the buffer back when it
    /// was not needed.
    fn hand_over(&mut self, buffer: AlignedBuffer, length: usize) -> Option<AlignedBuffer> {
        if is_zero(&buffer[..length]) {
            self.zero_until(self.at + length as u64);
            return Some(buffer);
        }
        self.end_zeros();
        let offset = self.at;
        self.at += length as u64;
        self.turn += 1;
        self.send(Piece::Data { turn: self.turn - 1, buffer, length, offset });
        None
    }

    /// Everything from here to `end` is zero.
    fn zero_until(&mut self, end: u64) {
        if self.zeros.is_empty() {
            self.zeros = self.at..self.at;
        }
        while self.at < end {
            self.at = end.min(self.zeros.start + ZERO_RUN);
            self.zeros.end = self.at;
            if self.zeros.end - self.zeros.start == ZERO_RUN {
                self.end_zeros();
                self.zeros = self.at..self.at;
            }
        }
    }

    fn end_zeros(&mut self) {
        let zeros = std::mem::replace(&mut self.zeros, 0..0);
        if !zeros.is_empty() {
            self.send(Piece::Zero(zeros));
        }
    }

    fn send(&self, piece: Piece) {
        // Without a writer nothing is written any more, and `run` sees that next.
        let _ = self.pieces.send(piece);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, sync::Arc};

    use lvp_api::{ErrorCode, ImageFormat};

    use super::*;
    use crate::format::{
        Image,
        tests::{Memory, packed, room},
    };

    /// A target that takes only its first bytes: every writer fails, and nobody waits for them.
    #[test]
    fn the_errors_of_all_writers_end_the_copy() {
        let (_directory, path) = room("target.raw");
        File::create(&path).unwrap().set_len(2 << 20).unwrap();
        let target = BlockTarget { path, offset: 0, size: 2 << 20, reads_zero: false };
        let open = OpenTarget::open(&target).unwrap();
        let larger = BlockTarget { size: 1 << 40, ..target };
        for content in [vec![1; 64 << 20], vec![0; 1 << 20]] {
            let stored = packed(&content, ImageFormat::RawZst, &["-1"]);
            let image = Image::open(Arc::new(Memory(stored)), ImageFormat::RawZst).unwrap();
            for writers in [1, 2, 4] {
                let progress = Progress::default();
                let disk = image.stream(&progress, false).unwrap().unwrap();
                let options = PopulateOptions { workers: writers, ..PopulateOptions::default() };
                let error = copy(disk, &open, &larger, &ContentHasher::default(), options, &progress).unwrap_err();
                assert_eq!(error.code(), ErrorCode::Internal, "{error:?}");
                assert!(error.to_string().contains("does not fit"), "{error:?}");
            }
        }
    }
}
