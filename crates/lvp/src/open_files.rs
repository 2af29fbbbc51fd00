//! How many files the daemon may have open: as many as the kernel gives it, shared between connections and jobs.
//!
//! ```text
//!  the hard limit    what the daemon itself needs | what its jobs need | connections over TCP | as many over the socket
//! ```
//! It leaves out how connections are kept within their number: see the server's limits.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The database, locks, listeners, the log, a connection to libvirt, what is read in /proc, and some to spare.
const OWN: u64 = 64;
/// The volume and the image, the connections to its source, and the pipes of a program that it runs.
const OF_A_JOB: u64 = 32;
/// So many connections there are at least, on each side.
const LEAST: usize = 8;

/// Raises the soft limit, which most systems set to 1024 for the sake of select(2), to the hard one (getrlimit(2)); gives
/// how many files may be open then.
pub fn raise() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, "the limit of open files could not be raised");
        return current.unwrap_or(u64::MAX);
    }
    maximum.unwrap_or(u64::MAX)
}

/// How many connections may be open, over TCP and as many over the socket: `wanted`, or what is left beside `jobs` that run
/// at once where no more than `limit` files may be open.
pub fn connections(wanted: usize, jobs: usize, limit: u64) -> usize {
    let needed = OF_A_JOB.saturating_mul(jobs as u64).saturating_add(OWN);
    let each = usize::try_from(limit.saturating_sub(needed) / 2).unwrap_or(usize::MAX).max(LEAST);
    if each < wanted {
        tracing::warn!(
            wanted,
            taken = each,
            limit,
            "fewer connections are taken than max_connections says: there may not be so many open files (LimitNOFILE=)"
        );
    }
    each.min(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_enough_to_jobs() {
        assert_eq!(connections(1024, 2, u64::MAX), 1024);
        assert_eq!(connections(1024, 2, 2176), 1024);
        assert_eq!(connections(1024, 2, 1024), 448);
        assert_eq!(connections(1024, 2, 256), 64);
        assert_eq!(connections(10, 2, 256), 10);
        assert_eq!(connections(1024, 500, 256), LEAST);
        assert_eq!(connections(2, 500, 256), 2);
    }
}
