//! Where an image's stored bytes come from: a file here, a remote object elsewhere.
//!
//! It leaves out what the bytes mean.

use std::{
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use lvp_api::ErrorCode;
use rustix::{
    fs::{Advice, SeekFrom, fadvise, seek},
    io::Errno,
};

use crate::{
    error::{Error, Result},
    progress::Progress,
    watermark::Watermark,
};

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

    /// Drops what the page cache holds of a range; only advice, and nothing where there is no such cache.
    fn forget(&self, _offset: u64, _length: u64) {}

    /// What to call it in an error: a path or a URL.
    fn name(&self) -> String;
}

/// A file's bytes. Its length is that of the moment when it was opened.
pub struct FileBytes {
    file: File,
    /// Where they begin in the file.
    start: u64,
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
        Ok(Self::new(file, path.to_owned(), length))
    }

    /// The `length` bytes of a volume, which begin at `start` of a file or a block device, as its device has them: what the page cache holds
    /// of it is dropped first.
    ///
    /// # Errors
    /// `input_output`.
    pub fn of_volume(path: &Path, start: u64, length: u64) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io("opening", path, error))?;
        let bytes = Self { start, ..Self::new(file, path.to_owned(), length) };
        bytes.forget(0, length);
        Ok(bytes)
    }

    fn new(file: File, path: PathBuf, length: u64) -> Self {
        // Only advice: a file system that does not take it reads as well, if slower.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        Self { file, start: 0, length, path }
    }
}

impl Bytes for FileBytes {
    fn len(&self) -> u64 {
        self.length
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buffer, self.start + offset).map_err(|error| Error::io("reading", &self.path, error))
    }

    fn data_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let failed = |error: Errno| Error::io("finding data in", &self.path, error.into());
        if offset >= self.length {
            return Ok(None);
        }
        let start = match seek(&self.file, SeekFrom::Data(self.start + offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL) => return Ok(Some(offset..self.length)),
            Err(error) => return Err(failed(error)),
        };
        let end = seek(&self.file, SeekFrom::Hole(start)).map_err(failed)?;
        let (start, end) = (start - self.start, (end - self.start).min(self.length));
        Ok((start < end).then_some(start..end))
    }

    fn forget(&self, offset: u64, length: u64) {
        let _ = fadvise(&self.file, self.start + offset, std::num::NonZeroU64::new(length), Advice::DontNeed);
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// A file's bytes while it is filled or checked: a read waits until the mark says that what it reads is good.
pub struct GrowingBytes {
    file: FileBytes,
    mark: Arc<Watermark>,
    progress: Progress,
    /// Whether all of the file is there, so that its holes are known.
    whole: bool,
}

impl GrowingBytes {
    /// A file that is being filled and will have `length` bytes; `path` is for errors.
    pub fn filling(file: File, path: PathBuf, length: u64, mark: Arc<Watermark>, progress: Progress) -> Self {
        Self { file: FileBytes::new(file, path, length), mark, progress, whole: false }
    }

    /// A file that is there and being checked.
    ///
    /// # Errors
    /// As [`FileBytes::open`].
    pub fn checking(path: &Path, mark: Arc<Watermark>, progress: Progress) -> Result<Self> {
        Ok(Self { file: FileBytes::open(path)?, mark, progress, whole: true })
    }
}

impl Bytes for GrowingBytes {
    fn len(&self) -> u64 {
        self.file.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let end = offset.saturating_add(buffer.len() as u64);
        self.mark.wait(end, &self.progress)?;
        // A file that its writer begins again is shorter than it was: then the mark says why.
        self.file.read_exact_at(buffer, offset).map_err(|error| self.mark.failure().unwrap_or(error))
    }

    fn data_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        if self.whole { self.file.data_after(offset) } else { Ok((offset < self.len()).then(|| offset..self.len())) }
    }

    fn name(&self) -> String {
        self.file.name()
    }
}
