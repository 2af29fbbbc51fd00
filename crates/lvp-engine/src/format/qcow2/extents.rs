//! The map of a qcow2 image as a walk over its tables: one L2 table in memory, neighbours joined.

use super::{
    super::{Content, Extent, bytes::Bytes},
    header::Header,
    tables::{Cluster, Table, cluster, l2_offset},
};
use crate::error::Result;

/// The extents of the disk in order, without gaps.
pub struct Extents<'a> {
    bytes: &'a dyn Bytes,
    header: &'a Header,
    l1: Table<'a>,
    /// The L2 table that maps `at`, if `at` is in one.
    l2: Vec<u8>,
    l2_index: Option<u64>,
    /// Where the next piece begins.
    at: u64,
    /// The extent that the next piece may still be joined to.
    pending: Option<Extent>,
    failed: bool,
}

impl<'a> Extents<'a> {
    pub fn new(bytes: &'a dyn Bytes, header: &'a Header) -> Self {
        let l1 = Table::new(bytes, header.l1_offset, header.l1_entries);
        Self { bytes, header, l1, l2: Vec::new(), l2_index: None, at: 0, pending: None, failed: false }
    }

    /// The part of the disk from `at` that one entry, or one run of equal parts of a cluster, maps.
    fn piece(&mut self) -> Result<Extent> {
        let header = self.header;
        let index = self.at / header.l2_reach();
        let in_table = self.at % header.l2_reach();
        if self.l2_index != Some(index) {
            let entry = self.l1.entry(index)?;
            let Some(offset) = l2_offset(self.bytes, header, index, entry)? else {
                return Ok(self.extent(header.l2_reach() - in_table, Content::Zero));
            };
            self.l2.resize(header.cluster_size() as usize, 0);
            self.bytes.read_exact_at(&mut self.l2, offset)?;
            self.l2_index = Some(index);
        }
        let in_cluster = in_table % header.cluster_size();
        let entry = (in_table >> header.cluster_bits) * header.l2_entry_size();
        let guest = self.at - in_cluster;
        Ok(match cluster(self.bytes, header, guest, &self.l2[entry as usize..])? {
            // An image has no file below: the gate refuses it.
            Cluster::Absent | Cluster::Zero => self.extent(header.cluster_size(), Content::Zero),
            Cluster::Compressed { stored, length } => {
                self.extent(header.cluster_size(), Content::Compressed { stored, stored_length: length })
            }
            Cluster::Allocated { stored, data } => {
                let part = header.cluster_size() / 32;
                let (is_data, parts) = run(data, (in_cluster / part) as u32);
                let content = if is_data { Content::Plain { stored: stored + in_cluster } } else { Content::Zero };
                self.extent(u64::from(parts) * part, content)
            }
        })
    }

    fn extent(&self, length: u64, content: Content) -> Extent {
        Extent { guest: self.at, length: length.min(self.header.virtual_size - self.at), content }
    }
}

/// The run of equal bits from this one: whether they are set, and how many.
fn run(bits: u32, from: u32) -> (bool, u32) {
    let rest = bits >> from;
    let left = 32 - from;
    if rest & 1 == 1 { (true, rest.trailing_ones().min(left)) } else { (false, rest.trailing_zeros().min(left)) }
}

/// `first` and `second`, which follows it, as one, where they are stored alike.
fn joined(first: &Extent, second: &Extent) -> Option<Extent> {
    let alike = match (first.content, second.content) {
        (Content::Zero, Content::Zero) => true,
        (Content::Plain { stored }, Content::Plain { stored: next }) => stored.checked_add(first.length) == Some(next),
        _ => false,
    };
    alike.then(|| Extent { length: first.length + second.length, ..*first })
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Result<Extent>> {
        while !self.failed && self.at < self.header.virtual_size {
            let piece = match self.piece() {
                Ok(piece) => piece,
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            };
            self.at += piece.length;
            match self.pending.take() {
                None => self.pending = Some(piece),
                Some(pending) => match joined(&pending, &piece) {
                    Some(both) => self.pending = Some(both),
                    None => {
                        self.pending = Some(piece);
                        return Some(Ok(pending));
                    }
                },
            }
        }
        if self.failed { None } else { self.pending.take().map(Ok) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_parts() {
        assert_eq!(run(u32::MAX, 0), (true, 32));
        assert_eq!(run(0, 0), (false, 32));
        assert_eq!(run(0b1100, 0), (false, 2));
        assert_eq!(run(0b1100, 2), (true, 2));
        assert_eq!(run(0b1100, 4), (false, 28));
        assert_eq!(run(1 << 31, 31), (true, 1));
    }

    #[test]
    fn neighbours_are_joined_only_when_stored_alike() {
        let plain = |guest, stored| Extent { guest, length: 512, content: Content::Plain { stored } };
        assert_eq!(joined(&plain(0, 1024), &plain(512, 1536)).map(|extent| extent.length), Some(1024));
        assert_eq!(joined(&plain(0, 1024), &plain(512, 2048)), None);
        let compressed =
            |guest| Extent { guest, length: 512, content: Content::Compressed { stored: 5000, stored_length: 100 } };
        assert_eq!(joined(&compressed(0), &compressed(512)), None);
    }
}
