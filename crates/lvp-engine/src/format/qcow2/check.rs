//! All tables of an image against one another: each inside the file, none over another, none twice, and no data where a
//! table is.
//!
//! Memory is one bit for every cluster of the file, of which only those near tables are touched, and one L2 table.

use super::{
    super::{
        bytes::Bytes,
        error::{invalid, refused},
    },
    header::Header,
    tables::{Cluster, Table, cluster, l2_offset},
};
use crate::error::Result;

/// The most clusters that a file may have: 16 MiB of memory for the set of them. That is a file of 8 TiB with the usual
/// clusters of 64 KiB, and of 64 GiB with the smallest.
const CLUSTERS_LIMIT: u64 = 1 << 27;

/// The cheap part, for before an image is fetched: the offsets in the L1 table.
pub fn check_first_level(bytes: &dyn Bytes, header: &Header) -> Result<()> {
    let mut l1 = Table::new(bytes, header.l1_offset, header.l1_entries);
    for index in 0..header.l1_used() {
        l2_offset(bytes, header, index, l1.entry(index)?)?;
    }
    Ok(())
}

/// Checks all tables of an image, and says how many bytes of its disk are stored.
pub fn check(bytes: &dyn Bytes, header: &Header) -> Result<u64> {
    let mut tables = ClusterSet::new(bytes, header)?;
    tables.claim(0, header.cluster_size(), "header")?;
    tables.claim(header.l1_offset, header.l1_entries * 8, "L1 table")?;
    tables.claim(header.refcount_table_offset, header.refcount_table_bytes, "refcount table")?;
    claim_refcount_blocks(bytes, header, &mut tables)?;
    let mut l1 = Table::new(bytes, header.l1_offset, header.l1_entries);
    for index in 0..header.l1_used() {
        if let Some(offset) = l2_offset(bytes, header, index, l1.entry(index)?)? {
            tables.claim(offset, header.cluster_size(), "L2 table")?;
        }
    }
    let mut l2 = vec![0; header.cluster_size() as usize];
    let mut stored = 0;
    for index in 0..header.l1_used() {
        if let Some(offset) = l2_offset(bytes, header, index, l1.entry(index)?)? {
            bytes.read_exact_at(&mut l2, offset)?;
            stored += check_l2(bytes, header, &tables, index * header.l2_reach(), &l2)?;
        }
    }
    Ok(stored)
}

/// Refcounts are not read, but their blocks are tables too. Bits 0 to 8 of an entry are reserved.
fn claim_refcount_blocks(bytes: &dyn Bytes, header: &Header, tables: &mut ClusterSet) -> Result<()> {
    let entries = header.refcount_table_bytes / 8;
    let mut table = Table::new(bytes, header.refcount_table_offset, entries);
    for index in 0..entries {
        let offset = table.entry(index)? & !0x1ff;
        if offset == 0 {
            continue;
        }
        if !header.is_cluster(offset) || !header.holds(offset, header.cluster_size()) {
            return Err(invalid(bytes, format!("its refcount block at {offset} is not a cluster of the file")));
        }
        tables.claim(offset, header.cluster_size(), "refcount block")?;
    }
    Ok(())
}

/// Checks the entries of one L2 table that map the disk from `first` on, and counts the bytes that are stored.
fn check_l2(bytes: &dyn Bytes, header: &Header, tables: &ClusterSet, first: u64, table: &[u8]) -> Result<u64> {
    let mut stored_bytes = 0;
    let mut guest = first;
    for entry in table.chunks_exact(header.l2_entry_size() as usize) {
        if guest >= header.virtual_size {
            break;
        }
        let used = header.cluster_size().min(header.virtual_size - guest);
        let (stored, length) = match cluster(bytes, header, guest, entry)? {
            Cluster::Absent | Cluster::Zero => (0, 0),
            Cluster::Allocated { stored, data } => {
                let part = header.cluster_size() / 32;
                stored_bytes += match data {
                    u32::MAX => used,
                    0 => 0,
                    _ => (0..32)
                        .filter(|bit| data & (1 << bit) != 0)
                        .map(|bit| used.saturating_sub(bit * part).min(part))
                        .sum(),
                };
                (stored, header.cluster_size())
            }
            Cluster::Compressed { stored, length } => {
                stored_bytes += used;
                (stored, length)
            }
        };
        if tables.touch(stored, length) {
            return Err(invalid(
                bytes,
                format!("the data of the cluster at {guest} of its disk is where a table is, at {stored}"),
            ));
        }
        guest += header.cluster_size();
    }
    Ok(stored_bytes)
}

/// The clusters of the file that hold tables.
struct ClusterSet<'a> {
    bytes: &'a dyn Bytes,
    cluster_bits: u32,
    clusters: u64,
    bits: Vec<u64>,
}

impl<'a> ClusterSet<'a> {
    fn new(bytes: &'a dyn Bytes, header: &Header) -> Result<Self> {
        let clusters = header.stored_size.div_ceil(header.cluster_size());
        if clusters > CLUSTERS_LIMIT {
            return Err(refused(
                bytes,
                format!(
                    "it has {clusters} clusters of {} bytes, and at most {CLUSTERS_LIMIT} are accepted",
                    header.cluster_size()
                ),
            )
            .hint("make it again with larger clusters: `qemu-img convert -O qcow2 -o cluster_size=64k`"));
        }
        let words = clusters.div_ceil(64) as usize;
        Ok(Self { bytes, cluster_bits: header.cluster_bits, clusters, bits: vec![0; words] })
    }

    /// The clusters that a range of the file touches; what passes the file's end is not there.
    fn range(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let end = offset.saturating_add(length).div_ceil(1 << self.cluster_bits).min(self.clusters);
        offset >> self.cluster_bits..end
    }

    /// Notes a table; an error where there is one.
    fn claim(&mut self, offset: u64, length: u64, what: &str) -> Result<()> {
        for cluster in self.range(offset, length) {
            let (word, bit) = ((cluster / 64) as usize, 1 << (cluster % 64));
            if self.bits[word] & bit != 0 {
                return Err(invalid(self.bytes, format!("its {what} at {offset} is where another table is")));
            }
            self.bits[word] |= bit;
        }
        Ok(())
    }

    /// Whether a table is in the range.
    fn touch(&self, offset: u64, length: u64) -> bool {
        self.range(offset, length).any(|cluster| self.bits[(cluster / 64) as usize] & (1 << (cluster % 64)) != 0)
    }
}
