//! Debian root file systems as disk images: what benchmarks copy, since the cost of a copy depends on real content.
//!
//! Each is a bootable installation's files on ext4, as a raw disk and as three kinds of qcow2, made as `qemu-img convert`
//! makes them by default. Making them needs root, for the owners of files. It leaves out boot files and partitions: no
//! benchmark boots them.

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

/// A root file system.
#[derive(Debug, Clone, Copy)]
pub struct Root {
    /// Its name.
    pub name: &'static str,
    /// The size of its disk, in bytes.
    pub disk: u64,
    packages: &'static [&'static str],
}

/// About 400 MB of data: a small cloud image.
pub const SMALL: Root = Root {
    name: "small",
    disk: 1 << 30,
    packages: &[
        "linux-image-cloud-amd64",
        "systemd-sysv",
        "openssh-server",
        "cloud-init",
        "python3",
        "ca-certificates",
    ],
};

/// More than 1 GiB of data: a server with its tools.
pub const LARGE: Root = Root {
    name: "large",
    disk: 2 << 30,
    packages: &[
        "linux-image-cloud-amd64",
        "systemd-sysv",
        "openssh-server",
        "cloud-init",
        "build-essential",
        "clang",
        "git",
        "postgresql",
        "qemu-system-x86",
    ],
};

/// How a disk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// qcow2 with clusters that zlib compressed.
    Zlib,
    /// qcow2 with clusters that Zstandard compressed.
    Zstd,
    /// qcow2 without compression.
    Plain,
    /// The disk itself.
    Raw,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Zlib, Self::Zstd, Self::Plain, Self::Raw];

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib qcow2",
            Self::Zstd => "zstd qcow2",
            Self::Plain => "plain qcow2",
            Self::Raw => "raw",
        }
    }

    /// What `qemu-img` and lvp call its format.
    pub fn format(self) -> &'static str {
        if self == Self::Raw { "raw" } else { "qcow2" }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Zlib => "zlib.qcow2",
            Self::Zstd => "zstd.qcow2",
            Self::Plain => "plain.qcow2",
            Self::Raw => "root.raw",
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Zlib => &["-c"],
            Self::Zstd => &["-c", "-o", "compression_type=zstd"],
            Self::Plain | Self::Raw => &[],
        }
    }
}

/// The images of one root, made.
pub struct Images {
    /// The root.
    pub root: Root,
    artefact: Artefact,
}

impl Images {
    /// The file of one kind.
    pub fn path(&self, kind: Kind) -> PathBuf {
        self.artefact.join(kind.file())
    }
}

/// The images of a root, made when they are missing.
///
/// # Errors
/// A tool is missing or fails; the error quotes the end of its log.
pub fn ensure(root: Root) -> Result<Images> {
    let (disk, packages) = (root.disk.to_string(), root.packages.join(","));
    let inputs = [RELEASE, root.name, disk.as_str(), packages.as_str()];
    let artefact = cache::artefact(&format!("root-{}", root.name), &inputs, |directory| build(root, directory))?;
    Ok(Images { root, artefact })
}

fn build(root: Root, directory: &Path) -> Result<()> {
    ensure!(
        fs::metadata("/proc/self")?.uid() == 0,
        "the files of a root belong to many users: only root can make them"
    );
    let (tree, log) = (directory.join("tree"), directory.join("build.log"));
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--variant=apt", "--format=directory"]);
    mmdebstrap.arg(format!("--include={}", root.packages.join(",")));
    mmdebstrap.arg(RELEASE).arg(&tree).args(package_sources());
    process::run_into(&log, &mut mmdebstrap)?;
    let raw = directory.join(Kind::Raw.file());
    fs::File::create(&raw)?.set_len(root.disk)?;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-L", root.name, "-d"]).arg(&tree).arg(&raw);
    process::run_into(&log, &mut mke2fs)?;
    fs::remove_dir_all(&tree)?;
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Raw) {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args(kind.flags());
        process::run_into(&log, convert.arg(&raw).arg(directory.join(kind.file())))?;
    }
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
