//! Volumes that are qcow2 files: readied for the copy, which writes the disk's bytes behind the place of the tables, and made
//! images after it. Both work on a file that is open already: what is at its path may be somebody else's by then.
//! It leaves out what the copy writes, and the tables themselves: `qcow2_file`.

use std::fs::File;

use lvp_api::ErrorCode;

use crate::{
    error::{Error, Result},
    host::block::{BlockTarget, OpenTarget},
    qcow2_file::{Layout, complete},
};

/// Gives the file of a volume that was just made its length, and the target in it to copy to.
///
/// # Errors
/// `input_output`; `file_in_the_way` when something is in it: then it is not the one that was made.
pub fn begin_qcow2(volume: &BlockTarget, made: &File) -> Result<BlockTarget> {
    let (layout, path) = (Layout::new(volume.size), &volume.path);
    let length = made.metadata().map_err(|error| Error::io("looking at", path, error))?.len();
    if length != 0 {
        return Err(Error::new(
            ErrorCode::FileInTheWay,
            format!(
                "{} is not the empty file that the job made: it has {length} bytes, and was left as it is",
                path.display()
            ),
        )
        .hint("find out who put it there; then choose another volume name"));
    }
    made.set_len(layout.file_size()).map_err(|error| Error::io("growing", path, error))?;
    Ok(BlockTarget { offset: layout.data_offset(), ..volume.clone() })
}

/// Makes the file that is held, which was copied to and synced, an image.
///
/// # Errors
/// `input_output`.
pub fn end_qcow2(held: &OpenTarget) -> Result<()> {
    let target = held.target();
    complete(&held.reopened()?, &target.path, &Layout::new(target.size), None)
}

/// Where the disk's bytes begin in a qcow2 file that lvp wrote for a volume of so many bytes.
pub fn qcow2_data_offset(size: u64) -> u64 {
    Layout::new(size).data_offset()
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, OpenOptions},
        path::Path,
    };

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn target(path: &Path) -> BlockTarget {
        BlockTarget { path: path.to_owned(), offset: 0, size: SIZE, reads_zero: true }
    }

    fn open(path: &Path) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    #[test]
    fn a_file_put_in_place_of_a_qcow2_volume_at_its_end_is_not_written() {
        let directory = tempfile::tempdir().unwrap();
        let (web, aside) = (directory.path().join("web.qcow2"), directory.path().join("aside"));
        let held = OpenTarget::open(&begin_qcow2(&target(&web), &open(&web)).unwrap()).unwrap();
        held.sync().unwrap();
        fs::rename(&web, &aside).unwrap();
        // Longer than ours, and shorter.
        for stranger in [vec![9; 4 << 20], vec![9; 4096]] {
            fs::write(&web, &stranger).unwrap();
            end_qcow2(&held).unwrap();
            assert!(fs::read(&web).unwrap() == stranger, "the stranger was written");
        }
        assert_eq!(fs::read(&aside).unwrap()[..4], *b"QFI\xfb", "the one that was held is an image");
        fs::remove_file(&aside).unwrap();
        end_qcow2(&held).unwrap();
        assert!(fs::read(&web).unwrap() == [9; 4096]);
    }

    #[test]
    fn a_file_with_something_in_it_is_not_begun() {
        let directory = tempfile::tempdir().unwrap();
        let web = directory.path().join("web.qcow2");
        fs::write(&web, "x").unwrap();
        assert_eq!(begin_qcow2(&target(&web), &open(&web)).unwrap_err().code(), ErrorCode::FileInTheWay);
        assert_eq!(fs::read(&web).unwrap(), b"x");
    }
}
