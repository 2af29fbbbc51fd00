//! VM images made on the host for the test machine: a real ext4 file system in an image of any kind.
//!
//! Small on purpose: the machine is emulated. It leaves out damaged and hostile images: `images`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use xtask::{
    cache::{self, Scratch},
    process::{self, Input},
};

const LIMIT: Duration = Duration::from_secs(300);
/// The size of each file in the file system.
const FILE: usize = 1 << 20;

/// An image on the host. Its file is gone when this is dropped.
pub struct Fixture {
    /// Its file name, which is its object's key: `NAME.qcow2`, `NAME.raw`.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// `qcow2` or `raw`.
    pub format: String,
    /// How large the disk in it is, in bytes.
    pub virtual_size: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    _scratch: Scratch,
}

impl Fixture {
    /// A qcow2 with zlib-compressed clusters: a disk of `size_mib` with `data_mib` of files in it.
    ///
    /// # Errors
    /// A tool is missing or fails.
    pub fn qcow2(name: &str, size_mib: u64, data_mib: usize) -> Result<Self> {
        Self::converted(name, size_mib, data_mib, "qcow2", &["-c"])
    }

    /// As [`Fixture::qcow2`], in a format and with further flags of `qemu-img convert`: `&["-c", "-o",
    /// "compression_type=zstd"]`, `&["-o", "cluster_size=2M"]`.
    ///
    /// # Errors
    /// As [`Fixture::qcow2`].
    pub fn converted(name: &str, size_mib: u64, data_mib: usize, format: &str, flags: &[&str]) -> Result<Self> {
        let scratch = cache::scratch("fixture")?;
        let disk = scratch.path().join("disk");
        make_file_system(scratch.path(), &disk, name, size_mib, data_mib)?;
        let name = format!("{name}.{format}");
        let path = scratch.path().join(&name);
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]).args(flags).arg(&disk).arg(&path);
        process::run(&mut convert)?;
        fs::remove_file(&disk)?;
        let sha256 = sha256(&path)?;
        Ok(Self { name, path, format: format.to_owned(), virtual_size: size_mib << 20, sha256, _scratch: scratch })
    }
}

/// An ext4 file system: half its files are noise, which does not compress, half are text.
fn make_file_system(scratch: &Path, disk: &Path, name: &str, size_mib: u64, data_mib: usize) -> Result<()> {
    let files = scratch.join("files");
    fs::create_dir(&files)?;
    let mut random = fastrand::Rng::with_seed(
        name.bytes().fold(0, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(byte.into())),
    );
    for index in 0..data_mib {
        let mut content = vec![0; FILE];
        if index % 2 == 0 {
            random.fill(&mut content);
        } else {
            let line = format!("{name}, file {index}, line {}\n", random.u64(..));
            content = line.into_bytes().into_iter().cycle().take(FILE).collect();
        }
        fs::write(files.join(format!("file-{index}")), content)?;
    }
    fs::File::create(disk)?.set_len(size_mib << 20)?;
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&files).arg(disk);
    process::run(&mut mke2fs)?;
    fs::remove_dir_all(&files)?;
    Ok(())
}

/// The SHA-256 of a file by a tool that is not ours.
fn sha256(path: &Path) -> Result<String> {
    let output = process::output(Command::new("sha256sum").arg(path), Input::Empty, LIMIT)?;
    ensure!(output.code == 0, "sha256sum: {}", output.stderr);
    Ok(output.stdout.split_whitespace().next().context("sha256sum printed nothing")?.to_owned())
}
