//! The disk of a qcow2 overlay on a raw base, as the bytes that a guest would read: to look at a linked volume again.
//!
//! ```text
//!  overlay:  absent  │ stored │ zero │ absent ...        base:  data │ hole │ data ...  end, zeros
//!  disk:     base's  │ its    │ 0    │ base's or 0
//! ```
//! What is below is told by the caller, who knows its bases; the file must name that and nothing else. Every entry of its
//! tables is checked. It leaves out overlays that lvp does not make: compressed, with parts of clusters, on other overlays.

use std::{
    fs::File,
    ops::Range,
    path::Path,
    sync::{Mutex, PoisonError},
};

use lvp_api::ErrorCode;

use super::{
    bytes::{Bytes, FileBytes},
    error::refused,
    qcow2::{Cluster, Header, check, cluster_at},
};
use crate::{
    error::{Error, Result},
    qcow2_file::{Backing, backing_of},
};

/// The disk of an overlay.
pub struct OverlayBytes {
    overlay: FileBytes,
    header: Header,
    base: FileBytes,
    /// What was found last: from this offset on, the overlay's own clusters begin with this run.
    found: Mutex<Option<(u64, Option<Range<u64>>)>>,
}

impl OverlayBytes {
    /// Opens the overlay, which must name `base`, a file of its own directory, as the raw file below it.
    ///
    /// # Errors
    /// `image_refused` when it names something else or has what lvp does not make, `image_invalid` when its tables cannot be,
    /// `input_output`.
    pub fn open(overlay: &Path, base: &Path) -> Result<Self> {
        let opening = |error| Error::io("opening", overlay, error);
        let named = File::open(overlay).and_then(|file| backing_of(&file)).map_err(opening)?;
        let name = base.file_name().unwrap_or_default().to_string_lossy();
        if named != Some(Backing::raw(&name)) || overlay.parent() != base.parent() {
            return Err(Error::new(
                ErrorCode::ImageRefused,
                format!("{} does not name {} as the raw file below it", overlay.display(), base.display()),
            )
            .hint("look at what `qemu-img info` says of it: something else than lvp has changed it"));
        }
        let of_volume = |path: &Path| {
            let length = path.metadata().map_err(|error| Error::io("looking at", path, error))?.len();
            FileBytes::of_volume(path, 0, length)
        };
        let (overlay, base) = (of_volume(overlay)?, of_volume(base)?);
        let header = Header::read_overlay(&overlay)?;
        if header.extended_l2 {
            return Err(refused(&overlay, "it maps parts of clusters, which no overlay of lvp's does"));
        }
        check(&overlay, &header)?;
        Ok(Self { overlay, header, base, found: Mutex::default() })
    }

    /// The first run of clusters at or after `offset` that the overlay itself says something of, as a range of the disk. It is
    /// asked for with every run of the base, and mostly the same.
    fn own_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((from, run)) = &*found
            && *from <= offset
            && run.as_ref().is_none_or(|run| offset <= run.start)
        {
            return Ok(run.clone());
        }
        let run = self.find_own_after(offset)?;
        *found = Some((offset, run.clone()));
        Ok(run)
    }

    fn find_own_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let (header, size) = (&self.header, self.header.cluster_size());
        let mut at = offset - offset % size;
        let mut start = None;
        while at < header.virtual_size {
            match (self.is_own(at)?, start) {
                (Own::Cluster, None) => (start, at) = (Some(at), at + size),
                (Own::Cluster, Some(_)) => at += size,
                (_, Some(_)) => break,
                (Own::Nothing, None) => at += size,
                // All that the absent table would map.
                (Own::NoTable, None) => at = (at / header.l2_reach() + 1) * header.l2_reach(),
            }
        }
        Ok(start.map(|start| start.max(offset)..at.min(header.virtual_size)))
    }

    fn is_own(&self, guest: u64) -> Result<Own> {
        Ok(match cluster_at(&self.overlay, &self.header, guest)? {
            None => Own::NoTable,
            Some(Cluster::Absent) => Own::Nothing,
            Some(_) => Own::Cluster,
        })
    }

    /// Fills `into`, which lies in one cluster, from `offset` of the disk.
    fn read_in_cluster(&self, into: &mut [u8], offset: u64) -> Result<()> {
        match cluster_at(&self.overlay, &self.header, offset)? {
            None | Some(Cluster::Absent) => read_padded(&self.base, into, offset),
            Some(Cluster::Zero | Cluster::Allocated { data: 0, .. }) => {
                into.fill(0);
                Ok(())
            }
            Some(Cluster::Allocated { stored, .. }) => {
                read_padded(&self.overlay, into, stored + offset % self.header.cluster_size())
            }
            Some(Cluster::Compressed { .. }) => {
                Err(refused(&self.overlay, "it has compressed clusters, which no overlay of lvp's has"))
            }
        }
    }
}

