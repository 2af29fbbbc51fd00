//! One provision with one fault in it, and an auditor of what is there before and after it: a cell of the fault matrix.
//!
//! ```text
//!  audit ─► daemon with a fault ─► the job ─► it is killed, fails, panics, is cancelled ─► daemon without ─► audit
//! ```
//! All of it is done by shell scripts with the tools of others, in the test machine or on this one. The auditor knows what
//! lvp promises and nothing of how it is done. It leaves out which cells there are.

use std::{collections::BTreeMap, fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::process::{self, Input};

use crate::vm::{Vm, quoted};

const RUN: &str = include_str!("cell/run.sh");
const DAEMON: &str = include_str!("cell/daemon.sh");
const AUDIT: &str = include_str!("cell/audit.sh");
const LIMIT: Duration = Duration::from_secs(1200);

/// Where cells are run.
pub trait Shell {
    /// Runs a bash script that must succeed; gives what it printed.
    ///
    /// # Errors
    /// It fails; the error quotes it.
    fn run(&self, script: &str) -> Result<String>;

    /// Writes a file.
    ///
    /// # Errors
    /// It cannot be written.
    fn write(&self, path: &str, content: &str) -> Result<()>;
}

impl Shell for Vm {
    fn run(&self, script: &str) -> Result<String> {
        self.run_ok_within(LIMIT, script)
    }

    fn write(&self, path: &str, content: &str) -> Result<()> {
        Self::write(self, path, content.as_bytes())
    }
}

/// This machine: for directories only.
pub struct Here;

impl Shell for Here {
    fn run(&self, script: &str) -> Result<String> {
        let mut bash = Command::new("bash");
        bash.args(["--norc", "-euo", "pipefail", "-c", script]);
        let output = process::output(&mut bash, Input::Empty, LIMIT)?;
        ensure!(output.code == 0, "{script}\nexit code {}\n{}\n{}", output.code, output.stdout, output.stderr);
        Ok(output.stdout.trim().to_owned())
    }

    fn write(&self, path: &str, content: &str) -> Result<()> {
        fs::create_dir_all(Path::new(path).parent().context("a path without a directory")?)?;
        Ok(fs::write(path, content)?)
    }
}

/// What happens at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// SIGKILL.
    Kill,
    /// The point gives an error.
    Error,
    /// The user cancels while the job is there.
    Cancel,
    /// The point panics.
    Panic,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Kill, Self::Error, Self::Cancel, Self::Panic];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Error => "error",
            Self::Cancel => "cancel",
            Self::Panic => "panic",
        }
    }
}

/// A place to run cells in: a directory with state, cache and volumes of its own, and maybe a volume group.
pub struct Place<'a> {
    shell: &'a dyn Shell,
    directory: String,
    binary: String,
    group: Option<&'static str>,
    environment: String,
}

/// What a cell's daemon and job did.
#[derive(Debug)]
pub struct Ran {
    /// The job as the API shows it at the end.
    pub job: Value,
    /// Whether the point was passed.
    pub passed: bool,
    /// All points that were passed, in their order.
    pub points: Vec<String>,
}

/// Everything that there is: what, and what is known of it.
pub type Facts = BTreeMap<String, String>;

impl<'a> Place<'a> {
    /// A place in this directory, where the daemon is `binary`, with these settings.
    ///
    /// # Errors
    /// The scripts cannot be written there.
    pub fn new(
        shell: &'a dyn Shell,
        directory: &str,
        binary: &str,
        group: Option<&'static str>,
        settings: &[(&str, String)],
    ) -> Result<Self> {
        let environment = settings.iter().map(|(name, value)| format!("export {name}={}\n", quoted(value))).collect();
        for (name, script) in [("run.sh", RUN), ("daemon.sh", DAEMON), ("audit.sh", AUDIT)] {
            shell.write(&format!("{directory}.scripts/{name}"), script)?;
        }
        Ok(Self { shell, directory: directory.to_owned(), binary: binary.to_owned(), group, environment })
    }

    /// Its directory.
    pub fn directory(&self) -> &str {
        &self.directory
    }

    /// Empties it, and does with `prepare` what must be there before the cell.
    ///
    /// # Errors
    /// The script fails.
    pub fn reset(&self, configuration: &str, prepare: &str) -> Result<()> {
        let directory = &self.directory;
        self.shell.run(&format!(
            "{prepare}\nrm -rf {directory}; mkdir -p {directory}\nprintf %s {} >{directory}/config.toml",
            quoted(configuration)
        ))?;
        Ok(())
    }

    /// Runs a script there.
    ///
    /// # Errors
    /// It fails.
    pub fn shell(&self, script: &str) -> Result<String> {
        self.shell.run(script)
    }

    /// Runs a script there with the daemon's settings in its environment.
    ///
    /// # Errors
    /// It fails.
    pub fn script(&self, script: &str) -> Result<String> {
        self.shell.run(&format!("{}{script}", self.environment))
    }

    /// A provision with faults as `fail` reads them; `point` is the one that it is about, `action` what happens there.
    ///
    /// # Errors
    /// A daemon does not come up, or the job does not end.
    pub fn run(&self, request: &Value, faults: &str, point: &str, action: Option<Action>) -> Result<Ran> {
        let Self { directory, binary, environment, .. } = self;
        let action = action.map_or("none", Action::name);
        let words = [binary, directory, &request.to_string(), faults, point, action].map(quoted).join(" ");
        let printed = self.shell.run(&format!("{environment}bash {directory}.scripts/run.sh {words}"))?;
        let mut answer: Value = serde_json::from_str(&printed).with_context(|| printed.clone())?;
        let points = answer["points"].as_array().context("no points")?;
        let points = points.iter().filter_map(|point| point.as_str().map(str::to_owned)).collect();
        Ok(Ran { passed: answer["passed"].as_u64() > Some(0), points, job: answer["job"].take() })
    }

    /// What a point is to be told so that this happens there, the first time.
    pub fn fault(&self, point: &str, action: Action) -> String {
        match action {
            Action::Cancel => format!("{point}=1*return(wait:{}/wait)", self.directory),
            other => format!("{point}=1*return({})", other.name()),
        }
    }

    /// The end of the daemons' log.
    pub fn log(&self) -> String {
        self.shell.run(&format!("grep -v answered {}/log | tail -n 40", self.directory)).unwrap_or_default()
    }

    /// Everything that there is now. No daemon runs.
    ///
    /// # Errors
    /// Something cannot be asked.
    pub fn audit(&self) -> Result<Facts> {
        let group = self.group.unwrap_or_default();
        let printed = self.shell.run(&format!("bash {0}.scripts/audit.sh {0} {group}", self.directory))?;
        let fact = |line: &str| line.split_once(':').map(|(what, facts)| (what.to_owned(), facts.trim().to_owned()));
        printed.lines().map(|line| fact(line).with_context(|| format!("no fact: {line}"))).collect()
    }
}
