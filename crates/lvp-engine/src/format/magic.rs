//! What a file says of itself by its first (or last) bytes, against what its user declared.
//!
//! A declaration is never corrected from the content: a guest can write any header into a raw disk. A contradiction
//! is refused, so that neither a compressed image nor another format lands on a volume as it is.

use lvp_api::{ErrorCode, ImageFormat};

use super::bytes::Bytes;
use crate::error::{Error, Result};

/// The first bytes of a qcow2 file (qcow2 specification, section Header).
pub const QCOW2: &[u8] = b"QFI\xfb";

/// Formats that no raw disk begins with: what they are, where they say it, and how.
const KNOWN: &[(&str, usize, &[u8])] = &[
    ("a VMDK image", 0, b"KDMV"),
    ("a VMDK image", 0, b"COWD"),
    ("a VMDK descriptor", 0, b"# Disk DescriptorFile"),
    ("a VDI image", 64, b"\x7f\x10\xda\xbe"),
    ("a VHDX image", 0, b"vhdxfile"),
    ("a VHD image", 0, b"conectix"),
    ("a QED image", 0, b"QED\0"),
    ("a Parallels image", 0, b"WithoutFreeSpace"),
    ("a Parallels image", 0, b"WithouFreSpacExt"),
    ("compressed with gzip", 0, b"\x1f\x8b\x08"),
    ("compressed with xz", 0, b"\xfd7zXZ\0"),
    ("compressed with zstd", 0, b"\x28\xb5\x2f\xfd"),
    ("compressed with bzip2", 0, b"BZh"),
    ("compressed with lz4", 0, b"\x04\x22\x4d\x18"),
    ("a zip archive", 0, b"PK\x03\x04"),
    ("a 7z archive", 0, b"7z\xbc\xaf\x27\x1c"),
    ("an HTML page", 0, b"<!DOCTYPE"),
    ("an HTML page", 0, b"<!doctype"),
    ("an HTML page", 0, b"<html"),
];

/// A fixed VHD is a raw disk with one sector after it that begins so.
const VHD_FOOTER: (&[u8], u64) = (b"conectix", 512);

/// As much of a file's head as is looked at.
const HEAD: u64 = 128;

/// Checks that the file is of the declared format, as far as its first bytes say.
///
/// # Errors
/// `image_invalid` for an empty file, `image_type_mismatch` for a contradiction.
pub fn check(bytes: &dyn Bytes, declared: ImageFormat) -> Result<()> {
    if bytes.is_empty() {
        return Err(Error::new(ErrorCode::ImageInvalid, format!("{} is empty", bytes.name()))
            .hint("fetch or build the image again"));
    }
    let mut head = vec![0; HEAD.min(bytes.len()) as usize];
    bytes.read_exact_at(&mut head, 0)?;
    let is_qcow2 = head.starts_with(QCOW2);
    let other = KNOWN.iter().find(|(_, at, magic)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    match declared {
        ImageFormat::Qcow2 if is_qcow2 => Ok(()),
        ImageFormat::Qcow2 => {
            Err(mismatch(bytes, declared, other.map_or("not a qcow2 image: its first bytes differ", |(what, ..)| what)))
        }
        ImageFormat::Raw if is_qcow2 => Err(mismatch(bytes, declared, "a qcow2 image")),
        ImageFormat::Raw => match other {
            Some((what, ..)) => Err(mismatch(bytes, declared, what)),
            None => Ok(()),
        },
    }
}

/// Checks the same of a raw disk's last bytes.
///
/// # Errors
/// `image_type_mismatch` for a contradiction.
pub fn check_end(bytes: &dyn Bytes, declared: ImageFormat) -> Result<()> {
    let (magic, distance) = VHD_FOOTER;
    let Some(offset) = bytes.len().checked_sub(distance) else { return Ok(()) };
    let mut footer = vec![0; magic.len()];
    bytes.read_exact_at(&mut footer, offset)?;
    if footer == magic { Err(mismatch(bytes, declared, "a VHD image")) } else { Ok(()) }
}

fn mismatch(bytes: &dyn Bytes, declared: ImageFormat, found: &str) -> Error {
    let hint = match (declared, found) {
        (ImageFormat::Raw, "a qcow2 image") => "declare the type qcow2".to_owned(),
        (ImageFormat::Qcow2, found) if found.starts_with("not") => {
            "declare the type raw if it is a raw disk".to_owned()
        }
        (_, found) if found.starts_with("compressed") => "decompress it before it is uploaded".to_owned(),
        (_, found) if found.ends_with("page") => "check the URL: it seems to answer with a web page".to_owned(),
        _ => "convert it with `qemu-img convert -O qcow2`".to_owned(),
    };
    Error::new(ErrorCode::ImageTypeMismatch, format!("{} was declared as {declared}, but it is {found}", bytes.name()))
        .hint(hint)
        .detail("declared", declared.name())
}
