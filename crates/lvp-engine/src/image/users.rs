//! Who uses a file of the cache beside this process: asked before one is evicted, deleted, set aside, or removed from there.
//!
//! The cache may be libvirt's pool `images`, where people take files as disks and as backing files of disks. Who knows of
//! that is not the cache's business: it is told whom to ask ([`Users::new`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::error::{Error, Result};

/// Says who uses a file, in words; empty where nobody does. Blocks, and is never asked under a lock.
pub type Look = Box<dyn Fn(&Path) -> Result<Vec<String>> + Send>;

/// Whom to ask.
#[derive(Clone)]
pub struct Users {
    begin: Arc<dyn Fn() -> Result<Look> + Send + Sync>,
}

impl Users {
    /// `begin` finds out once what is the same for all files, as the disks of all domains.
    pub fn new(begin: impl Fn() -> Result<Look> + Send + Sync + 'static) -> Self {
        Self { begin: Arc::new(begin) }
    }

    /// Begins to look: what is asked of it is as of now.
    ///
    /// # Errors
    /// `libvirt_unavailable`: then nobody knows.
    pub fn look(&self) -> Result<Look> {
        (self.begin)()
    }
}

impl fmt::Debug for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Users").finish_non_exhaustive()
    }
}

/// What is known of who uses images, while room is made for one download.
#[derive(Default)]
pub(super) struct Asked {
    look: Option<Look>,
    /// The names of those that nobody uses.
    pub free: BTreeSet<String>,
    /// The names of the others, with who uses them.
    pub used: BTreeMap<String, String>,
    /// How many had to go.
    pub evicted: usize,
}

impl Asked {
    /// Asks about images, by their names and places.
    ///
    /// # Errors
    /// `libvirt_unavailable`, `input_output`: nobody knows.
    pub fn ask(&mut self, whom: &Users, images: impl Iterator<Item = (String, PathBuf)>) -> Result<()> {
        let look = match self.look.take() {
            Some(look) => look,
            None => whom.look().map_err(|error| {
                let why = "the image cache has no room unless an image goes, and nobody knows which ones domains use";
                Error::new(error.code(), why).source(error).hint(
                    "check that libvirtd (or virtqemud and virtstoraged) runs; or raise LVP_CACHE_MAX_BYTES, or move the \
                     cache to a larger file system",
                )
            })?,
        };
        for (name, path) in images {
            let users = look(&path)?;
            if users.is_empty() {
                self.free.insert(name);
            } else {
                tracing::info!(image = name, users = users.join("; "), "a cached image is not evicted: others use it");
                self.used.insert(name, users.join("; "));
            }
        }
        self.look = Some(look);
        Ok(())
    }
}
