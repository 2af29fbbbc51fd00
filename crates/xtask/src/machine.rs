//! The LVM test machine: a Debian root file system with systemd, LVM and libvirt, as a disk image and boot files.
//!
//! A hypervisor as lvp's users have it. Making it needs root, booting it does not. It leaves out how it is started:
//! `boot`.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

use crate::{
    cache::{self, Artefact},
    process,
};

const RELEASE: &str = "bookworm";
const PACKAGES: &[&str] = &[
    // --- a system that boots
    "linux-image-cloud-amd64",
    "systemd",
    "systemd-sysv",
    "udev",
    "dbus",
    "iproute2",
    "openssh-server",
    // --- what lvp works with
    "lvm2",
    "thin-provisioning-tools",
    "libvirt-daemon-system",
    "libvirt-clients",
    "qemu-system-x86",
    "qemu-utils",
    "e2fsprogs",
    "ca-certificates",
    // --- what tests look with
    "curl",
    "jq",
    "procps",
    "psmisc",
    "attr",
    "sqlite3",
];
/// Documents that nobody reads in there.
const LEFT_OUT: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];
/// Run by mmdebstrap before anything is installed: an initial RAM disk with only what finds the root.
const SMALL_INITRD: &str = r#"mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo MODULES=list >"$1/etc/initramfs-tools/conf.d/bed"
printf 'virtio_pci\nvirtio_blk\next4\n' >"$1/usr/share/initramfs-tools/modules.d/bed""#;
/// Makes the disk image and boot files from the root file system.
const SCRIPT: &str = include_str!("machine.sh");

/// The test machine, built: `root.img`, `vmlinuz`, `initrd`, and `key` for SSH as root.
pub struct Machine {
    artefact: Artefact,
}

impl Machine {
    /// The machine, built when it is missing or its inputs changed.
    ///
    /// # Errors
    /// A tool is missing or fails; the error quotes the end of its log.
    pub fn ensure() -> Result<Self> {
        let inputs = [include_str!("machine.rs"), SCRIPT];
        Ok(Self { artefact: cache::artefact("machine", &inputs, build)? })
    }

    /// The directory that holds it.
    pub fn directory(&self) -> &Path {
        self.artefact.directory()
    }
}

fn build(directory: &Path) -> Result<()> {
    ensure!(fs::metadata("/proc/self")?.uid() == 0, "the test machine's files belong to root: only root can make them");
    let (root, log) = (directory.join("root"), directory.join("build.log"));
    let script = directory.join("machine.sh");
    fs::write(&script, SCRIPT)?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--variant=minbase", "--format=directory"]);
    mmdebstrap.args(LEFT_OUT.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    mmdebstrap.arg(format!("--setup-hook={SMALL_INITRD}"));
    mmdebstrap.arg(format!("--include={}", PACKAGES.join(",")));
    mmdebstrap.arg(RELEASE).arg(&root).args(package_sources());
    process::run_into(&log, &mut mmdebstrap)?;
    process::run_into(&log, Command::new("sh").arg(&script).arg(&root).arg(directory))?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

/// This machine's own Debian sources when it runs the same release, so that a mirror it is told to use is used;
/// otherwise none, which is mmdebstrap's default.
fn package_sources() -> Vec<PathBuf> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if !release.lines().any(|line| line == format!("VERSION_CODENAME={RELEASE}")) {
        return Vec::new();
    }
    let sources = ["/etc/apt/sources.list", "/etc/apt/sources.list.d/debian.sources"];
    sources.iter().map(PathBuf::from).filter(|path| path.is_file()).collect()
}
