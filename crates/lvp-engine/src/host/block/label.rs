//! Whether a device is a physical volume of LVM: then it may be part of a volume group though nothing uses it now.
//!
//! The label stands in one of the first four sectors (`lib/label/label.h` of LVM: `LABEL_ID`, `LABEL_SCAN_SECTORS`), with its
//! type, which is what `wipefs` takes away, and the identifier behind it. It leaves out whether the group is known on this host, and what is in it.

use std::{fs::File, io::Read, path::Path};

use crate::error::{Error, Result};

const SECTOR: usize = 512;
const SECTORS: usize = 4;
const LABEL: &[u8] = b"LABELONE";
/// The type of the label, and where it stands in it.
const TYPE: (usize, &[u8]) = (24, b"LVM2 001");
/// Where the label says how far behind its begin the physical volume's header is, which begins with the identifier.
const OFFSET_AT: usize = 20;
const IDENTIFIER: usize = 32;

/// The identifier of the physical volume that the device is, as LVM writes it; of one that has a label and none, empty.
///
/// # Errors
/// `input_output`.
pub fn physical_volume(path: &Path) -> Result<Option<String>> {
    let mut head = Vec::with_capacity(SECTOR * SECTORS);
    File::open(path)
        .and_then(|file| file.take((SECTOR * SECTORS) as u64).read_to_end(&mut head))
        .map_err(|error| Error::io("reading", path, error))?;
    let is_label = |sector: &&[u8]| sector.starts_with(LABEL) && sector[TYPE.0.min(sector.len())..].starts_with(TYPE.1);
    Ok(head.chunks(SECTOR).find(is_label).map(|sector| identifier(sector).unwrap_or_default()))
}

fn identifier(sector: &[u8]) -> Option<String> {
    let offset = u32::from_le_bytes(sector.get(OFFSET_AT..OFFSET_AT + 4)?.try_into().ok()?) as usize;
    let letters = sector.get(offset..offset.checked_add(IDENTIFIER)?)?;
    // As `pvs -o pv_uuid` groups them.
    let groups = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32];
    let readable = letters.iter().all(u8::is_ascii_alphanumeric);
    readable.then(|| groups.map(|group| String::from_utf8_lossy(&letters[group]).into_owned()).join("-"))
}
