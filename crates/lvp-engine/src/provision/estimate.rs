//! How long a provision will take, by what others of its kind took before in the same place: the median of their rates.
//!
//! It leaves out what cannot be known before: limits, and what else the host does meanwhile.

use lvp_api::Receipt;

/// So many receipts are looked at, the newest.
pub const RECEIPTS: u32 = 50;

/// What a provision has to do.
#[derive(Debug, Clone, Copy)]
pub struct Work {
    /// Whether the image is fetched.
    pub fetched: bool,
    /// Whether the volume is written; else it is a copy of a base.
    pub is_written: bool,
    /// The size of the image's file, where that is fetched.
    pub bytes_to_fetch: u64,
    /// Where it can be told.
    pub bytes_to_write: Option<u64>,
    /// Likewise.
    pub bytes_to_zero: Option<u64>,
}

impl Work {
    /// What takes the time: fetching and writing overlap.
    fn bytes(&self) -> Option<u64> {
        Some(self.bytes_to_fetch.max(self.bytes_to_write?.saturating_add(self.bytes_to_zero?)))
    }
}

/// The seconds that this work takes, rounded up; none where nothing like it was done before, or it is not known how much it
/// is.
pub fn seconds(receipts: &[Receipt], work: &Work) -> Option<u64> {
    let alike = receipts.iter().filter(|receipt| is_alike(receipt, work));
    if !work.is_written {
        let took: Vec<f64> = alike.map(milliseconds).collect();
        return Some((median(took)? / 1000.0).ceil() as u64);
    }
    let bytes = work.bytes()?;
    let rates = alike.filter_map(|receipt| {
        let (bytes, took) = (bytes_of(receipt) as f64, milliseconds(receipt));
        (bytes > 0.0 && took > 0.0).then(|| bytes / took)
    });
    Some((bytes as f64 / median(rates.collect())? / 1000.0).ceil() as u64)
}

/// Whether what was done is of the same kind: a copy of a base, a hit, or a miss.
fn is_alike(receipt: &Receipt, work: &Work) -> bool {
    let was_written = receipt.bytes_shared == 0 && receipt.linked_to.is_none();
    let was_fetched = receipt.bytes_fetched > 0;
    was_written == work.is_written && (!was_written || was_fetched == work.fetched)
}

fn bytes_of(receipt: &Receipt) -> u64 {
    receipt.bytes_fetched.max(receipt.bytes_written.saturating_add(receipt.bytes_zeroed))
}

fn milliseconds(receipt: &Receipt) -> f64 {
    receipt.stages.iter().map(|stage| stage.milliseconds).sum::<u64>() as f64
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use lvp_api::{ContentDigest, JobId, Stage, StageTime, ZeroPolicy};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn receipt(fetched: u64, written: u64, shared: u64, milliseconds: u64) -> Receipt {
        Receipt {
            job_id: JobId(uuid::Uuid::now_v7()),
            finished_at: Timestamp::UNIX_EPOCH,
            image_digest: format!("sha256:{}", "a".repeat(64)).parse().unwrap(),
            content_digest: format!("blake3:{}", "a".repeat(64)).parse::<ContentDigest>().unwrap(),
            zero: ZeroPolicy::Full,
            volume_bytes: 8 * MIB,
            bytes_fetched: fetched,
            bytes_decoded: written,
            bytes_written: written,
            bytes_zeroed: 0,
            bytes_offloaded: 0,
            bytes_skipped: 0,
            bytes_left: 0,
            bytes_shared: shared,
            linked_to: None,
            stages: vec![StageTime { stage: Stage::Populating, milliseconds }],
        }
    }

    fn work(fetch: u64, write: u64) -> Work {
        Work {
            fetched: fetch > 0,
            is_written: true,
            bytes_to_fetch: fetch,
            bytes_to_write: Some(write),
            bytes_to_zero: Some(0),
        }
    }

    #[test]
    fn the_median_of_the_same_kind_counts() {
        let receipts = [
            receipt(0, 10 * MIB, 0, 1000),
            receipt(0, 10 * MIB, 0, 2000),
            receipt(0, 10 * MIB, 0, 500_000),
            receipt(10 * MIB, 5 * MIB, 0, 10_000),
            receipt(0, 0, 8 * MIB, 1500),
        ];
        assert_eq!(seconds(&receipts, &work(0, 50 * MIB)), Some(10));
        assert_eq!(seconds(&receipts, &work(50 * MIB, 20 * MIB)), Some(50));
        assert_eq!(seconds(&receipts, &work(1, 60 * MIB)), Some(60), "fetch and write overlap");
        assert_eq!(seconds(&receipts, &Work { is_written: false, ..work(0, 0) }), Some(2));
    }

    #[test]
    fn nothing_is_said_where_nothing_is_known() {
        let hits = [receipt(0, 10 * MIB, 0, 1000), receipt(0, 0, 0, 0)];
        assert_eq!(seconds(&[], &work(0, MIB)), None);
        assert_eq!(seconds(&hits, &work(MIB, MIB)), None);
        assert_eq!(seconds(&hits, &Work { bytes_to_write: None, ..work(0, MIB) }), None);
        assert_eq!(seconds(&hits, &Work { is_written: false, ..work(0, 0) }), None);
    }
}
