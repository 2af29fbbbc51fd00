//! Which job may run next: pure, so that it can be tested whole.
//!
//! Jobs run in the order of their submission, `limit` at a time, and one at a time per exclusive key (a volume). A job
//! that waits for its key does not hold up those behind it. A key may also be held by something that is no job.

use lvp_api::JobId;

/// A job, as the queue sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its id; ids sort by time.
    pub id: JobId,
    /// What no two running jobs may share.
    pub exclusive: String,
}

/// The next job to run, if one may.
pub fn next<'a>(pending: &'a [Entry], running: &[Entry], held: &[String], limit: usize) -> Option<&'a Entry> {
    if running.len() >= limit {
        return None;
    }
    let mut sorted: Vec<&Entry> = pending.iter().collect();
    sorted.sort_by_key(|entry| entry.id);
    let is_free = |key: &String| running.iter().all(|other| other.exclusive != *key) && !held.contains(key);
    sorted.into_iter().find(|entry| is_free(&entry.exclusive))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn entry(id: u128, volume: &str) -> Entry {
        Entry { id: JobId(Uuid::from_u128(id)), exclusive: volume.to_owned() }
    }

    #[test]
    fn first_come_first_served() {
        let pending = [entry(2, "b"), entry(1, "a")];
        assert_eq!(next(&pending, &[], &[], 2).unwrap().id, entry(1, "a").id);
    }

    #[test]
    fn a_busy_volume_waits_and_lets_others_pass() {
        let pending = [entry(2, "a"), entry(3, "b")];
        assert_eq!(next(&pending, &[entry(1, "a")], &[], 2).unwrap().id, entry(3, "b").id);
        assert_eq!(next(&pending[..1], &[entry(1, "a")], &[], 2), None);
        assert_eq!(next(&pending, &[], &["a".to_owned()], 2).unwrap().id, entry(3, "b").id);
    }

    proptest! {
        /// Whatever is asked, no more run than may, no two on one volume, and all of them run in the end.
        #[test]
        fn the_limits_hold_and_nobody_starves(volumes in prop::collection::vec(0_u8..4, 0..20), limit in 1_usize..4) {
            let mut pending: Vec<Entry> = volumes.iter().enumerate().map(|(i, v)| entry(i as u128, &v.to_string())).collect();
            let mut running: Vec<Entry> = Vec::new();
            let mut finished = 0;
            while finished < volumes.len() {
                while let Some(started) = next(&pending, &running, &[], limit).cloned() {
                    pending.retain(|entry| *entry != started);
                    running.push(started);
                }
                prop_assert!(!running.is_empty() && running.len() <= limit);
                for (i, one) in running.iter().enumerate() {
                    prop_assert!(running[i + 1..].iter().all(|other| other.exclusive != one.exclusive));
                }
                running.remove(0);
                finished += 1;
            }
        }
    }
}
