//! The I/O priority of a thread that copies, so that the guests of the host go before it.
//!
//! It is set by `ionice` of util-linux, the tool for it. What a priority does is the I/O scheduler's affair: bfq and
//! mq-deadline heed it, `none` does not (Documentation/block/ioprio.rst). It leaves out limits: see `limit`.

use std::time::Duration;

use rustix::thread::gettid;

use super::cmd;
use crate::error::Result;

/// `ionice` does one system call.
const PATIENCE: Duration = Duration::from_secs(10);

/// How urgent the copying of volumes is to the I/O scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoPriority {
    /// As that of any other program.
    #[default]
    Normal,
    /// The lowest that still gets its share.
    Low,
    /// Only when nobody else wants the disk.
    Idle,
}

impl IoPriority {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Normal, Self::Low, Self::Idle];

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Low => "low",
            Self::Idle => "idle",
        }
    }

    /// Gives this priority to the calling thread, which is to end with its work.
    ///
    /// # Errors
    /// `command_failed` when `ionice` is missing or says so.
    pub fn take(self) -> Result<()> {
        // The classes are those of ionice(1): 2 is best effort, whose levels go from 0 to 7, and 3 is idle.
        let wanted: &[&str] = match self {
            Self::Normal => return Ok(()),
            Self::Low => &["-c", "2", "-n", "7"],
            Self::Idle => &["-c", "3"],
        };
        let thread = gettid().as_raw_nonzero().to_string();
        let arguments = [wanted, &["-p", &thread]].concat();
        let finished = cmd::run("ionice", &arguments, PATIENCE)?;
        if finished.code == 0 { Ok(()) } else { Err(cmd::failed("ionice", &arguments, &finished)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `ionice` says of the calling thread.
    fn now() -> String {
        let thread = gettid().as_raw_nonzero().to_string();
        cmd::run("ionice", &["-p", &thread], PATIENCE).unwrap().stdout.trim().to_owned()
    }

    #[test]
    fn the_thread_alone_gets_the_priority() {
        let before = now();
        for (priority, said) in [(IoPriority::Low, "best-effort: prio 7"), (IoPriority::Idle, "idle")] {
            let inside = std::thread::spawn(move || {
                priority.take().unwrap();
                now()
            });
            assert_eq!(inside.join().unwrap(), said);
        }
        IoPriority::Normal.take().unwrap();
        assert_eq!(now(), before);
    }
}
