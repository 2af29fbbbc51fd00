//! The cache's directory: names, lock, what was there at start, and how a file appears in it or goes.
//!
//! ```text
//!  DIR/                              may be libvirt's `images` pool: other people's files lie here too
//!    debian-0123456789abcdef.qcow2   an image, if and only if it has a sidecar
//!    .lvp/
//!      lock                          held while the cache is open; holds the owner's process id
//!      <image name>.json             sidecar
//!      <key>.partial (.json)         a download under way, or left by an interrupted run
//!      <image name>.corrupt          an image that lost its digest; removed at the next start, if nobody uses it
//!      <image name>.damaged          the sidecar of one that stays in its place as long as somebody may use it
//! ```
//! A file without a sidecar is not ours and never touched. A file that somebody wrote to, or put in place of ours, is his:
//! instead of it the sidecar goes, and it is not ours from then on. It leaves out what is evicted when: see `index`.
//! Everything here blocks.

use std::{
    fs::{DirBuilder, File, Metadata},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use lvp_api::{Digest, ErrorCode, ImageFormat};
use rustix::fs::{CWD, RenameFlags};

use super::{full::could_not, partial, sidecar::Sidecar, users::Users};
use crate::{
    error::{Error, Result},
    fault,
    host::lock::Lock,
};

/// The directory for everything that is not an image.
const PRIVATE: &str = ".lvp";
/// How the name of an image ends that was set aside.
const CORRUPT: &str = ".corrupt";
/// How the sidecar of a damaged image ends that could not be set aside, because somebody used it or nobody knew.
const DAMAGED: &str = ".damaged";
/// What an interrupted run left of a download is kept so long for a job to go on with it.
const LEFT_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// Longest stem of an image's name, in bytes: with digest, format and `.json` it stays far below 255.
const LONGEST_STEM: usize = 80;
/// Digits of the digest in a name.
const SHORT_DIGEST: usize = 16;

/// What is in the directory at the start.
pub(super) struct Found {
    /// The images with their sidecars.
    pub images: Vec<(String, Sidecar)>,
    /// The downloads that can be continued.
    pub left: Vec<PathBuf>,
}

/// The opened and locked directory.
pub(super) struct Directory {
    path: PathBuf,
    private: PathBuf,
    /// Keeps the lock.
    _lock: Lock,
}

impl Directory {
    /// Opens the directory, makes what is missing, and takes its lock.
    ///
    /// # Errors
    /// `state_locked` naming the process that holds the lock, or `input_output`.
    pub fn open(path: &Path) -> Result<Self> {
        let private = path.join(PRIVATE);
        std::fs::create_dir_all(path).map_err(|error| could_not("creating", path, error))?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&private)
            .map_err(|error| could_not("creating", &private, error))?;
        let lock = Lock::acquire(&private.join("lock"), &format!("the image cache {}", path.display()))?;
        Ok(Self { path: path.to_owned(), private, _lock: lock })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the download of a key goes.
    pub fn partial(&self, key: &str) -> PathBuf {
        self.private.join(format!("{key}.partial"))
    }

    fn sidecar(&self, name: &str) -> PathBuf {
        self.private.join(format!("{name}.json"))
    }

    /// Finds the images and the downloads that can be continued, and removes everything else that an interrupted run left.
    pub fn scan(&self, users: &Users) -> Result<Found> {
        let mut found = Found { images: Vec::new(), left: Vec::new() };
        let mut corrupt = Vec::new();
        let listing = std::fs::read_dir(&self.private).map_err(|error| Error::io("reading", &self.private, error))?;
        for item in listing {
            let path = item.map_err(|error| Error::io("reading", &self.private, error))?.path();
            let Some(file_name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let ends = |endings: &[&str]| endings.iter().any(|ending| file_name.ends_with(ending));
            if ends(&[".partial"]) && can_be_continued(&path) {
                found.left.push(path);
            } else if ends(&[CORRUPT]) {
                corrupt.push(path);
            } else if ends(&[".partial", ".json.new"]) || is_orphan(&path) {
                tracing::info!(file = %path.display(), "removing what an earlier run left");
                partial::discard(&path);
            } else if !ends(&[".partial.json"])
                && let Some(name) = file_name.strip_suffix(".json")
                && let Some(sidecar) = self.check(name, &path)?
            {
                found.images.push((name.to_owned(), sidecar));
            }
        }
        self.remove_corrupt(&corrupt, users);
        if let Err(error) = self.remove_damaged(users) {
            tracing::warn!(error = error.chain(), "damaged images are kept, because nobody knows who uses them");
        }
        Ok(found)
    }

    /// Removes the damaged images that stayed where they were, once nobody uses them. One that somebody wrote to since then is
    /// his.
    ///
    /// # Errors
    /// `libvirt_unavailable`, `input_output`; what is left is looked at the next time.
    pub fn remove_damaged(&self, users: &Users) -> Result<()> {
        let mut look = None;
        for item in std::fs::read_dir(&self.private).map_err(|error| Error::io("reading", &self.private, error))? {
            let sidecar = item.map_err(|error| Error::io("reading", &self.private, error))?.path();
            let name = sidecar.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(DAMAGED));
            let Some(image) = name.map(|name| self.path.join(name)) else { continue };
            let is_ours = || Ok::<_, io::Error>(!Sidecar::read(&sidecar)?.is_changed(&image.symlink_metadata()?));
            if is_ours().unwrap_or(false) {
                let asked = match &look {
                    Some(look) => look,
                    None => look.insert(users.look()?),
                };
                if !asked(&image)?.is_empty() {
                    continue;
                }
                tracing::info!(file = %image.display(), "removing a damaged image that nobody uses any more");
                std::fs::remove_file(&image).map_err(|error| Error::io("removing", &image, error))?;
            }
            std::fs::remove_file(&sidecar).map_err(|error| Error::io("removing", &sidecar, error))?;
        }
        Ok(())
    }

    /// Removes the images that were set aside and that nobody uses. The rest waits for the next start.
    fn remove_corrupt(&self, files: &[PathBuf], users: &Users) {
        if files.is_empty() {
            return;
        }
        let look = users.look();
        for file in files {
            let asked = look.as_ref().map_err(Error::chain).and_then(|look| look(file).map_err(|error| error.chain()));
            match asked {
                Ok(users) if users.is_empty() => {
                    tracing::info!(file = %file.display(), "removing a damaged image that an earlier run set aside");
                    partial::discard(file);
                }
                Ok(users) => tracing::warn!(
                    file = %file.display(), users = users.join("; "),
                    "a damaged image is kept, because somebody uses it"
                ),
                Err(error) => tracing::warn!(
                    file = %file.display(), error,
                    "a damaged image is kept, because nobody knows who uses it"
                ),
            }
        }
    }

    /// The sidecar of an image, if the two still belong together.
    fn check(&self, name: &str, sidecar_path: &Path) -> Result<Option<Sidecar>> {
        let mut sidecar = match Sidecar::read(sidecar_path) {
            Ok(sidecar) => sidecar,
            Err(error) => {
                tracing::warn!(
                    file = %sidecar_path.display(), %error,
                    "what is remembered about a cached image cannot be read; the image is left alone and not used"
                );
                return Ok(None);
            }
        };
        let image = self.path.join(name);
        let facts = match image.symlink_metadata() {
            Ok(metadata) => Some(metadata).filter(Metadata::is_file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::info!(image = name, "a cached image was removed by someone else; forgetting it");
                return self.forget(name).map(|()| None);
            }
            Err(error) => return Err(Error::io("reading", &image, error)),
        };
        if let Some(facts) = facts.as_ref().filter(|facts| facts.len() == sidecar.size) {
            sidecar.find(facts);
            return Ok(Some(sidecar));
        }
        tracing::warn!(
            image = name, expected = sidecar.size, actual = ?facts.map(|facts| facts.len()),
            "a cached image was changed by someone else; its file is left alone and not used any more"
        );
        self.forget(name).map(|()| None)
    }

    /// Removes a sidecar, if there is one.
    pub fn forget(&self, name: &str) -> Result<()> {
        let path = self.sidecar(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", &path, error)),
            _ => Ok(()),
        }
    }

    /// Writes a sidecar.
    pub fn remember(&self, name: &str, sidecar: &Sidecar) -> Result<()> {
        let path = self.sidecar(name);
        sidecar.write(&path).map_err(|error| could_not("writing", &path, error))
    }

    /// Makes a complete download an image, under the first name that is free; gives that name. Never replaces a file.
    ///
    /// # Errors
    /// `file_in_the_way` when somebody else's files have every name that it could have.
    pub fn publish(&self, partial: &Path, file_name: &str, sidecar: &Sidecar) -> Result<String> {
        let candidates = names(file_name, &sidecar.sha256, sidecar.format);
        for name in &candidates {
            let image = self.path.join(name);
            // Looked at before the sidecar is written: a sidecar beside a stranger's file would make it ours.
            if image.symlink_metadata().is_ok() {
                tracing::warn!(file = %image.display(), "a file that lvp did not make has the name of a cached image");
                continue;
            }
            self.remember(name, sidecar)?;
            let reached = fault::point("cache.remembered").map_err(io::Error::other);
            match reached.and_then(|()| rename_new(partial, &image)) {
                Ok(()) => {
                    return self.settle(name, sidecar).map(|()| name.clone());
                }
                Err(error) => {
                    self.forget(name)?;
                    if error.kind() != io::ErrorKind::AlreadyExists {
                        return Err(could_not("renaming a download to", &image, error));
                    }
                }
            }
        }
        Err(Error::new(
            ErrorCode::FileInTheWay,
            format!(
                "files that lvp did not make have the names {} in {}",
                candidates.join(" and "),
                self.path.display()
            ),
        )
        .hint("move these files to another directory"))
    }

    /// Brings a published image to the disk. What is not reported as published is not there: nobody would know of it until
    /// the next start, and fetch it once more.
    fn settle(&self, name: &str, sidecar: &Sidecar) -> Result<()> {
        fault::point("cache.published").and_then(|()| self.sync()).inspect_err(|_| {
            if let Err(error) = self.remove(name, sidecar) {
                tracing::warn!(image = name, error = error.chain(), "an image is left until the next start");
            }
        })
    }

    fn sync(&self) -> Result<()> {
        for path in [&self.path, &self.private] {
            File::open(path)
                .and_then(|directory| directory.sync_all())
                .map_err(|error| could_not("syncing", path, error))?;
        }
        Ok(())
    }

    /// Removes an image; says whether it is gone. A file that somebody wrote to, or put there, is his: it stays, and only what
    /// is remembered goes. The file first: a sidecar without a file is forgotten at the next start, but a file without a
    /// sidecar would stay for ever.
    pub fn remove(&self, name: &str, sidecar: &Sidecar) -> Result<bool> {
        let image = self.path.join(name);
        let removed = match image.symlink_metadata() {
            Ok(facts) if sidecar.is_changed(&facts) => {
                tracing::warn!(image = name, "a cached image was changed by someone else; its file is not removed");
                return self.forget(name).map(|()| false);
            }
            Ok(_) => std::fs::remove_file(&image),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("removing", &image, error)),
            _ => self.forget(name).map(|()| true),
        }
    }

    /// Takes an image whose bytes are wrong out of use. It can be looked at until the next start.
    pub fn quarantine(&self, name: &str) -> Result<PathBuf> {
        let image = self.path.join(name);
        // One of this name may have been set aside before.
        let others = (1..u32::MAX).map(|number| format!("{name}.{number}{CORRUPT}"));
        for aside in [format!("{name}{CORRUPT}")].into_iter().chain(others) {
            let aside = self.private.join(aside);
            match rename_new(&image, &aside) {
                Ok(()) => return self.forget(name).map(|()| aside),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(Error::io("setting aside", &image, error)),
            }
        }
        self.forget(name).map(|()| image)
    }

    /// Takes an image whose bytes are wrong out of use, and leaves its file where it is: for [`Directory::remove_damaged`].
    pub fn leave(&self, name: &str) -> Result<()> {
        let sidecar = self.sidecar(name);
        std::fs::rename(&sidecar, self.private.join(format!("{name}{DAMAGED}")))
            .map_err(|error| Error::io("renaming", &sidecar, error))
    }

    /// What the file system has free for us, in bytes.
    pub fn free(&self) -> Result<u64> {
        let facts = rustix::fs::statvfs(&self.path)
            .map_err(|error| Error::io("asking for the free space of", &self.path, error.into()))?;
        Ok(facts.f_bavail.saturating_mul(facts.f_frsize))
    }

    /// Writes and removes a small file, to see whether that works. It has a name of its own: others look at the same time.
    pub fn probe(&self) -> Result<()> {
        let path = self.private.join(format!("probe-{}.partial", uuid::Uuid::new_v4()));
        let written = std::fs::write(&path, b"lvp");
        // Also where only its name was made, as on a file system that is full.
        let removed = std::fs::remove_file(&path);
        written.and(removed).map_err(|error| could_not("writing to", &self.private, error))
    }
}

