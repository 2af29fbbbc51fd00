//! The LVM test machine, booted: runs commands in it, moves files, cuts its power, collects its logs.
//!
//! Everything in it runs as root. A command is a bash script under `set -euo pipefail`. It leaves out how the
//! machine is built and started (`xtask`), and what lvp is (`product`).

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use xtask::{
    boot::Running,
    cache::{self, Scratch},
    machine::Machine,
    process::{self, Input},
};

pub use xtask::process::Output;

/// How long a command may take when nothing else is said.
pub const LIMIT: Duration = Duration::from_secs(120);
/// What a file may take to get in or out.
const COPY: Duration = Duration::from_secs(600);
const OFF: &str = "the test machine is off";
/// What is collected besides files: a name, and the command whose output it is.
const LOGS: &[(&str, &str)] = &[
    ("journal.log", "journalctl --no-pager --output=short-precise"),
    ("dmesg.log", "dmesg"),
    ("volumes.log", "vgs -o+tags; lvs -a -o+tags,devices; pvs; lsblk; dmsetup ls --tree; dmsetup status"),
    ("domains.log", "virsh list --all; virsh pool-list --all --details; virsh vol-list images || true"),
    ("system.log", "df -h; free -m; ps axfww; systemctl --failed --no-pager"),
];

/// An HTTP answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body, as text.
    pub body: String,
}

impl Response {
    /// What curl printed: the body, and the status in a line of its own.
    fn of_curl(text: &str) -> Result<Self> {
        let (body, status) = text.rsplit_once('\n').unwrap_or(("", text));
        Ok(Self { status: status.parse()?, body: body.trim().to_owned() })
    }

    /// The body, read as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {}", self.body))
    }
}

/// The booted test machine. Dropping it, or the end of the process in any way, ends it and its disks.
pub struct Vm {
    machine: Machine,
    running: Mutex<Option<Running>>,
    scratch: Scratch,
}

impl Vm {
    /// Boots a machine with fresh disks; builds it first when that was never done.
    ///
    /// # Errors
    /// It cannot be built, or does not come up; the error quotes its console.
    pub fn boot() -> Result<Self> {
        let machine = Machine::ensure()?;
        let scratch = cache::scratch("vm")?;
        let running = machine.boot(scratch.path())?;
        Ok(Self { machine, running: Mutex::new(Some(running)), scratch })
    }

