//! Takes from a thread that decodes an image what decoding does not need, so that a fault in a decompressor is not at
//! once the whole host: the thread opens nothing, connects to nothing, starts nothing, and writes to its target only.
//!
//! ```text
//!  signals        go to the other threads: their handlers do what is denied here
//!  no_new_privs   nothing that the thread starts gains rights
//!  landlock       no path of any file system, no TCP port, no abstract socket, no signal to other processes
//!  seccomp        the system calls of the list below; every other one fails with EPERM, so that nothing hangs
//! ```
//! Each holds for the calling thread alone, and for good: the thread is to end with its work. What the kernel does not
//! have is left out and said once. It leaves out what no thread can be denied, the memory that it shares with the daemon:
//! see `docs/decisions/0007-decoding-in-process.md`.

use std::{
    collections::BTreeMap,
    env::consts::ARCH,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Once,
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope as LandlockScope,
};
use libc::c_long;
use nix::sys::signal::{SigSet, Signal};
use rustix::io::Errno;
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// What holds a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Confinement {
    /// Whether landlock does, as far as the kernel's version of it goes.
    pub landlock: bool,
    /// Whether seccomp does.
    pub seccomp: bool,
}

impl Confinement {
    /// What the kernel does not have, if anything.
    pub fn missing(self) -> Option<&'static str> {
        match (self.landlock, self.seccomp) {
            (true, true) => None,
            (false, true) => Some("landlock"),
            (true, false) => Some("seccomp"),
            (false, false) => Some("landlock and seccomp"),
        }
    }
}

/// System calls that are allowed whatever their arguments.
const ALLOWED: &[c_long] = &[
    // The image, whose file is open.
    libc::SYS_pread64,
    libc::SYS_lseek,
    libc::SYS_fadvise64,
    // Memory; see MAPPINGS for the calls that could make it executable.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_getrandom,
    // Waiting for other threads and for time, and going on after a signal.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    // The C library: how many arenas to make, a thread's own state.
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    // Without sigaction the handler of a memory fault could not give up, and would be called without end.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
];

/// Allowed on the target only. `close` and `dup` are missing everywhere: with them the target's number could become
/// another file's.
const ON_TARGET: &[c_long] = &[libc::SYS_pwrite64, libc::SYS_fallocate];

/// Allowed on standard error only: log lines, and the message of a panic.
const ON_STDERR: &[c_long] = &[libc::SYS_write, libc::SYS_writev];

/// Confines the calling thread, for good: of files it can write only these, which are open. A kernel that cannot do all
/// of it is logged, once.
pub static OFF: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
pub fn confine_decoder(writable: &[BorrowedFd<'_>]) -> Confinement {
    if OFF.load(std::sync::atomic::Ordering::Relaxed) { return Confinement { landlock: true, seccomp: true }; }
    static SAID: Once = Once::new();
    let confinement = confine(writable);
    if let Some(missing) = confinement.missing() {
        SAID.call_once(|| {
            tracing::warn!(missing, "the threads that decode images are not fully confined; see `lvp doctor`");
        });
    }
    confinement
}

/// What threads are confined by on this machine; found out by a thread that then ends.
pub fn available() -> Confinement {
    let tried = std::thread::Builder::new().name("confined".to_owned()).spawn(|| confine(&[]));
    let found = tried.ok().and_then(|thread| thread.join().ok());
    found.unwrap_or(Confinement { landlock: false, seccomp: false })
}

fn confine(writable: &[BorrowedFd<'_>]) -> Confinement {
    if let Err(error) = block_signals() {
        tracing::debug!(%error, "signals are not blocked");
    }
    // Landlock first: its calls are not in seccomp's list.
    let landlock = match landlock() {
        Ok(status) => status != RulesetStatus::NotEnforced,
        Err(error) => {
            tracing::debug!(%error, "no landlock");
            false
        }
    };
    let seccomp = match seccomp(writable) {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(%error, "no seccomp");
            false
        }
    };
    Confinement { landlock, seccomp }
}

/// Blocks every signal but those of faults, which are the thread's own.
fn block_signals() -> nix::Result<()> {
    let mut signals = SigSet::all();
    for fault in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGABRT, Signal::SIGTRAP] {
        signals.remove(fault);
    }
    signals.thread_block()
}

