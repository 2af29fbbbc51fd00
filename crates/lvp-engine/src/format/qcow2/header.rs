//! The header of a qcow2 file and its extensions, and what of it is refused.

use super::super::{
    bytes::Bytes,
    error::{invalid, refused},
};
use crate::error::Result;

/// Length of the header of version 2, and of the least one of version 3.
const LENGTH_V2: u64 = 72;
const LENGTH_V3: u64 = 104;
/// QEMU's own bounds (block/qcow2.h): QCOW_MAX_L1_SIZE, QCOW_MAX_REFTABLE_SIZE, QCOW_MAX_SNAPSHOTS.
const L1_BYTES_LIMIT: u64 = 32 << 20;
const REFCOUNT_TABLE_LIMIT: u64 = 8 << 20;
const SNAPSHOTS_LIMIT: u32 = 65536;
/// The first cluster holds the header's extensions; so much of it is read at once.
const FIRST_READ: u64 = 64 << 10;

/// Header extensions by their type numbers.
const EXTENSION_END: u32 = 0;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;

/// Incompatible features by their bits.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// Autoclear feature: the data file is a raw disk by itself. Only for images that have one (specification, Autoclear
/// features).
const RAW_DATA_FILE: u64 = 1 << 1;
const KNOWN_FEATURES: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, without zlib's header.
    Deflate,
    /// Zstandard frames.
    Zstd,
}

/// The part of the header that reading needs, with all bounds checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    pub cluster_bits: u32,
    pub virtual_size: u64,
    pub l1_offset: u64,
    pub l1_entries: u64,
    pub refcount_table_offset: u64,
    pub refcount_table_bytes: u64,
    pub extended_l2: bool,
    pub compression: Compression,
    /// Length of the whole file.
    pub stored_size: u64,
}

/// The fields of the header as they stand in the file.
struct Fields {
    bytes: [u8; 112],
}

impl Fields {
    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(std::array::from_fn(|index| self.bytes[at + index]))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(std::array::from_fn(|index| self.bytes[at + index]))
    }
}

impl Header {
    /// Reads and checks the header of a file that begins with qcow2's magic.
    pub fn read(bytes: &dyn Bytes) -> Result<Self> {
        Self::read_checked(bytes, false)
    }

    /// As [`read`](Self::read), of a file that may name a file below. What it names is not looked at: it is the caller's to
    /// know what is below.
    pub fn read_overlay(bytes: &dyn Bytes) -> Result<Self> {
        Self::read_checked(bytes, true)
    }

    fn read_checked(bytes: &dyn Bytes, may_be_overlay: bool) -> Result<Self> {
        let fields = read_fields(bytes)?;
        let version = fields.u32(4);
        if !matches!(version, 2 | 3) {
            return Err(refused(bytes, format!("it is of qcow2 version {version}, and only 2 and 3 are known")));
        }
        let cluster_bits = fields.u32(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(invalid(
                bytes,
                format!("its clusters would be of 2^{cluster_bits} bytes, where 2^9 to 2^21 are possible"),
            ));
        }
        check_other_files(bytes, &fields, may_be_overlay)?;
        let features = if version == 2 { 0 } else { fields.u64(72) };
        check_features(bytes, features)?;
        if version == 3 && fields.u64(88) & RAW_DATA_FILE != 0 {
            return Err(invalid(bytes, "it says that its data file is raw, and it has none"));
        }
        // A subcluster is a 32nd of a cluster, and not less than a sector.
        if features & EXTENDED_L2 != 0 && cluster_bits < 14 {
            return Err(invalid(
                bytes,
                format!("its clusters of 2^{cluster_bits} bytes are too small for extended L2 entries"),
            ));
        }
        let header = Self {
            version,
            cluster_bits,
            virtual_size: fields.u64(24),
            l1_offset: fields.u64(40),
            l1_entries: u64::from(fields.u32(36)),
            refcount_table_offset: fields.u64(48),
            refcount_table_bytes: u64::from(fields.u32(56)) << cluster_bits,
            extended_l2: features & EXTENDED_L2 != 0,
            compression: compression(bytes, &fields, features)?,
            stored_size: bytes.len(),
        };
        let length = header_length(bytes, &fields, header.cluster_size())?;
        check_extensions(bytes, length, header.cluster_size())?;
        header.check_refcounts(bytes, &fields)?;
        header.check_snapshots(bytes, &fields)?;
        header.check_sizes(bytes)?;
        Ok(header)
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an entry of an L2 table.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// How many bytes of the disk one L2 table maps.
    pub fn l2_reach(&self) -> u64 {
        (self.cluster_size() / self.l2_entry_size()) << self.cluster_bits
    }

    /// How many entries of the L1 table map the disk; more may be there, for the state of a running machine.
    pub fn l1_used(&self) -> u64 {
        self.virtual_size.div_ceil(self.l2_reach())
    }

    /// Whether so many bytes from here lie in the file.
    pub fn holds(&self, offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.stored_size)
    }

