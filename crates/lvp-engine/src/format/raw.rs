//! Raw images: the disk's bytes as they are. Holes of the file are zero extents, so a sparse raw image costs only its
//! data.

use super::{Content, Extent, bytes::Bytes};
use crate::error::Result;

/// The data and the holes of a raw image, in order.
pub struct Extents<'a> {
    bytes: &'a dyn Bytes,
    at: u64,
}

impl<'a> Extents<'a> {
    pub fn new(bytes: &'a dyn Bytes) -> Self {
        Self { bytes, at: 0 }
    }

    fn extent(&self) -> Result<Extent> {
        let at = self.at;
        let length = self.bytes.len();
        // Data of no bytes, or behind where it was asked for, would be an endless walk: then it is all data.
        let data = match self.bytes.data_after(at)? {
            Some(data) if data.start >= at && data.end > data.start && data.end <= length => data,
            Some(_) => at..length,
            None => length..length,
        };
        Ok(if data.start > at {
            Extent { guest: at, length: data.start - at, content: Content::Zero }
        } else {
            Extent { guest: at, length: data.end - at, content: Content::Plain { stored: at } }
        })
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Result<Extent>> {
        if self.at >= self.bytes.len() {
            return None;
        }
        let extent = self.extent();
        match &extent {
            Ok(extent) => self.at += extent.length,
            Err(_) => self.at = u64::MAX,
        }
        Some(extent)
    }
}

/// How many bytes are not in holes.
pub fn data_bytes(bytes: &dyn Bytes) -> Result<u64> {
    let mut sum = 0;
    for extent in Extents::new(bytes) {
        let extent = extent?;
        if extent.content != Content::Zero {
            sum += extent.length;
        }
    }
    Ok(sum)
}
