//! Runs programs of the host: no shell, a clean environment, a time limit, and errors that quote the program's words.
//!
//! It leaves out what the output means: callers parse it.

use std::{
    ffi::{OsStr, OsString},
    io::Read,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
};

use lvp_api::ErrorCode;
use rustix::process::{Pid, Signal, kill_process_group};

use super::outstanding::{Outstanding, Turn};
use crate::error::{Error, Result};

/// Programs that were asked something and have not ended.
static OUTSTANDING: Outstanding = Outstanding::new();
/// How much of a failed program's stderr goes into the error.
const STDERR_KEPT: usize = 1024;
/// The detail of an error that has the number of a signal.
const SIGNAL: &str = "signal";
/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(5);
/// What a program printed is there when it has ended, unless it left something behind that may print for ever.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a program left: its exit code and what it printed.
#[derive(Debug)]
pub struct Finished {
    /// The exit code.
    pub code: i32,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text, its end only.
    pub stderr: String,
}

/// Runs `program` with `arguments` to its end, `limit` at most.
///
/// # Errors
/// `command_failed` when the program is missing, cannot be started, is killed at the limit with all that it started, or ended
/// by a signal: see [`ended_by_signal`]. An exit code other than 0 is not an error here: LVM, for one, exits with 5 for everything, and only
/// the caller can tell.
pub fn run(program: &str, arguments: &[impl AsRef<OsStr>], limit: Duration) -> Result<Finished> {
    run_in(None, program, arguments, limit)
}

/// As [`run`], for a program that only looks at `what`: where it hangs, even when it is killed, as long as its device does not
/// answer, few of them are waited for at once and no more are begun.
///
/// # Errors
/// As [`run`]; `command_failed` at once where one hangs.
pub fn ask(what: &str, program: &str, arguments: &[impl AsRef<OsStr>], limit: Duration) -> Result<Finished> {
    let turn = OUTSTANDING.begin(&format!("{program} {what}"), limit).map_err(|out| {
        let message = format!("{program} was asked for {what} {} s ago and has not ended yet", out.as_secs());
        Error::new(ErrorCode::CommandFailed, message)
            .hint(format!("look at why {program} hangs: the devices below {what} may not answer"))
            .detail("command", line(program, arguments))
    })?;
    run_in(Some(turn), program, arguments, limit)
}

fn run_in(
    turn: Option<Turn<'static>>,
    program: &str,
    arguments: &[impl AsRef<OsStr>],
    limit: Duration,
) -> Result<Finished> {
    let mut child = Command::new(program)
        .args(arguments)
        // Ours holds keys of the object store. What LVM's own variables say stays.
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| is_passed_on(name)))
        .env("PATH", path())
        .env("LC_ALL", "C")
        // The daemon's sockets and locks are close-on-exec; LVM still looks at every descriptor.
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        // What is typed at the terminal to stop us is for us to handle, and maybe to be undone with this program.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| not_started(program, error))?;
    let stdout = Printed::of(child.stdout.take());
    let stderr = Printed::of(child.stderr.take());
    let begun = Instant::now();
    let deadline = begun + limit;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
            Ok(None) => {
                end_with_all_it_started(child, turn);
                return Err(Error::new(
                    ErrorCode::CommandFailed,
                    format!("{program} did not end within {} s and was killed", limit.as_secs()),
                )
                .detail("command", line(program, arguments)));
            }
            Err(error) => {
                return Err(Error::new(ErrorCode::CommandFailed, format!("waiting for {program} failed")).source(error));
            }
        }
    };
    let last_words = Instant::now() + LAST_WORDS;
    let stderr = stderr.text(last_words);
    tracing::debug!(command = line(program, arguments), %status, milliseconds = begun.elapsed().as_millis() as u64, "a program ended");
    if let Some(signal) = status.signal() {
        let message = format!("{program} was ended by signal {signal}");
        let error = Error::new(ErrorCode::CommandFailed, message).detail("command", line(program, arguments));
        return Err(error.detail(SIGNAL, signal));
    }
    Ok(Finished { code: status.code().unwrap_or_default(), stdout: stdout.text(last_words), stderr: tail(&stderr) })
}

/// Whether a program was ended by a signal. systemd sends one to all programs of a service that it stops (systemd.kill(5)).
pub fn ended_by_signal(error: &Error) -> bool {
    error.to_body().details.contains_key(SIGNAL)
}

/// The error for a program that ended with a code other than 0.
pub fn failed(program: &str, arguments: &[impl AsRef<OsStr>], finished: &Finished) -> Error {
    let said =
        if finished.stderr.is_empty() { "it said nothing".to_owned() } else { finished.stderr.replace('\n', "; ") };
    Error::new(ErrorCode::CommandFailed, format!("{program} failed with exit code {}: {said}", finished.code))
        .detail("command", line(program, arguments))
}

/// The variables that LVM and device-mapper read (lvm(8), "ENVIRONMENT VARIABLES"); ours have other names.
fn is_passed_on(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name == "HOME" || name == "TMPDIR" || name.starts_with("DM_") || name == "LVM_SYSTEM_DIR" || name == "LVM_BINARY"
}

/// Where programs are: the user's places, and those of the administrator's programs.
fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

fn not_started(program: &str, error: std::io::Error) -> Error {
    let missing = error.kind() == std::io::ErrorKind::NotFound;
    let failed = Error::new(ErrorCode::CommandFailed, format!("{program} could not be started")).source(error);
    if missing {
        failed.hint(format!("install the package that brings {program}; `lvp doctor` names it")).retry(false)
    } else {
        failed
    }
}

fn line(program: &str, arguments: &[impl AsRef<OsStr>]) -> String {
    arguments
        .iter()
        .fold(program.to_owned(), |line, argument| format!("{line} {}", argument.as_ref().to_string_lossy()))
}

