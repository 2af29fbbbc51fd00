//! Decoding zstd: frame after frame, skippable ones passed over, the content checksum checked where there is one.
//!
//! A frame names the memory that its decoder needs, its window. That is looked at before the decoder sees the frame, so
//! that a refusal can say what was asked. Layout: RFC 8878, section 3.1.

use std::io::{self, Read};

use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::{fault::Fault, source::Source};
use crate::error::{Error, Result};

/// The largest window, as a power of two. `zstd -19` asks for 2^23 bytes; `--long` and `--ultra` for up to 2^31, which
/// the 64 MiB of the whole process do not have.
const WINDOW_LOG_LIMIT: u32 = 23;
/// A frame's header is at most so long, magic and all.
const LONGEST_HEADER: usize = 18;
const MAGIC: [u8; 4] = *b"\x28\xb5\x2f\xfd";

/// What a frame's header says.
#[derive(Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of memory that the decoder needs.
    window: u64,
    /// Bytes that the frame decodes to, if it says.
    content: Option<u64>,
    /// Whether a dictionary is needed.
    dictionary: bool,
}

impl FrameHeader {
    /// Reads it from the first bytes of a frame; none if they begin no frame, or are too few.
    fn parse(head: &[u8]) -> Option<Self> {
        let (magic, rest) = head.split_first_chunk::<4>()?;
        let (&descriptor, mut rest) = rest.split_first()?;
        if *magic != MAGIC {
            return None;
        }
        let mut take = |count: usize| {
            let (taken, left) = rest.split_at_checked(count)?;
            rest = left;
            Some(taken.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)))
        };
        let single_segment = descriptor & 0x20 != 0;
        let window = if single_segment { 0 } else { take(1)? };
        let dictionary = take([0, 1, 2, 4][usize::from(descriptor & 3)])? != 0;
        let content = match descriptor >> 6 {
            0 if !single_segment => None,
            0 => Some(take(1)?),
            1 => Some(take(2)? + 256),
            2 => Some(take(4)?),
            _ => Some(take(8)?),
        };
        let base = 1 << (10 + (window >> 3));
        let window = if single_segment { content? } else { base + base / 8 * (window & 7) };
        Some(Self { window, content, dictionary })
    }
}

/// At least so many bytes does the image decode to: what its first frame says. More frames may follow, which only
/// decoding shows.
pub fn least_size(source: &mut Source<'_>) -> io::Result<u64> {
    let header = FrameHeader::parse(source.peek(LONGEST_HEADER)?);
    Ok(header.and_then(|header| header.content).unwrap_or(0))
}

/// The data of all frames, one after the other.
pub struct Decoder<'a> {
    source: Source<'a>,
    context: DCtx<'static>,
    /// Whether a frame has begun and not ended.
    in_frame: bool,
}

impl<'a> Decoder<'a> {
    /// A decoder.
    ///
    /// # Errors
    /// `internal` when zstd cannot be set up.
    pub fn new(source: Source<'a>) -> Result<Self> {
        let mut context = DCtx::try_create().ok_or_else(|| Error::internal("zstd could not be set up"))?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_LIMIT))
            .map_err(|code| Error::internal(format!("zstd refused its limit: {}", zstd_safe::get_error_name(code))))?;
        Ok(Self { source, context, in_frame: false })
    }

    /// What is decoded.
    pub fn source(&self) -> &Source<'a> {
        &self.source
    }

    /// Looks at the header of the frame that comes next. `false` at the end.
    fn begin_frame(&mut self) -> io::Result<bool> {
        let head = self.source.peek(LONGEST_HEADER)?;
        if head.is_empty() {
            return Ok(false);
        }
        if let Some(header) = FrameHeader::parse(head) {
            if header.dictionary {
                return Err(Fault::Refused("it needs a zstd dictionary").into());
            }
            if header.window > 1 << WINDOW_LOG_LIMIT {
                return Err(Fault::Memory { asked: Some(header.window), allowed: 1 << WINDOW_LOG_LIMIT }.into());
            }
        }
        Ok(true)
    }
}

impl Read for Decoder<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        use io::BufRead;

        loop {
            if !self.in_frame && !self.begin_frame()? {
                return Ok(0);
            }
            self.in_frame = true;
            let stored = self.source.fill_buf()?;
            let (mut input, mut output) = (InBuffer::around(stored), OutBuffer::around(&mut *into));
            let left = self
                .context
                .decompress_stream(&mut output, &mut input)
                .map_err(|code| io::Error::new(io::ErrorKind::InvalidData, zstd_safe::get_error_name(code)))?;
            let (taken, given) = (input.pos(), output.pos());
            self.source.consume(taken);
            self.in_frame = left > 0;
            if given > 0 {
                return Ok(given);
            }
            // Nothing taken, nothing given and more wanted: the input has ended too early.
            if taken == 0 && left > 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(rest: &[u8]) -> Option<FrameHeader> {
        FrameHeader::parse(&[&MAGIC[..], rest].concat())
    }

    fn header(window: u64, content: Option<u64>, dictionary: bool) -> Option<FrameHeader> {
        Some(FrameHeader { window, content, dictionary })
    }

    /// The examples follow RFC 8878, section 3.1.1.1.
    #[test]
    fn frame_headers_are_read_as_the_format_says() {
        assert_eq!(parse(&[0, 0]), header(1 << 10, None, false));
        assert_eq!(parse(&[0, 0x0a]), header((2 << 10) + (2 << 10) / 8 * 2, None, false));
        assert_eq!(parse(&[0, 0xff]), header((1 << 41) + (1 << 41) / 8 * 7, None, false));
        assert_eq!(parse(&[0x20, 7]), header(7, Some(7), false));
        assert_eq!(parse(&[0x60, 1, 1]), header(513, Some(513), false));
        assert_eq!(parse(&[0x80, 0x58, 1, 2, 3, 4]), header(2 << 20, Some(0x0403_0201), false));
        assert_eq!(parse(&[0xe0, 0, 0, 0, 0, 0, 0, 0, 0x80]), header(1 << 63, Some(1 << 63), false));
        assert_eq!(parse(&[0x03, 0, 0, 0, 0, 1]), header(1 << 10, None, true));
        assert_eq!(parse(&[0x01, 0, 0]), header(1 << 10, None, false));
        for short in [&[][..], &[0], &[0x20], &[0xe0, 1, 2, 3], &[0x03, 0, 1]] {
            assert_eq!(parse(short), None);
        }
        assert_eq!(FrameHeader::parse(b"\x50\x2a\x4d\x18\0\0\0\0"), None);
    }
}
