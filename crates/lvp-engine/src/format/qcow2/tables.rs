//! The two levels of tables that map the disk: each entry decoded and checked by itself, tables read one window at a
//! time.

use super::{
    super::{bytes::Bytes, error::invalid},
    header::Header,
};
use crate::error::Result;

/// The offset in an entry of the L1 table and in a standard entry of an L2 table: bits 9 to 55.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// L2: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// L2, version 3, without extended entries: the cluster reads as zero.
const ZERO: u64 = 1 << 0;
/// Entries of the L1 or refcount table that are read at once, in bytes.
const WINDOW: u64 = 64 << 10;

/// What an entry of an L2 table says of its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing is said of it: it is what the file below has, or zero where there is none.
    Absent,
    /// It reads as zero and has no place in the file.
    Zero,
    /// It has a place in the file. Each bit is a 32nd of the cluster, the lowest one first, and says whether it is
    /// stored there; the others read as zero.
    Allocated { stored: u64, data: u32 },
    /// It is compressed: where from, and how long at most.
    Compressed { stored: u64, length: u64 },
}

/// A table of 8-byte entries, read a window at a time.
pub struct Table<'a> {
    bytes: &'a dyn Bytes,
    offset: u64,
    entries: u64,
    first: u64,
    window: Vec<u8>,
}

impl<'a> Table<'a> {
    /// The table of so many entries at this offset, which lies in the file.
    pub fn new(bytes: &'a dyn Bytes, offset: u64, entries: u64) -> Self {
        Self { bytes, offset, entries, first: 0, window: Vec::new() }
    }

    /// The entry of this index, which is below the number of entries.
    pub fn entry(&mut self, index: u64) -> Result<u64> {
        let there = self.window.len() as u64 / 8;
        if index < self.first || index >= self.first + there {
            self.first = index;
            self.window.resize(((self.entries - index) * 8).min(WINDOW) as usize, 0);
            self.bytes.read_exact_at(&mut self.window, self.offset + index * 8)?;
        }
        Ok(number(&self.window, (index - self.first) as usize * 8))
    }

    /// The entry of this index, without a window for those behind it.
    fn only(&self, index: u64) -> Result<u64> {
        let mut entry = [0; 8];
        self.bytes.read_exact_at(&mut entry, self.offset + index * 8)?;
        Ok(u64::from_be_bytes(entry))
    }
}

/// The offset of the L2 table of this entry of the L1 table; none where it maps nothing.
pub fn l2_offset(bytes: &dyn Bytes, header: &Header, index: u64, entry: u64) -> Result<Option<u64>> {
    let offset = entry & OFFSET;
    if offset == 0 {
        return Ok(None);
    }
    if !header.is_cluster(offset) {
        return Err(invalid(bytes, format!("its L2 table {index} at {offset} does not begin on a cluster")));
    }
    if !header.holds(offset, header.cluster_size()) {
        return Err(invalid(
            bytes,
            format!(
                "its L2 table {index} at {offset} is outside the file of {} bytes (truncated?)",
                header.stored_size
            ),
        ));
    }
    Ok(Some(offset))
}

/// The cluster that has this offset of the disk, by a read of its entry in each of the two levels; `None` where no table maps
/// it, nor its neighbours.
pub fn cluster_at(bytes: &dyn Bytes, header: &Header, guest: u64) -> Result<Option<Cluster>> {
    let index = guest / header.l2_reach();
    let l1_entry = Table::new(bytes, header.l1_offset, header.l1_entries).only(index)?;
    let Some(table) = l2_offset(bytes, header, index, l1_entry)? else { return Ok(None) };
    let size = header.l2_entry_size();
    let mut entry = [0; 16];
    let entry = &mut entry[..size as usize];
    bytes.read_exact_at(entry, table + ((guest % header.l2_reach()) >> header.cluster_bits) * size)?;
    cluster(bytes, header, guest - guest % header.cluster_size(), entry).map(Some)
}

/// Decodes the entry at the begin of `entry`, for the cluster at this offset of the disk.
pub fn cluster(bytes: &dyn Bytes, header: &Header, guest: u64, entry: &[u8]) -> Result<Cluster> {
    let first = number(entry, 0);
    let bitmap = if header.extended_l2 { Some(number(entry, 8)) } else { None };
    decoded(header, first, bitmap)
        .map_err(|what| invalid(bytes, format!("the entry for the cluster at {guest} of its disk {what}")))
}

fn decoded(header: &Header, entry: u64, bitmap: Option<u64>) -> std::result::Result<Cluster, &'static str> {
    if entry & COMPRESSED != 0 {
        return match bitmap {
            Some(1..) => Err("says of a compressed cluster which parts of it are there"),
            _ => compressed(header, entry),
        };
    }
    let offset = entry & OFFSET;
    if !header.is_cluster(offset) {
        return Err("points between two clusters");
    }
    let data = match bitmap {
        None if entry & ZERO == 0 => u32::MAX,
        None if header.version < 3 => return Err("marks a zero cluster, which version 2 does not have"),
        None => 0,
        Some(bitmap) => subclusters(bitmap, offset)?,
    };
    if offset == 0 {
        // Of parts of a cluster it is not told which are absent: no overlay of ours has those.
        return Ok(if bitmap.is_none() && data != 0 { Cluster::Absent } else { Cluster::Zero });
    }
    if data != 0 && offset >= header.stored_size {
        return Err("points outside the file (truncated?)");
    }
    Ok(Cluster::Allocated { stored: offset, data })
}

/// Which parts of a cluster hold data. The lower half of the bitmap says which are allocated, the upper half which read
/// as zero; a part cannot be both.
fn subclusters(bitmap: u64, offset: u64) -> std::result::Result<u32, &'static str> {
    let allocated = bitmap as u32;
    let zero = (bitmap >> 32) as u32;
    if allocated & zero != 0 {
        return Err("says of a part of it both that it is stored and that it is zero");
    }
    if allocated != 0 && offset == 0 {
        return Err("says of a part of it that it is stored, but not where");
    }
    Ok(allocated)
}

/// The descriptor of a compressed cluster: the offset in its low bits, in the others the number of sectors of 512 bytes
/// after the first that the data touches.
fn compressed(header: &Header, entry: u64) -> std::result::Result<Cluster, &'static str> {
    let offset_bits = 62 - (header.cluster_bits - 8);
    let stored = entry & ((1 << offset_bits) - 1);
    let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
    if stored >= header.stored_size {
        return Err("points outside the file (truncated?)");
    }
    Ok(Cluster::Compressed { stored, length: sectors * 512 - stored % 512 })
}

/// The big-endian number at `at`.
fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|index| bytes[at + index]))
}
