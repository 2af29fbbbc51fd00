//! Volumes that are qcow2 files: readied for the copy, which writes the disk's bytes behind the place of the tables, and made
//! images after it. It leaves out what the copy writes, and the tables themselves: `qcow2_file`.

use std::{
    fs::{File, OpenOptions},
    path::Path,
};

use crate::{
    error::{Error, Result},
    host::block::BlockTarget,
    qcow2_file::{Layout, complete},
};

/// Gives the empty file of a volume its length, and the target in it to copy to.
///
/// # Errors
/// `input_output`.
pub fn begin_qcow2(volume: &BlockTarget) -> Result<BlockTarget> {
    let layout = Layout::new(volume.size);
    let file = opened(&volume.path)?;
    // Nothing of an earlier attempt is left in it.
    file.set_len(0)
        .and_then(|()| file.set_len(layout.file_size()))
        .map_err(|error| Error::io("growing", &volume.path, error))?;
    Ok(BlockTarget { offset: layout.data_offset(), ..volume.clone() })
}

/// Makes the file, which was copied to and synced, an image.
///
/// # Errors
/// `input_output`.
pub fn end_qcow2(target: &BlockTarget) -> Result<()> {
    complete(&opened(&target.path)?, &target.path, &Layout::new(target.size), None)
}

/// Where the disk's bytes begin in a qcow2 file that lvp wrote for a volume of so many bytes.
pub fn qcow2_data_offset(size: u64) -> u64 {
    Layout::new(size).data_offset()
}

fn opened(path: &Path) -> Result<File> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|error| Error::io("opening", path, error))
}