    /// Runs a script to its end, [`LIMIT`] at most. Its exit code is not an error here.
    ///
    /// # Errors
    /// The machine is off or does not answer, or the script does not end in time.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.run_within(LIMIT, script)
    }

    /// As [`Vm::run`], `limit` at most: at the limit the script is killed in the machine too.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn run_within(&self, limit: Duration, script: &str) -> Result<Output> {
        self.execute(limit, script, Input::Empty)
    }

    /// Runs a script that must succeed, and returns what it printed, trimmed.
    ///
    /// # Errors
    /// As [`Vm::run`]; or it ends with another code than 0, and the error quotes it whole.
    pub fn run_ok(&self, script: &str) -> Result<String> {
        self.succeed(LIMIT, script, Input::Empty)
    }

    /// As [`Vm::run_ok`], `limit` at most.
    ///
    /// # Errors
    /// As [`Vm::run_ok`].
    pub fn run_ok_within(&self, limit: Duration, script: &str) -> Result<String> {
        self.succeed(limit, script, Input::Empty)
    }

    fn succeed(&self, limit: Duration, script: &str, input: Input<'_>) -> Result<String> {
        let Output { code, stdout, stderr } = self.execute(limit, script, input)?;
        ensure!(code == 0, "in the test machine: {script}\nexit code {code}\n{}\n{}", stdout.trim(), stderr.trim());
        Ok(stdout.trim().to_owned())
    }

    fn execute(&self, limit: Duration, script: &str, input: Input<'_>) -> Result<Output> {
        let mut ssh = self.while_on(|running| Ok(running.ssh()))?;
        // The limit is kept in the machine, so that nothing runs on in there; the one out here is for a machine
        // that no longer answers.
        let inside = limit.as_secs().max(1);
        ssh.arg(format!("timeout --kill-after=5 {inside} bash --norc -euo pipefail -c {}", quoted(script)));
        let begun = Instant::now();
        let output = process::output(&mut ssh, input, limit + Duration::from_secs(30))
            .with_context(|| format!("in the test machine: {script}"))?;
        match output.code {
            124 | 137 if begun.elapsed() >= limit => {
                bail!("in the test machine: {script}\ndid not end within {inside} s\n{}", output.stderr.trim())
            }
            255 => bail!("in the test machine: {script}\nno connection, or exit code 255: {}", output.stderr.trim()),
            _ => Ok(output),
        }
    }

    /// Starts a program in the background, with these environment variables, as the systemd unit `test-NAME`. What it
    /// prints is appended to its log.
    ///
    /// # Errors
    /// It cannot be started, or one of that name runs.
    pub fn spawn(&self, name: &str, environment: &[(String, String)], command: &[&str]) -> Result<Process<'_>> {
        let log = log_path(name);
        let settings: String = environment
            .iter()
            .map(|(name, value)| format!(" --setenv={}", quoted(&format!("{name}={value}"))))
            .collect();
        let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
        let start = format!(
            "mkdir -p /var/log/bed; systemd-run --collect --unit=test-{name} --service-type=exec \
             --property=StandardOutput=append:{log} --property=StandardError=append:{log}{settings} -- {}",
            words.join(" ")
        );
        self.run_ok(&start)?;
        Ok(Process { vm: self, name: name.to_owned(), start })
    }

    /// Sends an HTTP request from within the machine, with a JSON body if there is one.
    ///
    /// # Errors
    /// There is no answer. A status code is not an error.
    pub fn http(&self, method: &str, url: &str, body: Option<&str>) -> Result<Response> {
        self.http_with(&["-X", method, url], body)
    }

    /// As [`Vm::http`], for any further `curl` arguments: headers, a socket, no method.
    ///
    /// # Errors
    /// As [`Vm::http`].
    pub fn http_with(&self, arguments: &[&str], body: Option<&str>) -> Result<Response> {
        let words: Vec<String> = arguments.iter().map(|word| quoted(word)).collect();
        let (data, input) = match body {
            Some(body) => ("-H 'Content-Type: application/json' --data-binary @- ", Input::Bytes(body.as_bytes())),
            None => ("", Input::Empty),
        };
        let script = format!(r"curl -sS --max-time 60 -w '\n%{{http_code}}' {data}{}", words.join(" "));
        Response::of_curl(&self.succeed(LIMIT, &script, input)?)
    }

    /// Asks the service at port 8080 of the machine's loopback from the host, through the connection that is there:
    /// a hundred times cheaper for the machine than [`Vm::http`].
    ///
    /// # Errors
    /// As [`Vm::http`].
    pub fn ask(&self, method: &str, path: &str, body: Option<&str>) -> Result<Response> {
        let port = self.while_on(|running| Ok(running.service_port()))?;
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--max-time", "60", "-w", "\\n%{http_code}", "-X", method]);
        if body.is_some() {
            curl.args(["-H", "Content-Type: application/json", "--data-binary", "@-"]);
        }
        curl.arg(format!("http://127.0.0.1:{port}{path}"));
        let input = body.map_or(Input::Empty, |body| Input::Bytes(body.as_bytes()));
        let output = process::output(&mut curl, input, LIMIT)?;
        ensure!(output.code == 0, "{method} {path}: no answer: {}", output.stderr.trim());
        Response::of_curl(&output.stdout)
    }

    /// Copies a file of the host into the machine.
    ///
    /// # Errors
    /// It cannot be read, or the machine does not take it.
    pub fn copy_in(&self, from: &Path, to: &str) -> Result<()> {
        let to = quoted(to);
        self.succeed(COPY, &format!("mkdir -p $(dirname {to}); cat >{to}"), Input::File(from)).map(drop)
    }

    /// Writes a file in the machine.
    ///
    /// # Errors
    /// The machine does not take it.
    pub fn write(&self, to: &str, content: &[u8]) -> Result<()> {
        let to = quoted(to);
        self.succeed(COPY, &format!("mkdir -p $(dirname {to}); cat >{to}"), Input::Bytes(content)).map(drop)
    }

    /// Copies a file of the machine to the host, byte for byte.
    ///
    /// # Errors
    /// It is not there, or cannot be written here.
    pub fn copy_out(&self, from: &str, to: &Path) -> Result<()> {
        let mut ssh = self.while_on(|running| Ok(running.ssh()))?;
        ssh.arg(format!("cat {}", quoted(from)));
        process::output_into(to, &mut ssh, COPY).with_context(|| format!("copying {from} out of the test machine"))
    }

    /// Tells QEMU's monitor something, and returns its answer: `info block`, `set_link nic off` (which cuts off
    /// [`Vm::run`] too).
    ///
    /// # Errors
    /// The machine is off.
    pub fn monitor(&self, line: &str) -> Result<String> {
        self.while_on(|running| running.monitor(line))
    }

    /// Cuts the power. What the machine had written to its disks is kept; what it held in memory is gone.
    ///
    /// # Errors
    /// QEMU does not quit.
    pub fn kill_power(&self) -> Result<()> {
        self.running().take().context(OFF)?.power_off()
    }

    /// Boots it again on the disks it had.
    ///
    /// # Errors
    /// It is on, or does not come up.
    pub fn boot_again(&self) -> Result<()> {
        let mut running = self.running();
        ensure!(running.is_none(), "the test machine is on");
        *running = Some(self.machine.boot(self.scratch.path())?);
        Ok(())
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.running().is_some()
    }

    /// Puts the console, the journal, the state of volumes and domains and every log of a spawned program into a
    /// directory of the host.
    ///
    /// # Errors
    /// The directory cannot be written. A machine that does not answer is no error: its console is there.
    pub fn collect_logs(&self, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory)?;
        let console = self.machine.console(self.scratch.path());
        fs::copy(&console, directory.join("console.log")).with_context(|| console.display().to_string())?;
        for (name, command) in LOGS {
            let text = match self.run_within(Duration::from_secs(60), &format!("set +e; {command}")) {
                Ok(output) => format!("{}{}", output.stdout, output.stderr),
                Err(error) => format!("{error:#}\n"),
            };
            fs::write(directory.join(name), text)?;
        }
        let programs = self.run("ls /var/log/bed 2>/dev/null || true").map(|output| output.stdout).unwrap_or_default();
        for name in programs.lines() {
            self.copy_out(&format!("/var/log/bed/{name}"), &directory.join(name))?;
        }
        Ok(())
    }

    fn while_on<T>(&self, ask: impl FnOnce(&Running) -> Result<T>) -> Result<T> {
        ask(self.running().as_ref().context(OFF)?)
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A program that runs in the background in the machine. Dropping this kills it.
pub struct Process<'vm> {
    vm: &'vm Vm,
    name: String,
    start: String,
}