/// Whether a partial download is worth keeping for the job that will come back for it.
pub(super) fn can_be_continued(path: &Path) -> bool {
    let changed = path.metadata().and_then(|metadata| metadata.modified());
    let age = changed.map(|changed| SystemTime::now().duration_since(changed).unwrap_or_default());
    age.is_ok_and(|age| age < LEFT_FOR) && partial::can_be_continued(path)
}

/// Whether this is what is known of a partial download that is gone.
fn is_orphan(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.strip_suffix(".json").is_some_and(|of| of.ends_with(".partial") && !Path::new(of).exists())
}

/// Renames without replacing.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without that flag (NFS) have links, which replace nothing either.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)
        }
        other => Ok(other?),
    }
}

/// The names that an image may have, in order of preference.
pub(super) fn names(file_name: &str, sha256: &Digest, format: ImageFormat) -> [String; 2] {
    let stem = stem(file_name);
    [&sha256.hex()[..SHORT_DIGEST], sha256.hex()].map(|digest| format!("{stem}-{digest}.{}", format.name()))
}

/// The readable part of a name: letters, digits and `+ _ . -`, not hidden, not an option.
fn stem(file_name: &str) -> String {
    let plain = [".gz", ".zst", ".xz"].iter().find_map(|ending| file_name.strip_suffix(ending)).unwrap_or(file_name);
    let bare = [".qcow2", ".raw", ".img"].iter().find_map(|ending| plain.strip_suffix(ending));
    let safe: String = bare
        .unwrap_or(file_name)
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "+_.-".contains(c) { c } else { '_' })
        .take(LONGEST_STEM)
        .collect();
    let trimmed = safe.trim_start_matches(['.', '-']);
    if trimmed.is_empty() { "image".to_owned() } else { trimmed.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable_and_safe() {
        for (file_name, expected) in [
            ("debian-12.qcow2", "debian-12"),
            ("disk.img", "disk"),
            ("disk.img.xz", "disk"),
            ("debian-12.raw.zst", "debian-12"),
            ("notes.gz", "notes.gz"),
            ("../../etc/passwd", "_.._etc_passwd"),
            (".hidden.raw", "hidden"),
            ("-rf", "rf"),
            ("", "image"),
            ("ü b.qcow2", "__b"),
        ] {
            assert_eq!(stem(file_name), expected);
        }
        assert_eq!(stem(&"x".repeat(300)).len(), LONGEST_STEM);
    }

    #[test]
    fn one_process_owns_a_cache() {
        let root = tempfile::tempdir().unwrap();
        let first = Directory::open(root.path()).unwrap();
        let error = Directory::open(root.path()).err().unwrap();
        assert_eq!(error.code(), ErrorCode::StateLocked);
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error:?}");
        drop(first);
        assert!(Directory::open(root.path()).is_ok());
    }

    #[test]
    fn a_rename_never_replaces() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("a"), root.path().join("b"));
        std::fs::write(&from, "a").unwrap();
        std::fs::write(&to, "b").unwrap();
        assert_eq!(rename_new(&from, &to).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&to).unwrap(), b"b");
    }
}