/// Kills a program and what it started and did not make independent of itself (setsid(2)). One that waits in the kernel
/// survives that until it does not wait any more; it is left behind rather than waited for, but it is reaped, and keeps its turn
/// until then.
fn end_with_all_it_started(mut child: Child, turn: Option<Turn<'static>>) {
    // It is the leader of a group of its own.
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    thread::spawn(move || {
        let _ = child.wait();
        drop(turn);
    });
}

/// What comes out of a pipe, read by a thread of its own: a program that is not listened to waits.
struct Printed {
    bytes: Arc<Mutex<Vec<u8>>>,
    end: Receiver<()>,
}

impl Printed {
    fn of(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::<Mutex<Vec<u8>>>::default();
        let (at_end, end) = mpsc::channel();
        let read = Arc::clone(&bytes);
        thread::spawn(move || {
            // Dropped, it says that this is the end.
            let _at_end = at_end;
            let Some(mut pipe) = pipe else { return };
            let mut chunk = vec![0; 64 << 10];
            while let Ok(length @ 1..) = pipe.read(&mut chunk) {
                read.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&chunk[..length]);
            }
        });
        Self { bytes, end }
    }

    /// All of it, or what came until then.
    fn text(&self, until: Instant) -> String {
        let _ = self.end.recv_timeout(until.saturating_duration_since(Instant::now()));
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn tail(text: &str) -> String {
    let text = text.trim();
    let mut start = text.len().saturating_sub(STDERR_KEPT);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn quotes_what_the_program_said() {
        let arguments = ["-c", "echo no such group >&2; exit 5"];
        let error = failed("sh", &arguments, &run("sh", &arguments, LIMIT).unwrap());
        assert_eq!(error.to_string(), "sh failed with exit code 5: no such group");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run("lvp-no-such-program", &["x"], LIMIT).unwrap_err();
        assert!(error.chain().contains("lvp-no-such-program could not be started"), "{error:?}");
        assert!(!error.retryable());
    }

    #[test]
    fn a_signal_is_told_from_an_exit() {
        let error = run("sh", &["-c", "kill -TERM $$"], LIMIT).unwrap_err();
        assert_eq!(error.to_string(), "sh was ended by signal 15");
        assert!(ended_by_signal(&error));
    }

    #[test]
    fn what_the_terminal_sends_to_us_does_not_reach_programs() {
        let group = |of: &str| of.split_whitespace().nth(4).unwrap().to_owned();
        let theirs = run("cat", &["/proc/self/stat"], LIMIT).unwrap().stdout;
        assert_ne!(group(&theirs), group(&std::fs::read_to_string("/proc/self/stat").unwrap()));
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let begun = Instant::now();
        let error = run("sleep", &["60"], Duration::from_millis(100)).unwrap_err();
        assert_eq!(error.code(), ErrorCode::CommandFailed);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn what_a_program_that_hangs_started_is_killed_with_it_and_nothing_is_left_to_be_reaped() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pids");
        let script = format!("sleep 600 & echo $$ $! >{}; wait", file.display());
        let error = run("sh", &["-c", &script], Duration::from_millis(500)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
        let pids = std::fs::read_to_string(file).unwrap();
        let begun = Instant::now();
        // What was not reaped is there, too.
        while pids.split_whitespace().any(|pid| Path::new("/proc").join(pid).exists()) {
            assert!(begun.elapsed() < LIMIT, "it is left");
            thread::sleep(POLL);
        }
    }

    #[test]
    fn while_a_program_that_was_asked_hangs_it_is_not_asked_again() {
        let directory = tempfile::tempdir().unwrap();
        let (begun, end) = (directory.path().join("begun"), directory.path().join("end"));
        let script = format!("echo >>{}; until test -e {}; do sleep 0.05; done", begun.display(), end.display());
        let ask = |limit| ask("a group of its own", "sh", &["-c", &script], limit);
        thread::scope(|scope| {
            let first = scope.spawn(|| ask(LIMIT));
            while !begun.exists() {
                thread::sleep(POLL);
            }
            thread::sleep(POLL);
            let error = ask(POLL).unwrap_err();
            assert_eq!((error.code(), error.retryable()), (ErrorCode::CommandFailed, true));
            assert!(error.chain().contains("sh was asked for a group of its own 0 s ago and has not ended yet"));
            assert_eq!(std::fs::read_to_string(&begun).unwrap().lines().count(), 1, "it was begun again");
            std::fs::write(&end, "").unwrap();
            assert_eq!(first.join().unwrap().unwrap().code, 0);
        });
        assert_eq!(ask(LIMIT).unwrap().code, 0, "it answers again");
    }

    #[test]
    fn a_program_that_leaves_something_behind_with_its_output_has_ended() {
        let finished = run("sh", &["-c", "sleep 600 & echo $!"], Duration::from_secs(60)).unwrap();
        let left = Path::new("/proc").join(finished.stdout.trim()).exists();
        run("kill", &[finished.stdout.trim()], LIMIT).unwrap();
        assert_eq!((finished.code, left), (0, true));
    }

    #[test]
    fn a_program_learns_nothing_from_our_environment() {
        let finished = run("env", &[] as &[&str], LIMIT).unwrap();
        let names: Vec<&str> =
            finished.stdout.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        assert!(names.contains(&"LC_ALL") && !names.iter().any(|name| name.starts_with("CARGO")), "{names:?}");
    }

    #[test]
    fn output_larger_than_a_pipe_is_read_whole() {
        let finished = run("seq", &["100000"], LIMIT).unwrap();
        assert!(finished.stdout.ends_with("100000\n"));
    }
}
