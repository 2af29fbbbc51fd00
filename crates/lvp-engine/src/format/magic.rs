//! What a file says of itself by its first (or last) bytes, against what its user declared.
//!
//! A declaration is never corrected from the content: a guest can write any header into a raw disk. A contradiction
//! is refused, so that neither a compressed image nor another format lands on a volume as it is. The disk in a compressed
//! image is held to the same.

use lvp_api::{ErrorCode, ImageFormat};

use super::bytes::Bytes;
use crate::error::{Error, Result};

const QCOW2: &str = "a qcow2 image";
const GZIP: &str = "compressed with gzip";
const XZ: &str = "compressed with xz";
const ZSTD: &str = "compressed with zstd";

/// Formats that no raw disk begins with: what they are, where they say it, and how.
const KNOWN: &[(&str, usize, &[u8])] = &[
    (QCOW2, 0, b"QFI\xfb"),
    ("a VMDK image", 0, b"KDMV"),
    ("a VMDK image", 0, b"COWD"),
    ("a VMDK descriptor", 0, b"# Disk DescriptorFile"),
    ("a VDI image", 64, b"\x7f\x10\xda\xbe"),
    ("a VHDX image", 0, b"vhdxfile"),
    ("a VHD image", 0, b"conectix"),
    ("a QED image", 0, b"QED\0"),
    ("a Parallels image", 0, b"WithoutFreeSpace"),
    ("a Parallels image", 0, b"WithouFreSpacExt"),
    (GZIP, 0, b"\x1f\x8b\x08"),
    (XZ, 0, b"\xfd7zXZ\0"),
    (ZSTD, 0, b"\x28\xb5\x2f\xfd"),
    ("compressed with bzip2", 0, b"BZh"),
    ("compressed with lz4", 0, b"\x04\x22\x4d\x18"),
    ("a zip archive", 0, b"PK\x03\x04"),
    ("a 7z archive", 0, b"7z\xbc\xaf\x27\x1c"),
    ("an HTML page", 0, b"<!DOCTYPE"),
    ("an HTML page", 0, b"<!doctype"),
    ("an HTML page", 0, b"<html"),
];

/// A fixed VHD is a raw disk with one sector after it that begins so.
const VHD_FOOTER: &[u8] = b"conectix";
const VHD: &str = "a VHD image";

/// As much of a head as is looked at, in bytes.
pub const HEAD: usize = 128;
/// As much of a tail as is looked at, in bytes.
pub const SECTOR: usize = 512;

/// Checks that the file is of the declared format, as far as its first bytes say.
///
/// # Errors
/// `image_invalid` for an empty file, `image_type_mismatch` for a contradiction.
pub fn check(bytes: &dyn Bytes, declared: ImageFormat) -> Result<()> {
    if bytes.is_empty() {
        return Err(Error::new(ErrorCode::ImageInvalid, format!("{} is empty", bytes.name()))
            .hint("fetch or build the image again"));
    }
    let mut head = vec![0; (HEAD as u64).min(bytes.len()) as usize];
    bytes.read_exact_at(&mut head, 0)?;
    let found = known(&head);
    let found = match (wanted(declared), found) {
        (Some(wanted), Some(found)) if wanted == found => return Ok(()),
        (Some(ZSTD), None) if is_skippable_frame(&head) => return Ok(()),
        (Some(wanted), None) => format!("not {wanted}: its first bytes differ"),
        (None, None) => return Ok(()),
        (_, Some(found)) => found.to_owned(),
    };
    let hint = hint(declared, &found);
    Err(mismatch(bytes, declared, &format!("it is {found}")).hint(hint))
}

/// Checks the first bytes of the disk in a compressed raw image.
///
/// # Errors
/// `image_type_mismatch` when they are those of another format.
pub fn check_disk_head(bytes: &dyn Bytes, declared: ImageFormat, head: &[u8]) -> Result<()> {
    known(&head[..head.len().min(HEAD)]).map_or(Ok(()), |found| Err(disk_is(bytes, declared, found)))
}

