//! What the fuzz targets share: files in memory that notice every read outside of them ([`Pages`]), a
//! small image around one compressed cluster ([`around_cluster`]), and what every accepted image must keep ([`walk`]).
//!
//! It leaves out the targets: one file each in `fuzz_targets/`, which says what it holds.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use lvp_api::{ErrorCode, ImageFormat};
use lvp_engine::{
    Error, Result,
    format::{Bytes, Content, Image},
};

/// A file in memory, in pages of which only the begins are given; the rest of each is zero. So a few bytes are large
/// clusters. A read outside of it is a panic.
pub struct Pages {
    /// Bytes of a page.
    page: u64,
    begins: Vec<Vec<u8>>,
    length: u64,
    read: AtomicU64,
}

impl Pages {
    /// How much of each page of a [`stretched`](Self::stretched) file is given.
    const GIVEN: usize = 512;
    /// The largest file that is made: walking its tables must stay quick.
    const LARGEST: u64 = 8 << 20;

    fn new(page: u64, begins: Vec<Vec<u8>>, length: u64) -> Self {
        Self { page, begins, length, read: AtomicU64::new(0) }
    }

    /// Exactly these bytes.
    pub fn whole(bytes: &[u8]) -> Self {
        let length = bytes.len() as u64;
        Self::new(length.max(1), vec![bytes.to_vec()], length)
    }

    /// The bytes as the begins of the clusters of a qcow2 file, 512 of each; the size of a cluster is the header's.
    /// None where it is not possible, or the file would be too large to walk quickly.
    pub fn stretched(bytes: &[u8]) -> Option<Self> {
        let bits = u32::from_be_bytes(bytes.get(20..24)?.try_into().ok()?);
        let page = if (9..=21).contains(&bits) { 1 << bits } else { return None };
        let begins: Vec<Vec<u8>> = bytes.chunks(Self::GIVEN).map(<[u8]>::to_vec).collect();
        let length = begins.len() as u64 * page;
        (length <= Self::LARGEST).then(|| Self::new(page, begins, length))
    }

    /// How many bytes were read, each as often as it was.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }
}

impl Bytes for Pages {
    fn len(&self) -> u64 {
        self.length
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let range = inside(offset, buffer.len(), self.length);
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        buffer.fill(0);
        for index in range.start / self.page..range.end.div_ceil(self.page) {
            let (begin, start) = (&self.begins[index as usize], index * self.page);
            let from = range.start.max(start);
            let to = range.end.min(start + begin.len() as u64);
            if from < to {
                let part = &begin[(from - start) as usize..(to - start) as usize];
                buffer[(from - range.start) as usize..(to - range.start) as usize].copy_from_slice(part);
            }
        }
        Ok(())
    }

    fn name(&self) -> String {
        "fuzzed.qcow2".to_owned()
    }
}

fn inside(offset: u64, length: usize, size: u64) -> Range<u64> {
    let end = offset.checked_add(length as u64).filter(|end| *end <= size);
    let end = end.unwrap_or_else(|| panic!("a read of {length} bytes at {offset}, outside the {size} bytes"));
    offset..end
}

/// A qcow2 file whose disk is one compressed cluster with these stored bytes.
pub fn around_cluster(cluster_bits: u32, zstd: bool, stored: &[u8]) -> Pages {
    const COMPRESSED: u64 = 1 << 62;
    let page: u64 = 1 << cluster_bits;
    let mut header = vec![0; 112];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &cluster_bits.to_be_bytes());
    put(24, &page.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(2 * page).to_be_bytes());
    put(48, &page.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(72, &u64::to_be_bytes(if zstd { 1 << 3 } else { 0 }));
    put(96, &4_u32.to_be_bytes());
    put(100, &112_u32.to_be_bytes());
    put(104, &[u8::from(zstd)]);
    let sectors = (stored.len().div_ceil(512) as u64).saturating_sub(1);
    let entry = COMPRESSED | sectors << (62 - (cluster_bits - 8)) | 4 * page;
    let mut begins = vec![header, Vec::new(), (3 * page).to_be_bytes().to_vec(), entry.to_be_bytes().to_vec()];
    begins.extend(stored.chunks(page as usize).map(<[u8]>::to_vec));
    let length = begins.len() as u64 * page;
    Pages::new(page, begins, length)
}

/// An image as an input: a byte, and after it the file (where the byte is even) or the begins of its clusters (where it
/// is odd). Gives the rest of the byte too, for the target's own choices.
pub fn image(input: &[u8]) -> Option<(u8, Arc<Pages>)> {
    let (choice, input) = input.split_first()?;
    let pages = if choice % 2 == 0 { Pages::whole(input) } else { Pages::stretched(input)? };
    Some((choice / 2, Arc::new(pages)))
}

/// Opens an image; none when it is refused, with one of the codes that say so.
pub fn opened(bytes: Arc<dyn Bytes>, format: ImageFormat) -> Option<Image> {
    Image::open(bytes, format).map_err(|error| assert_refusal(&error)).ok()
}

/// Fails unless an error says that the image is at fault, and that trying again is no use.
pub fn assert_refusal(error: &Error) {
    let known = [ErrorCode::ImageInvalid, ErrorCode::ImageRefused, ErrorCode::ImageTypeMismatch];
    assert!(known.contains(&error.code()) && !error.retryable(), "{error:?}");
}

/// The size of the disk in a qcow2 image, which always says it.
pub fn disk_size(image: &Image) -> u64 {
    image.virtual_size().expect("a qcow2 image says how large its disk is")
}

/// Looks at every extent of an accepted image of so many stored bytes: in order, without gaps, inside the disk and the
/// file.
pub fn walk(image: &Image, stored_size: u64) {
    let (mut at, mut data) = (0, 0);
    let cluster = image.cluster_size();
    for extent in image.extents() {
        let extent = extent.expect("what the gate lets through can be walked");
        assert_eq!(extent.guest, at, "extents have no gaps");
        assert!(extent.length > 0 && extent.length <= disk_size(image) - at, "{extent:?}");
        at += extent.length;
        match extent.content {
            Content::Zero => {}
            Content::Plain { stored } => {
                assert!(stored < stored_size, "{extent:?} begins outside the file");
                data += extent.length;
            }
            Content::Compressed { stored, stored_length } => {
                assert!(stored < stored_size, "{extent:?} begins outside the file");
                assert!(stored_length > 0 && stored_length <= 2 * cluster, "{extent:?}");
                assert!(extent.guest % cluster == 0 && extent.length <= cluster, "{extent:?}");
                data += extent.length;
            }
        }
    }
    assert_eq!(at, disk_size(image), "extents are the whole disk");
    assert_eq!(data, image.data_bytes());
}
