//! Digests of bytes as they come: SHA-256 and the chunk digests always, SHA-512 beside them when a request names one.
//! It leaves out where the bytes come from.

use std::{fs::File, io::Read, path::Path};

use aws_lc_rs::digest::{Context, SHA256, SHA512, digest};
use lvp_api::{Digest, DigestAlgorithm};

use super::chunks::{ChunkHasher, Chunks};
use crate::{
    error::{Error, Result},
    progress::Progress,
};

/// What is read of a file at once, in bytes.
const FILE_CHUNK: usize = 1 << 20;

/// A running hash of one image.
pub(super) struct Hasher {
    sha256: Context,
    sha512: Option<Context>,
    chunks: ChunkHasher,
}

/// The digests of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Digests {
    /// Always computed: the cache's key.
    pub sha256: Digest,
    /// Computed when asked.
    pub sha512: Option<Digest>,
    /// For reading the image again.
    pub chunks: Chunks,
}

impl Hasher {
    /// Begins; with SHA-512 when the expected digest is one.
    pub fn new(expected: Option<&Digest>) -> Self {
        let sha512 = expected.is_some_and(|digest| digest.algorithm() == DigestAlgorithm::Sha512);
        Self {
            sha256: Context::new(&SHA256),
            sha512: sha512.then(|| Context::new(&SHA512)),
            chunks: ChunkHasher::new(),
        }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.sha256.update(bytes);
        self.chunks.update(bytes);
        if let Some(sha512) = &mut self.sha512 {
            sha512.update(bytes);
        }
    }

    /// Ends.
    pub fn finish(self) -> Digests {
        Digests {
            sha256: Digest::from_bytes(DigestAlgorithm::Sha256, self.sha256.finish().as_ref()),
            sha512: self.sha512.map(|context| Digest::from_bytes(DigestAlgorithm::Sha512, context.finish().as_ref())),
            chunks: self.chunks.finish(),
        }
    }
}

impl Digests {
    /// The digest of that algorithm, if it was computed.
    pub fn of(&self, algorithm: DigestAlgorithm) -> Option<&Digest> {
        match algorithm {
            DigestAlgorithm::Sha256 => Some(&self.sha256),
            DigestAlgorithm::Sha512 => self.sha512.as_ref(),
        }
    }
}

/// The SHA-256 of a short text, in hexadecimal.
pub(super) fn sha256_hex(bytes: &[u8]) -> String {
    Digest::from_bytes(DigestAlgorithm::Sha256, digest(&SHA256, bytes).as_ref()).hex().to_owned()
}

/// The SHA-256 of a file. Blocks.
///
/// # Errors
/// `input_output`, the stop of the job.
pub(super) fn hash_file(path: &Path, progress: &Progress) -> Result<Digest> {
    let failed = |error| Error::io("reading", path, error);
    let mut file = File::open(path).map_err(failed)?;
    let (mut hasher, mut buffer) = (Hasher::new(None), vec![0; FILE_CHUNK]);
    loop {
        progress.check()?;
        let count = file.read(&mut buffer).map_err(failed)?;
        if count == 0 {
            return Ok(hasher.finish().sha256);
        }
        hasher.update(&buffer[..count]);
        progress.advance(count as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn computes_what_is_asked() {
        let mut hasher = Hasher::new(None);
        hasher.update(b"a");
        hasher.update(b"bc");
        let digests = hasher.finish();
        // FIPS 180-2, appendix B.1.
        assert_eq!(digests.sha256.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digests.sha512, None);
        let wide = Digest::new(DigestAlgorithm::Sha512, &"0".repeat(128)).unwrap();
        let mut hasher = Hasher::new(Some(&wide));
        hasher.update(b"abc");
        // FIPS 180-2, appendix C.1.
        assert!(hasher.finish().sha512.unwrap().hex().starts_with("ddaf35a193617abacc417349ae204131"));
    }
}
