//! Decompressing one cluster. The stored length is rounded up to sectors, so what follows the compressed data is left
//! alone; a cluster that does not come out whole is an error.

use libdeflater::Decompressor;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use super::{
    super::{Content, Extent, bytes::Bytes, error::invalid},
    header::{Compression, Header},
};
use crate::error::{Error, Result};

/// The largest window that a zstd frame may ask memory for, as a power of two. QEMU's frames have at most a cluster's
/// (2^21); the format would allow 2^31.
const WINDOW_LOG_LIMIT: u32 = 22;

/// The state of one thread that decompresses, made once and used again.
pub struct Decoder {
    input: Vec<u8>,
    deflate: Decompressor,
    zstd: DCtx<'static>,
}

impl Decoder {
    /// A decoder.
    ///
    /// # Errors
    /// `internal` when zstd cannot be set up.
    pub fn new() -> Result<Self> {
        let mut zstd = DCtx::try_create().ok_or_else(|| Error::internal("zstd could not be set up"))?;
        zstd.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_LIMIT))
            .map_err(|code| Error::internal(format!("zstd refused its limit: {}", zstd_safe::get_error_name(code))))?;
        Ok(Self { input: Vec::new(), deflate: Decompressor::new(), zstd })
    }

    /// Reads and decompresses an extent that is one compressed cluster; `cluster` has the size of one.
    pub(in super::super) fn decode(
        &mut self,
        bytes: &dyn Bytes,
        header: &Header,
        extent: &Extent,
        cluster: &mut [u8],
    ) -> Result<()> {
        let Content::Compressed { stored, stored_length } = extent.content else {
            return Err(Error::internal("an extent that is not compressed was to be decompressed"));
        };
        let there = stored_length.min(header.stored_size.saturating_sub(stored));
        self.input.resize(there as usize, 0);
        bytes.read_exact_at(&mut self.input, stored)?;
        let whole = match header.compression {
            Compression::Deflate => self.inflate(cluster),
            Compression::Zstd => self.unzstd(cluster),
        };
        if whole {
            return Ok(());
        }
        Err(invalid(
            bytes,
            format!(
                "the compressed cluster for {} of its disk, stored at {stored}, cannot be decompressed",
                extent.guest
            ),
        ))
    }

    fn inflate(&mut self, cluster: &mut [u8]) -> bool {
        self.deflate.deflate_decompress(&self.input, cluster).is_ok_and(|length| length == cluster.len())
    }

    /// Frame after frame until the cluster is full; the last one must end there. Every turn reads or writes a byte, or
    /// ends.
    fn unzstd(&mut self, cluster: &mut [u8]) -> bool {
        if self.zstd.reset(ResetDirective::SessionOnly).is_err() {
            return false;
        }
        let size = cluster.len();
        let mut output = OutBuffer::around(cluster);
        let mut input = InBuffer::around(&self.input);
        let mut rest_of_frame = 0;
        while output.pos() < size {
            let before = (input.pos(), output.pos());
            match self.zstd.decompress_stream(&mut output, &mut input) {
                Ok(rest) if before != (input.pos(), output.pos()) => rest_of_frame = rest,
                _ => return false,
            }
        }
        rest_of_frame == 0
    }
}
