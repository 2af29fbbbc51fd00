//! Headers and tables made by hand: each refusal of the gate has a test named after it.

use std::{fs, sync::Arc};

use lvp_api::{ErrorCode, ImageFormat};

use super::{Memory, assert_as_qemu, room};
use crate::format::{Image, inspect};

const CLUSTER: u64 = 64 << 10;
const ZSTD: u8 = 1;

/// A small image of version 3: header, refcount table, refcount block, L1, L2, one cluster of data.
struct Crafted(Vec<u8>);

impl Crafted {
    const REFCOUNTS: u64 = CLUSTER;
    const L1: u64 = 3 * CLUSTER;
    const L2: u64 = 4 * CLUSTER;
    const DATA: u64 = 5 * CLUSTER;
    const COPIED: u64 = 1 << 63;
    const COMPRESSED: u64 = 1 << 62;
    const EXTENSIONS: u64 = 104;

    fn new() -> Self {
        let mut image = Self(vec![0; 6 * CLUSTER as usize]);
        image.put(0, b"QFI\xfb");
        image.u32(4, 3);
        image.u32(20, 16);
        image.u64(24, 1 << 20);
        image.u32(36, 1);
        image.u64(40, Self::L1);
        image.u64(48, Self::REFCOUNTS);
        image.u32(56, 1);
        image.u32(96, 4);
        image.u32(100, 104);
        image.u64(Self::REFCOUNTS, 2 * CLUSTER);
        for cluster in 0..6 {
            image.put(2 * CLUSTER + cluster * 2, &[0, 1]);
        }
        image.u64(Self::L1, Self::L2 | Self::COPIED);
        image.u64(Self::L2 + 8 * 3, Self::DATA | Self::COPIED);
        image.put(Self::DATA, &[0x5a; CLUSTER as usize]);
        image
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn u32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    fn u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    /// Turns it into an image with extended L2 entries and this one entry.
    fn extended(&mut self, entry: u64, bitmap: u64) {
        self.u64(72, 1 << 4);
        self.put(Self::L2, &[0; CLUSTER as usize]);
        self.u64(Self::L2, entry);
        self.u64(Self::L2 + 8, bitmap);
    }

    fn extension(&mut self, kind: u32, length: u32) {
        self.u32(Self::EXTENSIONS, kind);
        self.u32(Self::EXTENSIONS + 4, length);
    }
}

fn assert_refused(bytes: Vec<u8>, declared: ImageFormat, code: ErrorCode, words: &str) {
    match Image::open(Arc::new(Memory(bytes)), declared) {
        Ok(_) => panic!("accepted"),
        Err(error) => {
            assert_eq!(error.code(), code, "{error:?}");
            assert!(error.to_string().contains(words), "{error:?} does not say '{words}'");
            assert!(error.to_body().hint.is_some(), "{error:?} has no hint");
            assert!(!error.retryable());
        }
    }
}

macro_rules! refused {
    ($($name:ident: $code:ident, $words:literal, |$image:ident| $change:expr;)+) => {$(
        #[test]
        fn $name() {
            let mut $image = Crafted::new();
            $change;
            assert_refused($image.0, ImageFormat::Qcow2, ErrorCode::$code, $words);
        }
    )+};
}

#[test]
fn the_crafted_image_is_in_order() {
    let (directory, path) = room("crafted.qcow2");
    fs::write(&path, Crafted::new().0).unwrap();
    assert_as_qemu(directory.path(), &path, ImageFormat::Qcow2, "crafted");
    let mut extended = Crafted::new();
    extended.extended(Crafted::DATA, 0xf0 | 0xf << 32);
    fs::write(&path, extended.0).unwrap();
    assert_as_qemu(directory.path(), &path, ImageFormat::Qcow2, "crafted, extended");
}

refused! {
    version_1: ImageRefused, "version 1", |image| image.u32(4, 1);
    version_4: ImageRefused, "version 4", |image| image.u32(4, 4);
    clusters_too_small: ImageInvalid, "2^8 bytes", |image| image.u32(20, 8);
    clusters_too_large: ImageInvalid, "2^22 bytes", |image| image.u32(20, 22);
    clusters_beyond_any_shift: ImageInvalid, "2^4294967295 bytes", |image| image.u32(20, u32::MAX);
    backing_file: ImageRefused, "backing file", |image| { image.u64(8, 200); image.u32(16, 5) };
    encryption_aes: ImageRefused, "encrypted", |image| image.u32(32, 1);
    encryption_luks: ImageRefused, "encrypted", |image| image.u32(32, 2);
    encryption_extension: ImageRefused, "encrypted", |image| image.extension(0x0537_be77, 16);
    data_file_feature: ImageRefused, "in another file", |image| image.u64(72, 1 << 2);
    data_file_extension: ImageRefused, "in another file", |image| image.extension(0x4441_5441, 8);
    dirty: ImageRefused, "dirty", |image| image.u64(72, 1);
    corrupt: ImageInvalid, "corrupt", |image| image.u64(72, 2);
    unknown_features: ImageRefused, "(bits 5, 63)", |image| image.u64(72, 1 << 5 | 1 << 63);
    unknown_compression: ImageRefused, "compression type 2", |image| {
        image.u64(72, 1 << 3);
        image.u32(100, 112);
        image.put(104, &[2]);
    };
    compression_without_feature: ImageInvalid, "contradicts", |image| {
        image.u32(100, 112);
        image.put(104, &[ZSTD]);
    };
    feature_without_compression: ImageInvalid, "contradicts", |image| image.u64(72, 1 << 3);
    header_too_short: ImageInvalid, "says to have 103 bytes", |image| image.u32(100, 103);
    header_longer_than_a_cluster: ImageInvalid, "says to have 65544 bytes", |image| image.u32(100, 65544);
    extension_too_long: ImageInvalid, "passes the first cluster", |image| image.extension(0x1234, CLUSTER as u32);
    extension_of_all_bytes: ImageInvalid, "passes the first cluster", |image| image.extension(0x1234, u32::MAX);
    extension_that_ends_them_too_long: ImageInvalid, "passes the first cluster", |image| image.extension(0, CLUSTER as u32);
    raw_data_file_without_data_file: ImageInvalid, "its data file is raw", |image| image.u64(88, 1 << 1);
    refcounts_too_wide: ImageInvalid, "refcounts would be", |image| image.u32(96, 7);
    refcount_table_missing: ImageInvalid, "refcount table has 0", |image| image.u32(56, 0);
    refcount_table_too_large: ImageInvalid, "refcount table has 8454144", |image| image.u32(56, 129);
    refcount_table_misaligned: ImageInvalid, "refcount table at 65544", |image| image.u64(48, CLUSTER + 8);
    refcount_table_outside: ImageInvalid, "outside the file", |image| image.u64(48, 6 * CLUSTER);
    refcount_table_at_the_end_of_numbers: ImageInvalid, "outside the file", |image| image.u64(48, u64::MAX << 16);
    refcount_block_misaligned: ImageInvalid, "refcount block", |image| image.u64(Crafted::REFCOUNTS, CLUSTER + 512);
    refcount_block_outside: ImageInvalid, "refcount block", |image| image.u64(Crafted::REFCOUNTS, 1 << 40);
    snapshots_too_many: ImageInvalid, "65537 snapshots", |image| image.u32(60, 65537);
    snapshot_table_outside: ImageInvalid, "snapshot table", |image| { image.u32(60, 1); image.u64(64, 1 << 30) };
    virtual_size_zero: ImageInvalid, "no bytes", |image| image.u64(24, 0);
    virtual_size_beyond_l1: ImageInvalid, "needs 2", |image| image.u64(24, (512 << 20) + 1);
    virtual_size_beyond_numbers: ImageInvalid, "needs 34359738368", |image| image.u64(24, u64::MAX);
    l1_empty: ImageInvalid, "L1 table has 0 entries", |image| image.u32(36, 0);
    l1_too_large: ImageInvalid, "at most 33554432", |image| image.u32(36, (32 << 20) / 8 + 1);
    l1_of_all_numbers: ImageInvalid, "at most 33554432", |image| image.u32(36, u32::MAX);
    l1_misaligned: ImageInvalid, "L1 table at 196609", |image| image.u64(40, Crafted::L1 + 1);
    l1_at_zero: ImageInvalid, "L1 table at 0", |image| image.u64(40, 0);
    l1_outside: ImageInvalid, "outside the file", |image| image.u64(40, 1 << 50);
    l1_passes_the_end: ImageInvalid, "outside the file", |image| image.u32(36, (3 * CLUSTER / 8 + 1) as u32);
    l1_over_header: ImageInvalid, "L1 table", |image| image.u64(40, 0);
    l1_over_refcount_table: ImageInvalid, "refcount table at 65536 is where another", |image| {
        image.u64(40, CLUSTER);
    };
    l2_misaligned: ImageInvalid, "L2 table 0 at 262656", |image| image.u64(Crafted::L1, Crafted::L2 + 512);
    l2_outside: ImageInvalid, "outside the file", |image| image.u64(Crafted::L1, 6 * CLUSTER);
    l2_over_header: ImageInvalid, "L2 table", |image| { image.u32(36, 2); image.u64(24, 1 << 29); image.u64(Crafted::L1, 1 << 55) };
    l2_over_l1: ImageInvalid, "where another table is", |image| image.u64(Crafted::L1, Crafted::L1);
    l2_over_refcount_table: ImageInvalid, "where another table is", |image| image.u64(Crafted::L1, CLUSTER);
    l2_over_refcount_block: ImageInvalid, "where another table is", |image| image.u64(Crafted::L1, 2 * CLUSTER);
    l2_twice: ImageInvalid, "where another table is", |image| {
        image.u64(24, 1 << 30);
        image.u32(36, 2);
        image.u64(Crafted::L1 + 8, Crafted::L2);
    };
    data_misaligned: ImageInvalid, "between two clusters", |image| image.u64(Crafted::L2, Crafted::DATA + 512);
    data_outside: ImageInvalid, "outside the file", |image| image.u64(Crafted::L2, 6 * CLUSTER);
    data_in_l2: ImageInvalid, "where a table is", |image| image.u64(Crafted::L2, Crafted::L2);
    data_in_l1: ImageInvalid, "where a table is", |image| image.u64(Crafted::L2, Crafted::L1);
    data_in_refcounts: ImageInvalid, "where a table is", |image| image.u64(Crafted::L2, CLUSTER);
    compressed_in_a_table: ImageInvalid, "where a table is", |image| {
        image.u64(Crafted::L2, Crafted::COMPRESSED | (Crafted::L2 + 77));
    };
    compressed_runs_into_a_table: ImageInvalid, "where a table is", |image| {
        image.put(2 * CLUSTER, &vec![0; CLUSTER as usize]);
        image.u64(Crafted::REFCOUNTS, 0);
        image.u64(Crafted::L2, Crafted::COMPRESSED | 1 << 54 | (3 * CLUSTER - 100));
    };
    compressed_outside: ImageInvalid, "outside the file", |image| {
        image.u64(Crafted::L2, Crafted::COMPRESSED | (6 * CLUSTER));
    };
    zero_cluster_in_version_2: ImageInvalid, "version 2 does not have", |image| {
        image.u32(4, 2);
        image.put(72, &[0; 32]);
        image.u64(Crafted::L2, 1);
    };
    subcluster_stored_and_zero: ImageInvalid, "both that it is stored", |image| {
        image.extended(Crafted::DATA, 1 | 1 << 32);
    };
    subcluster_stored_nowhere: ImageInvalid, "but not where", |image| image.extended(0, 1);
    subclusters_of_a_compressed_cluster: ImageInvalid, "compressed cluster which parts", |image| {
        image.extended(Crafted::COMPRESSED | Crafted::DATA, 1);
    };
    truncated_header: ImageInvalid, "less than a header", |image| image.0.truncate(50);
    truncated_header_of_version_3: ImageInvalid, "less than a header", |image| image.0.truncate(103);
    truncated_tables: ImageInvalid, "outside the file", |image| image.0.truncate(2 * CLUSTER as usize);
    truncated_data: ImageInvalid, "truncated", |image| image.0.truncate(5 * CLUSTER as usize);
    only_magic: ImageInvalid, "less than a header", |image| image.0.truncate(4);
    empty: ImageInvalid, "is empty", |image| image.0.clear();
}

#[test]
fn virtual_size_beyond_the_limit() {
    // One entry of the L1 table maps 512 GiB where clusters are of 2 MiB.
    let mut image = Crafted::new();
    image.0.resize(16 << 20, 0);
    image.u32(20, 21);
    image.u64(24, (1 << 50) + 512);
    image.u32(36, 2049);
    image.u64(40, 4 << 20);
    image.u64(48, 2 << 20);
    assert_refused(image.0, ImageFormat::Qcow2, ErrorCode::ImageRefused, "at most 1125899906842624");
}

#[test]
fn subclusters_smaller_than_a_sector() {
    let mut image = Crafted::new();
    image.extended(0, 0);
    image.u32(20, 13);
    assert_refused(image.0, ImageFormat::Qcow2, ErrorCode::ImageInvalid, "extended");
}

#[test]
fn raw_declared_as_qcow2() {
    let bytes = vec![0x5a; 4096];
    assert_refused(bytes, ImageFormat::Qcow2, ErrorCode::ImageTypeMismatch, "not a qcow2 image");
}

#[test]
fn qcow2_declared_as_raw() {
    let image = Crafted::new().0;
    assert_refused(image, ImageFormat::Raw, ErrorCode::ImageTypeMismatch, "is a qcow2 image");
}

#[test]
fn other_formats_declared_as_raw_or_qcow2() {
    let known: [(usize, &[u8], &str); 9] = [
        (0, b"KDMV", "VMDK"),
        (64, b"\x7f\x10\xda\xbe", "VDI"),
        (0, b"vhdxfile", "VHDX"),
        (0, b"conectix", "VHD"),
        (4096 - 512, b"conectix", "VHD"),
        (0, b"\x1f\x8b\x08", "gzip"),
        (0, b"\xfd7zXZ\0", "xz"),
        (0, b"\x28\xb5\x2f\xfd", "zstd"),
        (0, b"<!DOCTYPE html>", "HTML"),
    ];
    for (at, magic, what) in known {
        let mut bytes = vec![0; 4096];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        assert_refused(bytes.clone(), ImageFormat::Raw, ErrorCode::ImageTypeMismatch, what);
        let words = if at > 64 { "not a qcow2 image" } else { what };
        assert_refused(bytes, ImageFormat::Qcow2, ErrorCode::ImageTypeMismatch, words);
    }
}

#[test]
fn an_empty_raw_image() {
    assert_refused(Vec::new(), ImageFormat::Raw, ErrorCode::ImageInvalid, "is empty");
}

/// The cheap gate sees what the header and the first table say, without reading further.
#[test]
fn the_cheap_gate_needs_no_second_level() {
    let mut image = Crafted::new();
    image.u64(Crafted::L1, Crafted::L2 + 512);
    assert!(inspect(&Memory(image.0), ImageFormat::Qcow2).is_err());
    let mut image = Crafted::new();
    image.u64(Crafted::L2, Crafted::DATA + 512);
    let header = inspect(&Memory(image.0), ImageFormat::Qcow2).unwrap();
    assert_eq!((header.virtual_size, header.stored_size), (Some(1 << 20), 6 * CLUSTER));
}

/// Data that cannot be decompressed passes the gate, which reads no data, and stops the copy.
#[test]
fn a_cluster_that_cannot_be_decompressed() {
    for zstd in [false, true] {
        let mut image = Crafted::new();
        if zstd {
            // The type's field moves the extensions; there are none.
            image.u64(72, 1 << 3);
            image.u32(100, 112);
            image.put(104, &[ZSTD]);
        }
        image.u64(Crafted::L2, Crafted::COMPRESSED | Crafted::DATA);
        let image = Image::open(Arc::new(Memory(image.0)), ImageFormat::Qcow2).unwrap();
        let (_directory, target) = room("target.raw");
        super::sparse_file(&target, 1 << 20);
        let target = crate::host::block::BlockTarget { path: target, offset: 0, size: 1 << 20, reads_zero: true };
        let error = super::populate(&image, &target, &super::OPTIONS, &Default::default()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::ImageInvalid);
        assert!(error.to_string().contains("cannot be decompressed"), "{error:?}");
    }
}

/// A frame that goes on behind the cluster is no cluster: QEMU refuses it as well.
#[test]
fn a_zstd_frame_longer_than_the_cluster() {
    for frame_goes_on in [false, true] {
        let mut image = Crafted::new();
        image.u64(72, 1 << 3);
        image.u32(100, 112);
        image.put(104, &[ZSTD]);
        image.u64(Crafted::L2, Crafted::COMPRESSED | Crafted::DATA);
        // Magic, a descriptor without size and checksum, a window of 128 KiB, one run of a cluster's bytes; perhaps a
        // last block of a byte.
        let run = (CLUSTER as u32) << 3 | 1 << 1 | u32::from(!frame_goes_on);
        image.put(Crafted::DATA, &[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38]);
        image.put(Crafted::DATA + 6, &run.to_le_bytes()[..3]);
        image.put(Crafted::DATA + 9, &[0x41, 0x09, 0x00, 0x00, 0x42]);
        let image = Image::open(Arc::new(Memory(image.0)), ImageFormat::Qcow2).unwrap();
        let extent = image.extents().next().unwrap().unwrap();
        let mut decoder = crate::format::Decoder::new().unwrap();
        let mut cluster = vec![0; CLUSTER as usize];
        let read = image.read(&extent, &mut decoder, &mut cluster);
        assert_eq!(read.is_err(), frame_goes_on, "{read:?}");
        assert!(frame_goes_on || cluster.iter().all(|byte| *byte == 0x41));
    }
}

/// A frame may ask for a window of 2 GiB before it has given a byte.
#[test]
fn a_zstd_window_without_bound_is_refused() {
    let mut image = Crafted::new();
    image.u64(72, 1 << 3);
    image.u32(100, 112);
    image.put(104, &[ZSTD]);
    image.u64(Crafted::L2, Crafted::COMPRESSED | Crafted::DATA);
    // Magic, a descriptor without size and checksum, a window of 2^31 bytes, one last raw block of a byte.
    image.put(Crafted::DATA, &[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x09, 0x00, 0x00, 0x41]);
    let image = Image::open(Arc::new(Memory(image.0)), ImageFormat::Qcow2).unwrap();
    let extent = image.extents().next().unwrap().unwrap();
    let mut decoder = crate::format::Decoder::new().unwrap();
    assert!(image.read(&extent, &mut decoder, &mut vec![0; CLUSTER as usize]).is_err());
}
