//! Starts the LVM test machine under QEMU and reaches it by SSH.
//!
//! Each start has a directory with its disks, console log and sockets; the built machine stays as it is. Starting
//! again in the same directory keeps the disks. Always emulated, never KVM: it must behave the same on every runner.
//! It leaves out what is done in the machine.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, TcpListener},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    machine::Machine,
    process::{self, Attached, Input},
};

/// How long a boot may take, on a busy runner.
const BOOT: Duration = Duration::from_secs(300);
/// How long QEMU may take to quit.
const QUIT: Duration = Duration::from_secs(30);
/// The port of the machine's loopback that is reached from the host.
pub const SERVICE: u16 = 8080;
const KERNEL_ARGUMENTS: &str = "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off panic=-1 quiet \
     psi=1 systemd.show_status=1 loglevel=5";

/// A started machine. Dropping it kills it, as does the end of this process.
pub struct Running {
    directory: PathBuf,
    key: PathBuf,
    port: u16,
    service: u16,
    qemu: Attached,
    _connection: Attached,
}

impl Machine {
    /// The console's log of the machine started in `directory`.
    pub fn console(&self, directory: &Path) -> PathBuf {
        directory.join("console.log")
    }

    /// Starts the machine with its disks in `directory` and waits until SSH answers, which is when the volume group
    /// is there.
    ///
    /// # Errors
    /// QEMU cannot be started, or the machine does not answer in time; the error quotes the console.
    pub fn boot(&self, directory: &Path) -> Result<Running> {
        self.make_disks(directory)?;
        let console = self.console(directory);
        let port = free_port()?;
        let mut command = self.qemu(directory, port);
        let log = fs::File::create(directory.join("qemu.log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        let qemu = Attached::start(command)?;
        let key = self.directory().join("key");
        let answered = process::until(BOOT, || {
            if !qemu.is_running() {
                return Some(false);
            }
            let mut ssh = ssh(directory, &key, port);
            let greeting = process::output(ssh.arg("true"), Input::Empty, Duration::from_secs(30));
            greeting.is_ok_and(|output| output.code == 0).then_some(true)
        });
        if answered != Some(true) {
            let what = if answered.is_some() { "ended" } else { "did not answer" };
            let said = process::tail(&directory.join("qemu.log"), 10);
            bail!("the test machine {what}: {said}\nthe end of its console:\n{}", process::tail(&console, 40));
        }
        let service = free_port()?;
        let connection = connect(directory, &key, port, service)?;
        Ok(Running { directory: directory.to_owned(), key, port, service, qemu, _connection: connection })
    }

    /// An overlay over the built root, and an empty disk for volumes; those that are there stay.
    fn make_disks(&self, directory: &Path) -> Result<()> {
        let (root, data) = (directory.join("root.qcow2"), directory.join("data.img"));
        if !root.exists() {
            let base = self.directory().join("root.img");
            let mut command = Command::new("qemu-img");
            command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(base).arg(root);
            process::run(&mut command)?;
            fs::File::create(data)?.set_len(8 << 30)?;
        }
        Ok(())
    }

    fn qemu(&self, directory: &Path, port: u16) -> Command {
        let inside = |name: &str| directory.join(name).display().to_string();
        let mut qemu = Attached::command("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2G"]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        qemu.arg("-kernel").arg(self.directory().join("vmlinuz"));
        qemu.arg("-initrd").arg(self.directory().join("initrd"));
        qemu.args(["-append", KERNEL_ARGUMENTS]);
        // cache=unsafe: a flush costs nothing. What the guest wrote to a disk is there after a power cut; what it
        // only held in memory is gone.
        for (name, file, format) in [("root", "root.qcow2", "qcow2"), ("data", "data.img", "raw")] {
            let file = inside(file);
            let drive = format!("file={file},if=none,id={name},format={format},cache=unsafe,discard=unmap");
            qemu.args(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive={name},serial={name}")]);
        }
        qemu.args(["-netdev", &format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:22")]);
        qemu.args(["-device", "virtio-net-pci,id=nic,netdev=net,romfile=", "-device", "virtio-rng-pci"]);
        qemu.args(["-chardev", &format!("file,id=console,path={},append=on", inside("console.log"))]);
        qemu.args(["-serial", "chardev:console"]);
        qemu.args(["-monitor", &format!("unix:{},server=on,wait=off", inside("monitor"))]);
        qemu
    }
}

impl Running {
    /// A command that runs its further arguments in the machine, as root.
    pub fn ssh(&self) -> Command {
        ssh(&self.directory, &self.key, self.port)
    }

    /// The port of the host's loopback that leads to [`SERVICE`] of the machine's loopback.
    pub fn service_port(&self) -> u16 {
        self.service
    }

    /// Tells QEMU's monitor something and returns its answer: `set_link nic off`, `info block`, …
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn monitor(&self, line: &str) -> Result<String> {
        let mut socket = UnixStream::connect(self.directory.join("monitor")).context("QEMU's monitor")?;
        socket.set_read_timeout(Some(QUIT))?;
        read_to_prompt(&mut socket)?;
        socket.write_all(format!("{line}\n").as_bytes())?;
        let answer = read_to_prompt(&mut socket)?;
        // The monitor echoes what it is told, with a terminal's control codes.
        let body = answer.split_once('\n').map_or("", |(_echo, body)| body);
        Ok(body.trim_end_matches("(qemu) ").replace('\r', "").trim_end().to_owned())
    }

    /// Cuts the power: the disks keep what the machine had written to them.
    ///
    /// # Errors
    /// QEMU does not quit.
    pub fn power_off(self) -> Result<()> {
        self.monitor("quit")?;
        if self.qemu.wait(QUIT) { Ok(()) } else { bail!("QEMU did not quit") }
    }
}

/// Reads until the monitor's prompt, or until it closes.
fn read_to_prompt(socket: &mut UnixStream) -> Result<String> {
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    while !text.ends_with(b"(qemu) ") {
        match socket.read(&mut buffer) {
            Ok(0) => break,
            // A monitor that quits may reset the connection.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            count => text.extend_from_slice(&buffer[..count.context("QEMU's monitor")?]),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// One connection that all later commands share: a new one costs an emulated machine half a second.
fn connect(directory: &Path, key: &Path, port: u16, service: u16) -> Result<Attached> {
    let mut command = Attached::command("ssh");
    command.args(ssh(directory, key, port).get_args()).args(["-o", "ControlMaster=yes", "-N"]);
    command.arg("-L").arg(format!("127.0.0.1:{service}:127.0.0.1:{SERVICE}"));
    command.stdout(Stdio::null()).stderr(fs::File::create(directory.join("ssh.log"))?);
    let control = directory.join("ssh");
    let _ = fs::remove_file(&control);
    let connection = Attached::start(command)?;
    match process::until(QUIT, || control.exists().then_some(())) {
        Some(()) => Ok(connection),
        None => bail!("no SSH connection: {}", process::tail(&directory.join("ssh.log"), 5)),
    }
}

fn ssh(directory: &Path, key: &Path, port: u16) -> Command {
    let mut command = Command::new("ssh");
    command.args(["-F", "none", "-l", "root", "-p", &port.to_string(), "-i"]).arg(key);
    command.args(["-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5"]);
    // The machine's key is new with each build, and nobody stands between.
    command.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
    command.arg("-o").arg(format!("ControlPath={}", directory.join("ssh").display()));
    command.arg("127.0.0.1");
    command
}

/// A port that nobody listens on now.
///
/// # Errors
/// There is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
