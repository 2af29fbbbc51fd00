//! One measured process, and what several measurements of the same say.
//!
//! Time and memory of a process and all its children come from the kernel, by way of GNU time. It leaves out the work that
//! kernel threads do for a process, such as those of a loop device.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// What one run took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Run {
    /// Seconds by the clock.
    pub wall: f64,
    /// Seconds of processors, in the programs and in the kernel for them.
    pub processor: f64,
    /// The largest memory of any of its processes, in MiB.
    pub peak_mib: f64,
}

/// A program to be measured.
pub struct Measured {
    command: Command,
    report: tempfile::NamedTempFile,
    name: String,
}

impl Measured {
    /// A program with its arguments.
    pub fn new(program: &Path, arguments: &[impl AsRef<OsStr>]) -> Result<Self> {
        let report = tempfile::NamedTempFile::new()?;
        let mut command = Command::new("/usr/bin/time");
        command.args(["--quiet", "--format=%U %S %M", "--output"]).arg(report.path()).arg(program).args(arguments);
        // Nothing of whoever measures may set lvp up.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LVP_")) {
            command.env_remove(name);
        }
        command.stdin(Stdio::null());
        Ok(Self { command, report, name: program.display().to_string() })
    }

    /// Gives it a variable.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it to its end. What it prints is shown when it fails.
    pub fn run(mut self) -> Result<Run> {
        let begun = Instant::now();
        let output =
            self.command.output().context("/usr/bin/time could not be started; is the package time installed?")?;
        let wall = begun.elapsed().as_secs_f64();
        let said = [output.stdout, output.stderr].concat();
        ensure!(output.status.success(), "{} failed: {}", self.name, String::from_utf8_lossy(&said));
        let text = fs::read_to_string(self.report.path())?;
        let [user, system, peak] = numbers(&text)?;
        Ok(Run { wall, processor: user + system, peak_mib: peak / 1024.0 })
    }
}

/// The numbers of a line of GNU time.
pub fn numbers<const N: usize>(line: &str) -> Result<[f64; N]> {
    let found: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    found.try_into().map_err(|_| anyhow::anyhow!("GNU time says '{line}'"))
}

/// Reads a file, so that it is in the page cache for everyone.
pub fn warm(path: &Path) -> Result<()> {
    std::io::copy(&mut File::open(path)?, &mut std::io::sink())?;
    Ok(())
}

/// Waits until nothing of an earlier run is on its way to the disk.
pub fn settle() {
    rustix::fs::sync();
}

/// The least, the middle and the most.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// The least.
    pub least: f64,
    /// The median.
    pub median: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of some values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let last = values.len().saturating_sub(1);
        Self { least: at(0), median: (at(last / 2) + at(last.div_ceil(2))) / 2.0, most: at(last) }
    }

    /// Of the quotients of two series that were measured in turns.
    pub fn of_quotients(ours: &[f64], theirs: &[f64]) -> Self {
        Self::of(ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs))
    }

    /// As the result has it.
    pub fn json(self) -> Value {
        json!([round(self.least), round(self.median), round(self.most)])
    }
}

/// To a thousandth.
pub fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