    /// Whether an offset is one of a cluster.
    pub fn is_cluster(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.cluster_size())
    }

    fn check_refcounts(&self, bytes: &dyn Bytes, fields: &Fields) -> Result<()> {
        let order = if self.version == 2 { 4 } else { fields.u32(96) };
        if order > 6 {
            return Err(invalid(bytes, format!("its refcounts would be of 2^{order} bits, where 2^6 are the most")));
        }
        if self.refcount_table_bytes == 0 || self.refcount_table_bytes > REFCOUNT_TABLE_LIMIT {
            return Err(invalid(
                bytes,
                format!(
                    "its refcount table has {} bytes, where more than 0 and at most {REFCOUNT_TABLE_LIMIT} are possible",
                    self.refcount_table_bytes
                ),
            ));
        }
        self.check_table(bytes, "refcount table", self.refcount_table_offset, self.refcount_table_bytes)
    }

    fn check_snapshots(&self, bytes: &dyn Bytes, fields: &Fields) -> Result<()> {
        let (count, offset) = (fields.u32(60), fields.u64(64));
        if count > SNAPSHOTS_LIMIT {
            return Err(invalid(
                bytes,
                format!("it has {count} snapshots, and at most {SNAPSHOTS_LIMIT} are possible"),
            ));
        }
        // 40 bytes is the least that a snapshot's entry has.
        if count == 0 { Ok(()) } else { self.check_table(bytes, "snapshot table", offset, u64::from(count) * 40) }
    }

    fn check_sizes(&self, bytes: &dyn Bytes) -> Result<()> {
        if self.virtual_size == 0 {
            return Err(invalid(bytes, "its disk has no bytes"));
        }
        let l1_bytes = self.l1_entries * 8;
        if l1_bytes > L1_BYTES_LIMIT {
            return Err(invalid(
                bytes,
                format!("its L1 table has {l1_bytes} bytes, and at most {L1_BYTES_LIMIT} are possible"),
            ));
        }
        if self.l1_entries < self.l1_used() {
            return Err(invalid(
                bytes,
                format!(
                    "its L1 table has {} entries, and its virtual size of {} bytes needs {}",
                    self.l1_entries,
                    self.virtual_size,
                    self.l1_used()
                ),
            ));
        }
        self.check_table(bytes, "L1 table", self.l1_offset, l1_bytes)
    }

    fn check_table(&self, bytes: &dyn Bytes, what: &str, offset: u64, length: u64) -> Result<()> {
        if offset == 0 || !self.is_cluster(offset) {
            return Err(invalid(bytes, format!("its {what} at {offset} does not begin on a cluster")));
        }
        if !self.holds(offset, length) {
            return Err(invalid(
                bytes,
                format!(
                    "its {what} of {length} bytes at {offset} is outside the file of {} bytes (truncated?)",
                    self.stored_size
                ),
            ));
        }
        Ok(())
    }
}

/// The fixed part; fields that the file's version does not have are zero.
fn read_fields(bytes: &dyn Bytes) -> Result<Fields> {
    let mut fields = Fields { bytes: [0; 112] };
    let there = bytes.len().min(fields.bytes.len() as u64) as usize;
    bytes.read_exact_at(&mut fields.bytes[..there], 0)?;
    let needed = if there >= 8 && fields.u32(4) == 3 { LENGTH_V3 } else { LENGTH_V2 };
    if bytes.len() < needed {
        return Err(invalid(bytes, format!("its {} bytes are less than a header (truncated?)", bytes.len())));
    }
    Ok(fields)
}