impl Process<'_> {
    /// The systemd unit it runs as.
    pub fn unit(&self) -> String {
        format!("test-{}.service", self.name)
    }

    /// Its log, in the machine.
    pub fn log_path(&self) -> String {
        log_path(&self.name)
    }

    /// All that it, and those of the same name before it, printed.
    ///
    /// # Errors
    /// The machine does not answer.
    pub fn log(&self) -> Result<String> {
        self.vm.run_ok(&format!("cat {}", self.log_path()))
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// The machine does not answer.
    pub fn is_running(&self) -> Result<bool> {
        Ok(self.vm.run(&format!("systemctl is-active --quiet {}", self.unit()))?.code == 0)
    }

    /// Its process id.
    ///
    /// # Errors
    /// It does not run.
    pub fn id(&self) -> Result<u32> {
        let id: u32 = self.vm.run_ok(&format!("systemctl show --property=MainPID --value {}", self.unit()))?.parse()?;
        ensure!(id != 0, "{} does not run; its log:\n{}", self.unit(), self.log().unwrap_or_default());
        Ok(id)
    }

    /// `kill -9`, and waits until it and its children are gone.
    ///
    /// # Errors
    /// It does not run, or does not go.
    pub fn kill_9(&self) -> Result<()> {
        let unit = self.unit();
        self.vm.run_ok(&format!("systemctl kill --kill-whom=all --signal=KILL {unit}"))?;
        self.vm.run_ok(&format!("while systemctl is-active --quiet {unit}; do sleep 0.05; done")).map(drop)
    }

    /// Starts it again, as it was started, after it ended.
    ///
    /// # Errors
    /// It runs, or cannot be started.
    pub fn start_again(&self) -> Result<()> {
        self.vm.run_ok(&self.start).map(drop)
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    ///
    /// # Errors
    /// It does not run, or does not end.
    pub fn stop(&self) -> Result<()> {
        self.vm.run_ok(&format!("systemctl stop {}", self.unit())).map(drop)
    }
}

impl Drop for Process<'_> {
    fn drop(&mut self) {
        if self.vm.is_on() {
            let unit = self.unit();
            let _ = self.vm.run(&format!("systemctl kill --kill-whom=all --signal=KILL {unit}; systemctl stop {unit}"));
        }
    }
}

fn log_path(name: &str) -> String {
    format!("/var/log/bed/{name}.log")
}

/// One word for a shell.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
