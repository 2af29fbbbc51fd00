//! Whether a source sends so little that it is as good as silent. Time counts only while we wait for it, so that a slow
//! disk of ours is not its fault. It leaves out silence itself, which the client's read timeout ends.

use std::time::Duration;

/// Below this many bytes a second a connection is given up: curl's customary `--speed-limit` is of this order.
const SLOWEST: u64 = 1024;

/// The pace of one connection.
pub(super) struct Pace {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Judged over windows of this length.
    pub fn new(window: Duration) -> Self {
        Self { window, waited: Duration::ZERO, bytes: 0 }
    }

    /// Notes bytes that came after so long a wait; says whether the window that ends with them was too slow.
    pub fn is_too_slow(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < self.window {
            return false;
        }
        let slow = (self.bytes as f64) < self.waited.as_secs_f64() * SLOWEST as f64;
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_a_second_is_too_slow_and_a_burst_after_a_pause_is_not() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(10 * second);
        assert!((0..9).all(|_| !pace.is_too_slow(second, 1)));
        assert!(pace.is_too_slow(second, 1));
        assert!(!pace.is_too_slow(9 * second, 0));
        assert!(!pace.is_too_slow(second, 1 << 20));
        assert!((0..100).all(|_| !pace.is_too_slow(second, 2 * SLOWEST)));
    }
}