/// Encryption and the file below: named in the fixed part.
fn check_other_files(bytes: &dyn Bytes, fields: &Fields, may_be_overlay: bool) -> Result<()> {
    if fields.u64(8) != 0 && !may_be_overlay {
        return Err(refused(bytes, "it needs a backing file"));
    }
    if fields.u32(32) != 0 {
        return Err(refused(bytes, "it is encrypted"));
    }
    Ok(())
}

fn check_features(bytes: &dyn Bytes, features: u64) -> Result<()> {
    if features & CORRUPT != 0 {
        return Err(invalid(bytes, "it is marked as corrupt"));
    }
    if features & DIRTY != 0 {
        return Err(refused(bytes, "it is marked as dirty: it was not closed after it was written"));
    }
    if features & DATA_FILE != 0 {
        return Err(refused(bytes, "its data is in another file"));
    }
    let unknown = features & !KNOWN_FEATURES;
    if unknown != 0 {
        let bits: Vec<String> =
            (0..64).filter(|bit| unknown & (1 << bit) != 0).map(|bit: u32| bit.to_string()).collect();
        return Err(refused(bytes, format!("it uses unknown incompatible features (bits {})", bits.join(", "))));
    }
    Ok(())
}

fn compression(bytes: &dyn Bytes, fields: &Fields, features: u64) -> Result<Compression> {
    let announced = features & COMPRESSION_TYPE != 0;
    let has_field = fields.u32(4) == 3 && u64::from(fields.u32(100)) > LENGTH_V3;
    let compression = match if has_field { fields.bytes[104] } else { 0 } {
        0 => Compression::Deflate,
        1 => Compression::Zstd,
        other => return Err(refused(bytes, format!("its compression type {other} is not known"))),
    };
    if announced != (compression != Compression::Deflate) {
        return Err(invalid(bytes, "its compression type contradicts its incompatible features"));
    }
    Ok(compression)
}

fn header_length(bytes: &dyn Bytes, fields: &Fields, cluster_size: u64) -> Result<u64> {
    if fields.u32(4) == 2 {
        return Ok(LENGTH_V2);
    }
    let length = u64::from(fields.u32(100));
    if length < LENGTH_V3 || length > cluster_size || !length.is_multiple_of(8) {
        return Err(invalid(bytes, format!("its header says to have {length} bytes")));
    }
    Ok(length)
}

/// Walks the extensions between the header and the end of the first cluster: each has a type, a length, and data that
/// is padded to 8 bytes.
fn check_extensions(bytes: &dyn Bytes, from: u64, cluster_size: u64) -> Result<()> {
    let end = cluster_size.min(bytes.len());
    let mut window = Window::new(bytes, end);
    let mut at = from;
    while at + 8 <= end {
        let (kind, length) = (window.u32(at)?, u64::from(window.u32(at + 4)?));
        at += 8;
        // QEMU holds the length of the end's, too, against what is there.
        if length > end - at {
            return Err(invalid(bytes, format!("the header extension {kind:#010x} passes the first cluster")));
        }
        match kind {
            EXTENSION_END => return Ok(()),
            EXTENSION_DATA_FILE => return Err(refused(bytes, "its data is in another file")),
            EXTENSION_ENCRYPTION => return Err(refused(bytes, "it is encrypted")),
            _ => at += length.next_multiple_of(8),
        }
    }
    Ok(())
}

/// The first cluster, read in few and bounded pieces.
struct Window<'a> {
    bytes: &'a dyn Bytes,
    end: u64,
    start: u64,
    part: Vec<u8>,
}

impl<'a> Window<'a> {
    fn new(bytes: &'a dyn Bytes, end: u64) -> Self {
        Self { bytes, end, start: 0, part: Vec::new() }
    }

    /// The number at `at`; four bytes from there lie before the end.
    fn u32(&mut self, at: u64) -> Result<u32> {
        if at < self.start || at + 4 > self.start + self.part.len() as u64 {
            self.start = at;
            self.part.resize((self.end - at).min(FIRST_READ) as usize, 0);
            self.bytes.read_exact_at(&mut self.part, at)?;
        }
        let index = (at - self.start) as usize;
        Ok(u32::from_be_bytes(std::array::from_fn(|byte| self.part[index + byte])))
    }
}
