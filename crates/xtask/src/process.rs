//! Starts programs: to their end with a time limit, or beside this process for as long as it lives.
//!
//! It leaves out what the programs are.

use std::{
    fs::File,
    io::{Read, Write},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

/// How often a running program is looked at.
const POLL: Duration = Duration::from_millis(10);

/// What a program left.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; -1 when a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it said.
    pub stderr: String,
}

/// Runs a program to its end; its output goes where ours goes.
///
/// # Errors
/// It cannot be started, or ends with another code than 0.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).status().with_context(|| not_started(command))?;
    if status.success() { Ok(()) } else { bail!("{} failed: {status}", line(command)) }
}

/// Runs a program to its end with its output in a file; a failure quotes the end of that file.
///
/// # Errors
/// It cannot be started, or ends with another code than 0.
pub fn run_into(log: &Path, command: &mut Command) -> Result<()> {
    let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| not_started(command))?;
    if status.success() {
        return Ok(());
    }
    bail!("{} failed: {status}; the end of {}:\n{}", line(command), log.display(), tail(log, 30))
}

/// Runs a program to its end, `limit` at most, with `input` as its standard input.
///
/// # Errors
/// It cannot be started, or does not end in time. Its exit code is not an error here.
pub fn output(command: &mut Command, input: Input<'_>, limit: Duration) -> Result<Output> {
    command.stdin(input.stdio()?).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| not_started(command))?;
    let stdout = reader(child.stdout.take());
    let stderr = reader(child.stderr.take());
    let status = thread::scope(|scope| {
        if let (Some(mut pipe), Input::Bytes(bytes)) = (child.stdin.take(), input) {
            // A program that does not read it all says why itself.
            scope.spawn(move || pipe.write_all(bytes));
        }
        wait(&mut child, limit)
    })?;
    let Some(status) = status else { bail!("{} did not end within {} s", line(command), limit.as_secs()) };
    Ok(Output { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) })
}

/// Runs a program to its end, `limit` at most, with its standard output in a new file.
///
/// # Errors
/// It cannot be started, does not end in time, or ends with another code than 0.
pub fn output_into(file: &Path, command: &mut Command, limit: Duration) -> Result<()> {
    let to = File::create(file).with_context(|| file.display().to_string())?;
    let mut child =
        command.stdin(Stdio::null()).stdout(to).stderr(Stdio::piped()).spawn().with_context(|| not_started(command))?;
    let stderr = reader(child.stderr.take());
    match wait(&mut child, limit)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("{} failed: {status}: {}", line(command), text(stderr).trim()),
        None => bail!("{} did not end within {} s", line(command), limit.as_secs()),
    }
}

/// What a program reads.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// Nothing.
    Empty,
    /// These bytes.
    Bytes(&'a [u8]),
    /// This file.
    File(&'a Path),
}

impl Input<'_> {
    fn stdio(self) -> Result<Stdio> {
        Ok(match self {
            Self::Empty => Stdio::null(),
            Self::Bytes(_) => Stdio::piped(),
            Self::File(path) => File::open(path).with_context(|| path.display().to_string())?.into(),
        })
    }
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn text(reader: JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn not_started(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    format!("{program} could not be started (scripts/install-tools installs what the test bed needs)")
}

/// The last `lines` of a text file; empty when it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A program that runs beside this process: it is killed when this value is dropped, and by the kernel when this
/// process ends in any other way.
pub struct Attached {
    stop: Arc<AtomicBool>,
    keeper: Option<JoinHandle<()>>,
}

impl Attached {
    /// A command for `program` that dies with this process; give it arguments and hand it to [`Attached::start`].
    pub fn command(program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", program]).stdin(Stdio::null());
        command
    }

    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut command: Command) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (started, start) = mpsc::channel();
        // The kernel kills a child when the *thread* that made it ends, so that thread lives as long as the child.
        let keeper = thread::spawn(move || {
            let child = command.spawn().with_context(|| not_started(&command));
            match child {
                Ok(mut child) => {
                    let _ = started.send(Ok(()));
                    keep(&mut child, &stopped);
                }
                Err(error) => drop(started.send(Err(error))),
            }
        });
        start.recv().map_err(|_| anyhow!("the thread that starts a program ended"))??;
        Ok(Self { stop, keeper: Some(keeper) })
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| !keeper.is_finished())
    }

    /// Waits until it has ended by itself, `limit` at most; says whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        until(limit, || (!self.is_running()).then_some(())).is_some()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }
}

fn keep(child: &mut Child, stop: &AtomicBool) {
    while let Ok(None) = child.try_wait() {
        if stop.load(Ordering::SeqCst) {
            let _ = child.kill();
        }
        thread::sleep(POLL);
    }
}

/// Asks until there is an answer, `limit` at most.
pub fn until<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn a_program_reads_its_input_and_its_code_is_kept() {
        let output = output(Command::new("sh").args(["-c", "cat; exit 3"]), Input::Bytes(b"words"), LIMIT).unwrap();
        assert_eq!((output.code, output.stdout.as_str()), (3, "words"));
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let error = output(Command::new("sleep").arg("60"), Input::Empty, Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("sleep 60 did not end"), "{error}");
    }

    #[test]
    fn an_attached_program_ends_with_its_value_and_outlives_the_thread_that_asked_for_it() {
        let mut command = Attached::command("sleep");
        command.arg("60");
        let sleeper = thread::spawn(|| Attached::start(command).unwrap()).join().unwrap();
        assert!(!sleeper.wait(Duration::from_millis(200)));
        let begun = Instant::now();
        drop(sleeper);
        assert!(begun.elapsed() < LIMIT);
    }
}