/// Checks the last sector of the disk in a compressed raw image.
///
/// # Errors
/// `image_type_mismatch` when it is that of another format.
pub fn check_disk_tail(bytes: &dyn Bytes, declared: ImageFormat, tail: &[u8; SECTOR]) -> Result<()> {
    if tail.starts_with(VHD_FOOTER) { Err(disk_is(bytes, declared, VHD)) } else { Ok(()) }
}

/// What the first bytes say that it is.
fn known(head: &[u8]) -> Option<&'static str> {
    let says = |(_, at, magic): &&(&str, usize, &[u8])| head.get(*at..).is_some_and(|rest| rest.starts_with(magic));
    KNOWN.iter().find(says).map(|(what, ..)| *what)
}

/// Whether a frame begins that has no data in it; zstd may put such ones before the data (RFC 8878, section 3.1.2).
fn is_skippable_frame(head: &[u8]) -> bool {
    matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// What the first bytes must say; a raw disk's must say nothing.
fn wanted(declared: ImageFormat) -> Option<&'static str> {
    match declared {
        ImageFormat::Raw => None,
        ImageFormat::Qcow2 => Some(QCOW2),
        ImageFormat::RawGz => Some(GZIP),
        ImageFormat::RawZst => Some(ZSTD),
        ImageFormat::RawXz => Some(XZ),
    }
}

/// Checks the same of a raw disk's last bytes.
///
/// # Errors
/// `image_type_mismatch` for a contradiction.
pub fn check_end(bytes: &dyn Bytes, declared: ImageFormat) -> Result<()> {
    let Some(offset) = bytes.len().checked_sub(SECTOR as u64) else { return Ok(()) };
    let mut footer = vec![0; VHD_FOOTER.len()];
    bytes.read_exact_at(&mut footer, offset)?;
    if footer != VHD_FOOTER {
        return Ok(());
    }
    Err(mismatch(bytes, declared, &format!("it is {VHD}")).hint(hint(declared, VHD)))
}

fn hint(declared: ImageFormat, found: &str) -> String {
    let compressed = [ImageFormat::RawGz, ImageFormat::RawZst, ImageFormat::RawXz];
    match (declared, compressed.into_iter().find(|format| wanted(*format) == Some(found))) {
        (ImageFormat::Qcow2, Some(format)) => {
            format!("decompress it before it is uploaded; a compressed raw disk is of the type {format}")
        }
        (_, Some(format)) => format!("declare the type {format}"),
        _ if found == QCOW2 => format!("declare the type {}", ImageFormat::Qcow2),
        _ if found.starts_with("not") => "declare the type raw if it is a raw disk".to_owned(),
        _ if found.starts_with("compressed") => {
            "decompress it before it is uploaded, or compress it with zstd".to_owned()
        }
        _ if found.ends_with("page") => "check the URL: it seems to answer with a web page".to_owned(),
        _ => "convert it with `qemu-img convert -O qcow2`".to_owned(),
    }
}

/// The disk in a compressed image is not what it should be.
fn disk_is(bytes: &dyn Bytes, declared: ImageFormat, found: &str) -> Error {
    let hint = match found {
        QCOW2 => "decompress it and declare the type qcow2; `qemu-img convert -c` compresses inside the image",
        _ if found.starts_with("compressed") => "decompress it once before it is uploaded",
        _ => "decompress it and convert it with `qemu-img convert -O qcow2`",
    };
    mismatch(bytes, declared, &format!("the disk in it is {found}")).hint(hint)
}

fn mismatch(bytes: &dyn Bytes, declared: ImageFormat, but: &str) -> Error {
    Error::new(ErrorCode::ImageTypeMismatch, format!("{} was declared as {declared}, but {but}", bytes.name()))
        .detail("declared", declared.name())
}
