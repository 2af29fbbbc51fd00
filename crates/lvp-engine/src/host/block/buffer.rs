//! Memory that O_DIRECT takes: a reusable buffer that starts on a block boundary.

use std::ops::{Deref, DerefMut};

use super::BLOCK;

/// Bytes, zero at first, whose address is a multiple of [`BLOCK`].
pub struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// A buffer of `length` bytes.
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + BLOCK];
        // The vector is never grown, so its address stays.
        let start = bytes.as_ptr().align_offset(BLOCK);
        Self { bytes, start, length }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_block_boundary() {
        for length in [0, 1, 4096, 1 << 20] {
            let buffer = AlignedBuffer::new(length);
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_ptr() as usize % BLOCK, 0);
        }
    }
}
