//! The ways to get an image onto a volume: lvp's, and what is typed without it.
//!
//! All of them end with the flush of the target. The manual way is the best that its tools can do; it need not keep the
//! image safely, which lvp's does. It leaves out which are compared.

use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Result, ensure};
use e2e::{images, images::LoopDevice, minio::Minio};
use xtask::{cache::Scratch, roots::Kind};

use crate::{
    device,
    measure::{self, Measured, Run, numbers},
};

/// Downloads, checks and converts; each part notes what it took.
const MANUAL: &str = r#"set -eu
part() { /usr/bin/time --quiet --append --output="$PARTS" --format="%e %U %S" "$@"; }
part curl --fail --silent --show-error $CURL --output "$IMAGE" "$URL"
echo "$DIGEST  $IMAGE" >"$IMAGE.sha256"
part sha256sum --check --quiet "$IMAGE.sha256"
[ -e "$TARGET" ] || truncate --size="$SIZE" "$TARGET"
part qemu-img convert -n -W -m 16 -t none -T writeback --target-is-zero -f "$FORMAT" -O raw "$IMAGE" "$TARGET"
part sync --data "$TARGET"
"#;
/// Converts an image that is there.
const CONVERT: &str = r#"set -eu
[ -e "$TARGET" ] || truncate --size="$SIZE" "$TARGET"
qemu-img convert -n -W -m 16 -t none -T writeback --target-is-zero -f "$FORMAT" -O raw "$IMAGE" "$TARGET"
sync --data "$TARGET"
"#;
/// Only downloads.
const DOWNLOAD: &str = r#"exec curl --fail --silent --show-error $CURL --output "$IMAGE" "$URL""#;

/// An image at its source.
#[derive(Debug, Clone)]
pub struct Offered {
    /// Where it is, as lvp takes it.
    pub url: String,
    /// Where it is, for curl.
    pub web_url: String,
    /// Its kind.
    pub kind: Kind,
    /// Its SHA-256.
    pub digest: String,
}

/// Where volumes are.
pub enum Place {
    /// New files of ext4.
    File,
    /// A loop device whose file has all its blocks, as a logical volume has; so many bytes of it are written.
    Device(LoopDevice, u64),
    /// A directory of a file system whose files can share blocks.
    Sharing(PathBuf),
}

/// What a part of the manual way took.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Seconds by the clock.
    pub wall: f64,
    /// Seconds of processors.
    pub processor: f64,
}

/// The directories of one case, and what all its ways are given.
pub struct Bench<'a> {
    pub scratch: &'a Scratch,
    pub minio: Option<&'a Minio>,
    pub offered: Offered,
    pub place: Place,
    pub volume: u64,
    pub workers: usize,
}

