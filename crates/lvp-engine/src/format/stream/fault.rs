//! What a decoder's error means for the image: damaged, or refused for what it asks.

use std::{fmt, io};

use lvp_api::{ByteSize, ErrorCode};

use super::{
    super::{bytes::Bytes, error},
    Compression,
};
use crate::error::Error;

/// What is refused although it could be decoded.
#[derive(Debug)]
pub enum Fault {
    /// Decoding would take more memory than one image gets, in bytes.
    Memory {
        /// How much, where that is known.
        asked: Option<u64>,
        /// How much it gets.
        allowed: u64,
    },
    /// Something that is not done here, in words.
    Refused(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(why) => f.write_str(why),
            Self::Memory { asked: Some(asked), allowed } => {
                write!(
                    f,
                    "to decode it takes {} of memory, and at most {} are given",
                    ByteSize(*asked),
                    ByteSize(*allowed)
                )
            }
            Self::Memory { asked: None, allowed } => {
                write!(f, "to decode it takes more memory than the {} that are given", ByteSize(*allowed))
            }
        }
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for io::Error {
    fn from(fault: Fault) -> Self {
        Self::other(fault)
    }
}

/// The error of a decoder that had come to `at` in the image.
pub fn explain(failed: io::Error, bytes: &dyn Bytes, compression: Compression, at: u64) -> Error {
    let failed = match failed.downcast::<Error>() {
        Ok(ours) => return ours,
        Err(failed) => failed,
    };
    let name = compression.name();
    match failed.downcast::<Fault>() {
        Ok(fault) => refused(bytes, &fault),
        Err(failed) => match failed.kind() {
            io::ErrorKind::UnexpectedEof => {
                damaged(bytes, format!("its {name} data ends at byte {at}, where more should follow"), at)
            }
            io::ErrorKind::Unsupported => {
                refused(bytes, &Fault::Refused("it uses what is not supported")).source(failed)
            }
            _ => damaged(bytes, format!("its {name} data cannot be decoded near byte {at}"), at).source(failed),
        },
    }
}

/// What is wrong with the stored bytes, and where they were read to.
pub fn damaged(bytes: &dyn Bytes, what: impl AsRef<str>, at: u64) -> Error {
    error::invalid(bytes, what).hint("fetch the image again; if it stays so, compress it again").detail("offset", at)
}

fn refused(bytes: &dyn Bytes, fault: &Fault) -> Error {
    let error = error::refused(bytes, fault.to_string());
    match fault {
        Fault::Refused(_) => error.hint("compress it again with `zstd -19`, without a dictionary"),
        Fault::Memory { asked, allowed } => {
            let error = error
                .hint("compress it with `zstd -19`, which is read several times as fast as xz, or with `xz -6`")
                .detail("allowed_bytes", *allowed);
            match asked {
                Some(asked) => error.detail("asked_bytes", *asked),
                None => error,
            }
        }
    }
}

/// The disk is larger than its volume, which only decoding showed.
pub fn larger_than(limit: u64) -> Error {
    Error::new(ErrorCode::ImageTooLarge, format!("the image's disk does not fit the {limit} bytes of the volume"))
        .hint("ask for a larger volume; how large the disk is was not known before it was decoded so far")
        .detail("volume_bytes", limit)
}
