//! Where an image's stored bytes come from: a file here, a remote object elsewhere.
//!
//! It leaves out what the bytes mean.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use lvp_api::ErrorCode;
use rustix::{
    fs::{Advice, SeekFrom, fadvise, seek},
    io::Errno,
};

use crate::error::{Error, Result};

/// The stored bytes of an image, readable anywhere by many threads at once. Reads block.
pub trait Bytes: Send + Sync {
    /// How many bytes there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When they cannot be read, or end before the buffer is full.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()>;

    /// The first run of bytes at or after `offset` that may be other than zero; none when only zeros follow. Without
    /// knowledge of holes that is everything up to the end.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn data_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        Ok((offset < self.len()).then(|| offset..self.len()))
    }

    /// What to call it in an error: a path or a URL.
    fn name(&self) -> String;
}

/// A file's bytes. Its length is that of the moment when it was opened.
pub struct FileBytes {
    file: File,
    length: u64,
    path: PathBuf,
}

impl FileBytes {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// `input_output` when it is not a regular file or cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let opening = |error| Error::io("opening", path, error);
        // Asked before opening: to open a named pipe would wait for its writer.
        if !path.metadata().map_err(opening)?.is_file() {
            return Err(Error::new(ErrorCode::InputOutput, format!("{} is not a regular file", path.display())));
        }
        let file = File::open(path).map_err(opening)?;
        let length = file.metadata().map_err(opening)?.len();
        // Only advice: a file system that does not take it reads as well, if slower.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        Ok(Self { file, length, path: path.to_owned() })
    }
}

impl Bytes for FileBytes {
    fn len(&self) -> u64 {
        self.length
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, offset).map_err(|error| Error::io("reading", &self.path, error))
    }

    fn data_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let failed = |error: Errno| Error::io("finding data in", &self.path, error.into());
        if offset >= self.length {
            return Ok(None);
        }
        let start = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL) => return Ok(Some(offset..self.length)),
            Err(error) => return Err(failed(error)),
        };
        let end = seek(&self.file, SeekFrom::Hole(start)).map_err(failed)?.min(self.length);
        Ok((start < end).then_some(start..end))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}