impl Bench<'_> {
    fn ours(&self, inside: &str) -> PathBuf {
        self.scratch.path().join("ours").join(inside)
    }

    fn theirs(&self, inside: &str) -> PathBuf {
        self.scratch.path().join("theirs").join(inside)
    }

    /// The volume that lvp writes.
    pub fn our_volume(&self) -> PathBuf {
        match &self.place {
            Place::File => self.ours("volumes/bench.raw"),
            Place::Device(device, _) => device.path.clone(),
            Place::Sharing(directory) => directory.join("bench.raw"),
        }
    }

    fn their_volume(&self) -> PathBuf {
        match &self.place {
            Place::File => self.theirs("volume.raw"),
            Place::Device(device, _) => device.path.clone(),
            Place::Sharing(directory) => directory.join("volume.raw"),
        }
    }

    /// lvp with nothing in its cache.
    pub fn cold(&self) -> Result<Run> {
        let ours = self.ours("");
        if ours.exists() {
            fs::remove_dir_all(&ours)?;
        }
        fs::create_dir_all(self.ours("volumes"))?;
        self.provision()
    }

    /// lvp with the image in its cache, from [`Bench::cold`].
    pub fn hit(&self) -> Result<Run> {
        for entry in fs::read_dir(self.ours("images"))? {
            let path = entry?.path();
            if path.is_file() {
                measure::warm(&path)?;
            }
        }
        self.provision()
    }

    fn provision(&self) -> Result<Run> {
        self.clean(&self.our_volume())?;
        match &self.place {
            Place::File => self.product(&self.provision_words(&self.ours("volumes")))?.run(),
            Place::Sharing(directory) => self.product(&self.provision_words(directory))?.run(),
            Place::Device(device, _) => {
                let cache = self.ours("images");
                fs::create_dir_all(&cache)?;
                let (url, kind, digest) = (&self.offered.url, self.offered.kind, &self.offered.digest);
                let digest = format!("sha256:{digest}");
                let words = device::arguments(url, kind.format(), &digest, &cache, &device.path, self.volume);
                self.with_store(Measured::new(&std::env::current_exe()?, &words)?).run()
            }
        }
    }

    fn provision_words(&self, directory: &Path) -> Vec<String> {
        let (size, target) = (self.volume.to_string(), format!("dir:{}", directory.display()));
        let (digest, format) = (format!("sha256:{}", self.offered.digest), self.offered.kind.format());
        let words =
            ["provision", &self.offered.url, "bench", "--size", &size, "--target", &target, "--checksum", &digest];
        words.into_iter().chain(["--type", format]).map(str::to_owned).collect()
    }

    /// A command of lvp, in this case's state.
    pub fn product(&self, words: &[impl AsRef<OsStr>]) -> Result<Measured> {
        let measured = Measured::new(Path::new(env!("CARGO_BIN_EXE_lvp")), words)?
            .with("LVP_STATE_DIR", self.ours("state"))
            .with("LVP_CACHE_DIR", self.ours("images"))
            .with("LVP_LIBVIRT_URI", "none")
            .with("LVP_WORKERS", self.workers.to_string());
        Ok(self.with_store(measured))
    }

    fn with_store(&self, measured: Measured) -> Measured {
        let measured = measured.with("WORKERS", self.workers.to_string());
        match self.minio {
            Some(minio) => measured
                .with("MINIO_ENDPOINT", minio.endpoint())
                .with("MINIO_ACCESS_KEY", minio.access_key())
                .with("MINIO_SECRET_KEY", minio.secret_key()),
            None => measured,
        }
    }

    /// `curl`, `sha256sum`, `qemu-img convert`; what it took, and what each part of it took.
    pub fn manual(&self) -> Result<(Run, [Part; 4])> {
        let theirs = self.theirs("");
        if theirs.exists() {
            fs::remove_dir_all(&theirs)?;
        }
        fs::create_dir_all(&theirs)?;
        self.clean(&self.their_volume())?;
        let run = self.script(MANUAL)?.run()?;
        let text = fs::read_to_string(self.theirs("parts"))?;
        let parts = text.lines().map(|line| {
            let [wall, user, system] = numbers(line)?;
            Ok(Part { wall, processor: user + system })
        });
        let parts: Vec<Part> = parts.collect::<Result<_>>()?;
        Ok((run, parts.try_into().map_err(|_| anyhow::anyhow!("the manual way has other parts: {text}"))?))
    }

    /// `qemu-img convert` of the image that [`Bench::manual`] downloaded.
    pub fn convert(&self) -> Result<Run> {
        measure::warm(&self.theirs("image"))?;
        self.clean(&self.their_volume())?;
        self.script(CONVERT)?.run()
    }

    /// `curl` alone.
    pub fn download(&self) -> Result<Run> {
        fs::create_dir_all(self.theirs(""))?;
        self.clean(&self.theirs("image"))?;
        self.script(DOWNLOAD)?.run()
    }

    fn script(&self, script: &str) -> Result<Measured> {
        let words = self.minio.map_or_else(String::new, |minio| {
            let keys = format!("{}:{}", minio.access_key(), minio.secret_key());
            format!("--aws-sigv4 aws:amz:us-east-1:s3 --user {keys} --header x-amz-content-sha256:UNSIGNED-PAYLOAD")
        });
        Ok(Measured::new(Path::new("/bin/sh"), &["-c", script])?
            .with("CURL", words)
            .with("URL", &self.offered.web_url)
            .with("DIGEST", &self.offered.digest)
            .with("FORMAT", self.offered.kind.format())
            .with("SIZE", self.volume.to_string())
            .with("IMAGE", self.theirs("image"))
            .with("PARTS", self.theirs("parts"))
            .with("TARGET", self.their_volume()))
    }

    /// No volume yet, or a device that reads zero; and nothing on its way to the disk.
    pub fn clean(&self, volume: &Path) -> Result<()> {
        match &self.place {
            Place::Device(device, written) if device.path == volume => write_zeros(&device.path, *written)?,
            _ if volume.exists() => fs::remove_file(volume)?,
            _ => {}
        }
        measure::settle();
        Ok(())
    }

    /// That lvp's volume holds this disk and nothing but zeros behind it.
    pub fn compare(&self, raw: &Path) -> Result<()> {
        let volume = self.our_volume();
        ensure!(File::open(&volume).is_ok(), "there is no volume {}", volume.display());
        let words = ["compare".as_ref(), "-f".as_ref(), "raw".as_ref(), "-F".as_ref(), "raw".as_ref()];
        let words: Vec<&OsStr> = words.into_iter().chain([raw.as_os_str(), volume.as_os_str()]).collect();
        images::run("qemu-img", &words).map(drop)
    }
}

/// Writes zeros, so that what is written keeps its blocks, and later writes have none to find.
pub fn write_zeros(path: &Path, bytes: u64) -> Result<()> {
    let (input, output, count) = ("if=/dev/zero", format!("of={}", path.display()), format!("count={}", bytes >> 20));
    images::run("dd", &[input, &output, "bs=1M", &count, "oflag=direct", "conv=notrunc,fsync", "status=none"]).map(drop)
}