/// All that the kernel knows is handled, and nothing is granted. Sets no_new_privs.
fn landlock() -> Result<RulesetStatus, RulesetError> {
    let newest = ABI::V6;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(newest))?
        .handle_access(AccessNet::from_all(newest))?
        .scope(LandlockScope::from_all(newest))?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset)
}

/// The list of calls. Sets no_new_privs.
fn seccomp(writable: &[BorrowedFd<'_>]) -> Result<(), seccompiler::Error> {
    let deny = SeccompAction::Errno(Errno::PERM.raw_os_error().cast_unsigned());
    let filter = SeccompFilter::new(rules(writable)?, deny, SeccompAction::Allow, ARCH.try_into()?)?;
    apply_filter(&seccompiler::BpfProgram::try_from(filter)?)
}

fn rules(writable: &[BorrowedFd<'_>]) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, BackendError> {
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // No rule would mean any argument: without a file to write there is no entry.
    for file in writable {
        for call in ON_TARGET {
            rules.entry(*call).or_default().push(SeccompRule::new(vec![is(0, file.as_raw_fd())?])?);
        }
    }
    for call in ON_STDERR {
        rules.insert(*call, vec![SeccompRule::new(vec![is(0, libc::STDERR_FILENO)?])?]);
    }
    rules.insert(libc::SYS_mprotect, vec![SeccompRule::new(vec![lacks(2, libc::PROT_EXEC)?])?]);
    // Of no file: one that is mapped could be written.
    let anonymous = vec![lacks(2, libc::PROT_EXEC)?, has(3, libc::MAP_ANONYMOUS)?];
    rules.insert(libc::SYS_mmap, vec![SeccompRule::new(anonymous)?]);
    Ok(rules)
}

/// The argument of this index is this number.
fn is(argument: u8, value: i32) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, Dword, SeccompCmpOp::Eq, u64::from(value.cast_unsigned()))
}

/// The argument has this bit.
fn has(argument: u8, bit: i32) -> Result<SeccompCondition, BackendError> {
    let bit = u64::from(bit.cast_unsigned());
    SeccompCondition::new(argument, Dword, SeccompCmpOp::MaskedEq(bit), bit)
}

/// The argument has not this bit.
fn lacks(argument: u8, bit: i32) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, Dword, SeccompCmpOp::MaskedEq(u64::from(bit.cast_unsigned())), 0)
}

#[cfg(test)]
mod tests {
    use std::{
        env,
        fs::{self, File},
        io::{self, ErrorKind},
        net::TcpStream,
        os::{
            fd::AsFd,
            unix::{fs::FileExt, net::UnixStream, process::ExitStatusExt},
        },
        panic,
        process::{self, Command},
        thread,
        time::{Duration, Instant},
    };

    use rustix::fs::{FallocateFlags, fallocate};

    use super::*;

    /// Set in a process of its own.
    const CHILD: &str = "LVP_TEST_CONFINED";

    fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| scope.spawn(work).join().unwrap())
    }

    fn assert_denied<T>(what: &str, outcome: io::Result<T>) {
        let Err(error) = outcome else { panic!("{what} is possible") };
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{what}: {error}");
    }

    /// Everything that a program taken over would try first.
    fn assert_nothing_is_reached(room: &std::path::Path, daemon: rustix::process::Pid) {
        assert_denied("to open a file", File::open("/etc/hostname"));
        assert_denied("to make a file", File::create(room.join("new")));
        assert_denied("to remove a file", fs::remove_file(room.join("there")));
        assert_denied("to list a directory", fs::read_dir("/"));
        assert_denied("to start a program", Command::new("true").status());
        assert_denied("to reach a TCP port", TcpStream::connect("127.0.0.1:9"));
        assert_denied("to reach a socket", UnixStream::connect("/run/any"));
        assert_denied("to start a thread", thread::Builder::new().spawn(|| ()));
        let signalled = rustix::process::kill_process(daemon, rustix::process::Signal::CONT);
        assert_denied("to send a signal", signalled.map_err(Into::into));
    }

    #[test]
    fn a_confined_thread_opens_connects_and_starts_nothing() {
        let room = tempfile::tempdir().unwrap();
        fs::write(room.path().join("there"), "x").unwrap();
        let daemon = rustix::process::getpid();
        on_a_thread(|| {
            assert!(confine_decoder(&[]).seccomp, "the kernel that tests run on has seccomp");
            assert_nothing_is_reached(room.path(), daemon);
        });
        // The other threads are as free as before.
        assert!(File::open(room.path().join("there")).is_ok());
        assert!(Command::new("true").status().unwrap().success());
    }

    /// The second wall, without the first: only where the kernel has it.
    #[test]
    fn landlock_alone_denies_every_path() {
        let room = tempfile::tempdir().unwrap();
        fs::write(room.path().join("there"), "x").unwrap();
        let held = on_a_thread(|| {
            let held = landlock().unwrap() != RulesetStatus::NotEnforced;
            if held {
                assert_denied("to open a file", File::open(room.path().join("there")));
                assert_denied("to make a file", File::create(room.path().join("new")));
                assert_denied("to list a directory", fs::read_dir(room.path()));
            }
            held
        });
        assert_eq!(held, available().landlock);
    }

    #[test]
    fn only_the_target_is_written() {
        let (target, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        other.write_all_at(b"other", 0).unwrap();
        on_a_thread(|| {
            confine_decoder(&[target.as_fd()]);
            target.write_all_at(&[7; 8192], 0).unwrap();
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&target, hole, 0, 4096).unwrap();
            assert_denied("to write to another file", other.write_all_at(b"x", 0));
            assert_denied("to write to another file", io::Write::write(&mut &other, b"x"));
            assert_denied("to cut another file", fallocate(&other, hole, 0, 5).map_err(Into::into));
            let mut bytes = [0; 5];
            other.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(&bytes, b"other");
        });
        let mut bytes = [1; 8192];
        target.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..4096] == [0; 4096] && bytes[4096..] == [7; 4096]);
    }

    /// A signal that a confined thread took would be lost: the handler that tells the daemon of it cannot write.
    #[test]
    fn signals_go_to_other_threads() {
        let blocked = on_a_thread(|| {
            confine_decoder(&[]);
            SigSet::thread_get_mask().unwrap()
        });
        assert!(
            [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGALRM].iter().all(|it| blocked.contains(*it))
        );
        assert!(!blocked.contains(Signal::SIGSEGV) && !blocked.contains(Signal::SIGABRT));
        assert!(!SigSet::thread_get_mask().unwrap().contains(Signal::SIGTERM));
    }

    #[test]
    fn what_decoding_needs_is_left() {
        let (sender, receiver) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let confined = scope.spawn(move || {
                confine_decoder(&[]);
                for size in [1 << 10, 1 << 17, 1 << 20, 16 << 20] {
                    assert_eq!(vec![1_u8; size].iter().map(|byte| usize::from(*byte)).sum::<usize>(), size);
                }
                let map: std::collections::HashMap<u32, u32> = (0..1000).map(|number| (number, number)).collect();
                assert_eq!(map.len(), 1000);
                thread::sleep(Duration::from_millis(1));
                let caught = panic::catch_unwind(|| panic!("on purpose, to see it printed"));
                assert!(caught.is_err());
                tracing::warn!("a line from a confined thread");
                receiver.recv().unwrap()
            });
            thread::yield_now();
            sender.send(Instant::now()).unwrap();
            assert!(confined.join().unwrap() <= Instant::now());
        });
    }

    /// A process whose confined thread aborts ends: the calls that it cannot make do not leave it hanging.
    #[test]
    fn an_abort_ends_the_process() {
        if env::var_os(CHILD).is_some() {
            on_a_thread(|| {
                confine_decoder(&[]);
                process::abort();
            });
        }
        let name = "host::confine::tests::an_abort_ends_the_process";
        let mut child =
            Command::new(env::current_exe().unwrap()).args(["--exact", name]).env(CHILD, "1").spawn().unwrap();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
            }
            thread::sleep(Duration::from_millis(10));
        };
        let signal = status.signal().unwrap();
        assert!(signal == libc::SIGABRT || signal == libc::SIGSEGV || signal == libc::SIGILL, "{status:?}");
    }
}
