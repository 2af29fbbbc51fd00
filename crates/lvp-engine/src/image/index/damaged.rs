//! An image that has not its digest any more: out of the cache with it, and its file to where it belongs.
//!
//! ```text
//!  somebody wrote to it         ─► his: the sidecar goes
//!  in use, or nobody knows      ─► stays in its place, asked about again at each look for leftovers and each start
//!  otherwise its disk spoiled it ─► set aside, until the next start
//! ```
//! It leaves out how an image is found damaged: `compare`.

use std::sync::Arc;

use super::{Index, State};
use crate::{error::Result, image::entry::Entry};

/// Whose the file of a damaged image is.
enum Whose {
    /// Nobody else's: its disk alone can have spoiled it.
    Ours,
    /// Who wrote to it, or put it there.
    Theirs,
    /// Ours, and in use, or nobody knows.
    Used(String),
}

impl Index {
    /// Takes an image whose bytes are wrong out of the cache, in use by jobs or not. The file is set aside; one that others
    /// use or wrote to stays, and is theirs.
    pub fn quarantine(&self, entry: &Entry) -> Result<()> {
        if !self.is_listed(&self.state(), entry) {
            return Ok(());
        }
        let theirs = self.whose(entry);
        let mut state = self.state();
        if !self.is_listed(&state, entry) {
            return Ok(());
        }
        let (name, digest_lost) = (entry.name(), "a cached image does not have its digest any more");
        match theirs {
            Whose::Ours => {
                let aside = self.directory.quarantine(name)?;
                tracing::error!(image = name, file = %aside.display(), "{digest_lost} and was taken out of use");
            }
            Whose::Theirs => {
                self.directory.forget(name)?;
                tracing::error!(image = name, "{digest_lost}: somebody wrote to its file, which is his from now on");
            }
            Whose::Used(why) => {
                self.directory.leave(name)?;
                tracing::error!(image = name, why, "{digest_lost}; its file stays as long as somebody may use it");
            }
        }
        state.records.remove(name);
        Ok(())
    }

    fn is_listed(&self, state: &State, entry: &Entry) -> bool {
        state.records.get(entry.name()).is_some_and(|record| Arc::ptr_eq(record, &entry.record))
    }

    /// Whose the file of a damaged image is by now.
    fn whose(&self, entry: &Entry) -> Whose {
        let Ok(facts) = entry.path().symlink_metadata() else { return Whose::Ours };
        if entry.record.sidecar().is_changed(&facts) {
            return Whose::Theirs;
        }
        match self.users.look().and_then(|look| look(entry.path())) {
            Ok(users) if users.is_empty() => Whose::Ours,
            Ok(users) => Whose::Used(users.join("; ")),
            Err(error) => Whose::Used(format!("nobody knows who uses it: {}", error.chain())),
        }
    }
}
