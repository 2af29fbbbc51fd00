//! Where built things are kept, outside the repository, and the scratch directories of running machines.
//!
//! A built thing (an artefact) is a directory `NAME-KEY`, its key a hash of all that it was made from: other inputs,
//! another directory. It is built under another name and renamed, so it is whole or not there. It leaves out what is
//! built: `machine`, `minio`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use anyhow::{Context, Result, anyhow};

/// A built thing. While this value lives nobody removes it, though its inputs may have changed elsewhere.
pub struct Artefact {
    directory: PathBuf,
    _in_use: File,
}

impl Artefact {
    /// The directory that holds it.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file of it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// Where built things are kept: `TEST_BED_CACHE`, or `lvp-test-bed` in the user's cache directory.
///
/// # Errors
/// There is no home directory, or the directory cannot be made.
pub fn root() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let root = set("TEST_BED_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("lvp-test-bed")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/lvp-test-bed")))
        .ok_or_else(|| anyhow!("no place for built things: set TEST_BED_CACHE or HOME"))?;
    fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
    Ok(root.canonicalize()?)
}

/// The artefact `name` made from `inputs`: the one that is there, or else a new one that `build` makes in the empty
/// directory it is given. Artefacts of that name with other inputs are removed after a build, unless in use.
///
/// # Errors
/// What `build` returns; or the cache cannot be used.
pub fn artefact(name: &str, inputs: &[&str], build: impl Fn(&Path) -> Result<()>) -> Result<Artefact> {
    let root = root()?;
    let keyed = format!("{name}-{}", key(inputs));
    let directory = root.join(&keyed);
    let lock = lock_file(&root, &keyed)?;
    loop {
        lock.lock_shared()?;
        if directory.is_dir() {
            return Ok(Artefact { directory, _in_use: lock });
        }
        lock.unlock()?;
        lock.lock()?;
        // Whoever held the lock before may have built it.
        if !directory.is_dir() {
            make(&root, &keyed, &build)?;
            remove_old(&root, name, &keyed)?;
        }
        lock.unlock()?;
    }
}

fn make(root: &Path, keyed: &str, build: impl Fn(&Path) -> Result<()>) -> Result<()> {
    let partial = root.join(format!("{keyed}.partial"));
    remove(&partial)?;
    fs::create_dir(&partial)?;
    let begun = Instant::now();
    eprintln!("test bed: building {keyed} (once; kept in {})", root.display());
    build(&partial).with_context(|| format!("building {keyed}"))?;
    fs::rename(&partial, root.join(keyed))?;
    eprintln!("test bed: built {keyed} in {} s", begun.elapsed().as_secs());
    Ok(())
}

fn remove_old(root: &Path, name: &str, keyed: &str) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let old = file_name.strip_suffix(".partial").unwrap_or(&file_name);
        let is_key = |key: &str| key.len() == 16 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
        let same_name = old.strip_prefix(name).and_then(|rest| rest.strip_prefix('-')).is_some_and(is_key);
        if same_name && old != keyed && lock_file(root, old)?.try_lock().is_ok() {
            remove(&path)?;
        }
    }
    Ok(())
}

/// An empty directory that is removed when this value is dropped, or else by whoever asks for one next.
pub struct Scratch {
    directory: PathBuf,
    lock: PathBuf,
    _in_use: File,
}

impl Scratch {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = remove(&self.directory);
        let _ = fs::remove_file(&self.lock);
    }
}

/// A new scratch directory in the cache, where there is room for disks.
///
/// # Errors
/// The cache cannot be used.
pub fn scratch(purpose: &str) -> Result<Scratch> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let root = root()?;
    remove_left_behind(&root)?;
    let name = format!("run-{purpose}-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let in_use = lock_file(&root, &name)?;
    in_use.lock()?;
    let directory = root.join(&name);
    fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
    Ok(Scratch { directory, lock: root.join(format!("{name}.lock")), _in_use: in_use })
}

/// Removes the scratch directories of processes that were killed: their locks are free.
fn remove_left_behind(root: &Path) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(name) = file_name.strip_suffix(".lock").filter(|name| name.starts_with("run-")) else { continue };
        let free = File::open(&path).is_ok_and(|lock| lock.try_lock().is_ok());
        if free {
            remove(&root.join(name))?;
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

fn lock_file(root: &Path, name: &str) -> Result<File> {
    let path = root.join(format!("{name}.lock"));
    File::options().create(true).append(true).open(&path).with_context(|| format!("opening {}", path.display()))
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// FNV-1a over the inputs and their lengths: a name for a state of the sources, not a defence.
fn key(inputs: &[&str]) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for input in inputs {
        let length = input.len().to_le_bytes();
        for byte in length.iter().chain(input.as_bytes()) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_inputs_have_another_key() {
        let keys = [key(&["ab", "c"]), key(&["a", "bc"]), key(&["abc"]), key(&["ab", "c", ""])];
        for (index, one) in keys.iter().enumerate() {
            assert_eq!(one.len(), 16);
            assert!(keys[index + 1..].iter().all(|other| other != one), "{keys:?}");
        }
    }

    #[test]
    fn an_old_artefact_goes_after_a_build_but_not_one_in_use_or_of_another_name() {
        let root = std::env::temp_dir().join(format!("xtask-cache-{}", process::id()));
        fs::create_dir_all(&root).unwrap();
        let (new, old, used) = ("thing-00000000000000aa", "thing-00000000000000bb", "thing-00000000000000cc");
        let other = "thing-two-00000000000000dd";
        for name in [new, old, used, other, "thing-00000000000000ee.partial"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let in_use = lock_file(&root, used).unwrap();
        in_use.lock_shared().unwrap();
        remove_old(&root, "thing", new).unwrap();
        let there = |name: &str| root.join(name).is_dir();
        assert!(there(new) && there(used) && there(other));
        assert!(!there(old) && !there("thing-00000000000000ee.partial"));
        fs::remove_dir_all(&root).unwrap();
    }
}