/// What an overlay says of a cluster.
enum Own {
    /// Nothing, and nothing of all that its table would map, because there is none.
    NoTable,
    Nothing,
    /// That it is stored or zero.
    Cluster,
}

/// Fills `into` from `offset`, with zeros behind the end.
fn read_padded(bytes: &FileBytes, into: &mut [u8], offset: u64) -> Result<()> {
    let there = bytes.len().saturating_sub(offset).min(into.len() as u64) as usize;
    let (data, behind) = into.split_at_mut(there);
    behind.fill(0);
    if data.is_empty() { Ok(()) } else { bytes.read_exact_at(data, offset) }
}

impl Bytes for OverlayBytes {
    fn len(&self) -> u64 {
        self.header.virtual_size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let left = self.header.cluster_size() - at % self.header.cluster_size();
            let length = left.min(rest.len() as u64) as usize;
            let (part, behind) = rest.split_at_mut(length);
            self.read_in_cluster(part, at)?;
            (at, rest) = (at + length as u64, behind);
        }
        Ok(())
    }

    fn data_after(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let below = self.base.data_after(offset)?.filter(|run| run.start < self.len());
        let own = self.own_after(offset)?;
        // What begins first; where the other lies over it, it is asked for again behind this one.
        let first = match (below, own) {
            (Some(below), Some(own)) if own.start <= below.start => Some(own),
            (Some(below), _) => Some(below),
            (None, own) => own,
        };
        Ok(first.map(|run| run.start..run.end.min(self.len())))
    }

    fn forget(&self, offset: u64, length: u64) {
        self.base.forget(offset, length);
        // Where its bytes of a range are, is not worth a look at its tables.
        self.overlay.forget(0, self.overlay.len());
    }

    fn name(&self) -> String {
        self.overlay.name()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, OpenOptions},
        os::unix::fs::FileExt,
        path::PathBuf,
        sync::Arc,
    };

    use e2e::images;
    use lvp_api::ContentDigest;

    use super::{
        super::{content::is_zero, verify::content_digest},
        *,
    };
    use crate::{progress::Progress, qcow2_file::write_overlay};

    const MIB: u64 = 1 << 20;
    const BASE: &str = ".lvp-0123456789abcdef.base";

    /// A base with data, and an overlay on it with a larger disk.
    fn chain(directory: &Path, base_size: u64, size: u64) -> (PathBuf, PathBuf) {
        let (base, overlay) = (directory.join(BASE), directory.join("web-1.qcow2"));
        images::raw_with_data(&base, base_size, 40, 3).unwrap();
        let file = OpenOptions::new().write(true).create_new(true).open(&overlay).unwrap();
        write_overlay(&file, &overlay, size, &Backing::raw(BASE)).unwrap();
        (base, overlay)
    }

    fn digest(disk: &Arc<dyn Bytes>) -> ContentDigest {
        content_digest(disk, 2, &Progress::default()).unwrap()
    }

    /// Asserts that the disk is what qemu-img makes of the overlay; gives its digest.
    fn assert_as_qemu_reads(overlay: &Path, base: &Path) -> ContentDigest {
        let raw = overlay.with_extension("raw");
        images::raw_from(overlay, "qcow2", &raw).unwrap();
        let wanted = fs::read(&raw).unwrap();
        let disk: Arc<dyn Bytes> = Arc::new(OverlayBytes::open(overlay, base).unwrap());
        assert_eq!(disk.len(), wanted.len() as u64);
        let mut found = vec![0; wanted.len()];
        disk.read_exact_at(&mut found, 0).unwrap();
        assert!(found == wanted, "the disk is not what qemu-img reads");
        // What is left out as a hole is zero.
        let mut at = 0;
        while let Some(run) = disk.data_after(at).unwrap() {
            assert!(run.start >= at && run.end > run.start && run.end <= disk.len(), "{at}: {run:?}");
            assert!(is_zero(&wanted[at as usize..run.start as usize]), "{at}: {run:?}");
            at = run.end;
        }
        assert!(is_zero(&wanted[at as usize..]), "behind {at}");
        let as_raw: Arc<dyn Bytes> = Arc::new(FileBytes::of_volume(&raw, 0, wanted.len() as u64).unwrap());
        let found = digest(&disk);
        assert_eq!(found, digest(&as_raw));
        found
    }

    #[test]
    fn the_disk_is_what_qemu_img_reads_whatever_was_written() {
        // A base that ends on the grid of clusters, within one, and far before the end.
        for (base_size, size) in [(8 * MIB, 8 * MIB + 128 * 1024), (5 * MIB + 4096, 11 * MIB), (3 * MIB, 520 * MIB)] {
            let directory = tempfile::tempdir().unwrap();
            let (base, overlay) = chain(directory.path(), base_size, size);
            let fresh = assert_as_qemu_reads(&overlay, &base);
            let far = format!("write -P 9 {} 8k", size - 64 * 1024);
            let across = format!("write -P 8 {} 200k", base_size - 100 * 1024);
            for command in ["write -P 7 1M 4k", "write -z 2M 300k", "write -z -u 512k 64k", &far, &across] {
                images::qemu_io(&overlay, &[command]).unwrap_or_else(|error| panic!("{command}: {error}"));
                assert_ne!(assert_as_qemu_reads(&overlay, &base), fresh, "{command}");
            }
        }
    }

    #[test]
    fn a_byte_of_the_base_is_a_byte_of_the_disk() {
        let directory = tempfile::tempdir().unwrap();
        let (base, overlay) = chain(directory.path(), 5 * MIB, 9 * MIB);
        let fresh = assert_as_qemu_reads(&overlay, &base);
        OpenOptions::new().write(true).open(&base).unwrap().write_all_at(b"changed", 3 * MIB).unwrap();
        assert_ne!(assert_as_qemu_reads(&overlay, &base), fresh);
    }

    #[test]
    fn only_the_file_that_is_told_is_below() {
        let directory = tempfile::tempdir().unwrap();
        let (base, overlay) = chain(directory.path(), MIB, MIB);
        let refused = |overlay: &Path, base: &Path| {
            let error = OverlayBytes::open(overlay, base).err().expect("a refusal");
            assert_eq!(error.code(), ErrorCode::ImageRefused, "{error:?}");
        };
        let other = directory.path().join("other.base");
        fs::copy(&base, &other).unwrap();
        refused(&overlay, &other);
        let elsewhere = tempfile::tempdir().unwrap();
        fs::copy(&base, elsewhere.path().join(BASE)).unwrap();
        refused(&overlay, &elsewhere.path().join(BASE));
        // Rebased by somebody: by another name, to another format, to nothing.
        let rebase = |arguments: &[&str]| {
            let copy = directory.path().join("copy.qcow2");
            fs::copy(&overlay, &copy).unwrap();
            let words = [&["rebase", "-u", "-f", "qcow2"], arguments, &[copy.to_str().unwrap()]].concat();
            images::run("qemu-img", &words).unwrap();
            copy
        };
        refused(&rebase(&["-b", "other.base", "-F", "raw"]), &base);
        refused(&rebase(&["-b", base.to_str().unwrap(), "-F", "raw"]), &base);
        refused(&rebase(&["-b", "/etc/passwd", "-F", "raw"]), &base);
        refused(&rebase(&["-b", BASE, "-F", "qcow2"]), &base);
        refused(&rebase(&["-b", ""]), &base);
        OverlayBytes::open(&rebase(&["-b", BASE, "-F", "raw"]), &base).unwrap();
    }
}
