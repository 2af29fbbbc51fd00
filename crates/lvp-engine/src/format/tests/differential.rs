//! Every kind of image that `qemu-img` makes: our output must equal `qemu-img convert`'s, byte for byte.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use e2e::images::{self, Qcow2Options};
use lvp_api::ImageFormat;

use super::{assert_as_qemu, assert_content, filled, room, sparse_file, used_file};
use crate::format::Image;

const MIB: u64 = 1 << 20;

/// Makes an image of some data with these options and holds it against qemu-img.
fn matches(size: u64, share: u8, options: &Qcow2Options) {
    let (directory, image) = room("image.qcow2");
    let raw = directory.path().join("source.raw");
    images::raw_with_data(&raw, size, share, size ^ u64::from(share)).unwrap();
    images::qcow2_from(&raw, &image, options).unwrap();
    assert_as_qemu(directory.path(), &image, ImageFormat::Qcow2, &format!("{size} bytes, {share} %, {options:?}"));
}

fn all_clusters(options: &Qcow2Options, least: u64) {
    let mut cluster_size = least;
    while cluster_size <= 2 * MIB {
        let size = if cluster_size < 4096 { MIB } else { 5 * MIB } + 512 * 3;
        matches(size, 60, &Qcow2Options { cluster_size: Some(cluster_size), ..options.clone() });
        cluster_size *= 2;
    }
}

#[test]
fn version_2_plain() {
    all_clusters(&Qcow2Options { version: Some(2), ..Qcow2Options::default() }, 512);
}

#[test]
fn version_2_zlib() {
    all_clusters(&Qcow2Options { version: Some(2), compression: Some("zlib"), ..Qcow2Options::default() }, 512);
}

#[test]
fn version_3_plain() {
    all_clusters(&Qcow2Options::default(), 512);
}

#[test]
fn version_3_zlib() {
    all_clusters(&Qcow2Options { compression: Some("zlib"), ..Qcow2Options::default() }, 512);
}

#[test]
fn version_3_zstd() {
    all_clusters(&Qcow2Options { compression: Some("zstd"), ..Qcow2Options::default() }, 512);
}

#[test]
fn extended_l2() {
    for compression in [None, Some("zlib"), Some("zstd")] {
        all_clusters(&Qcow2Options { extended_l2: true, compression, ..Qcow2Options::default() }, 16 << 10);
    }
}

#[test]
fn preallocation() {
    for preallocation in ["off", "metadata", "falloc", "full"] {
        for (cluster_size, extended_l2) in [(512, false), (64 << 10, false), (64 << 10, true), (2 * MIB, false)] {
            let options = Qcow2Options {
                preallocation: Some(preallocation),
                cluster_size: Some(cluster_size),
                extended_l2,
                ..Qcow2Options::default()
            };
            matches(3 * MIB + 512, 40, &options);
            let (directory, image) = room("empty.qcow2");
            images::qcow2_empty(&image, 3 * MIB + 512, &options).unwrap();
            assert_as_qemu(directory.path(), &image, ImageFormat::Qcow2, &format!("empty, {options:?}"));
        }
    }
}

#[test]
fn refcount_widths() {
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        matches(2 * MIB, 50, &Qcow2Options { refcount_bits: Some(bits), ..Qcow2Options::default() });
    }
}

#[test]
fn empty_full_and_odd_sizes() {
    for size in [512, 1024, 4096 - 512, 64 << 10, (64 << 10) + 512, MIB - 512, MIB, 2 * MIB + 512 * 7] {
        for share in [0, 100] {
            for compression in [None, Some("zlib"), Some("zstd")] {
                matches(size, share, &Qcow2Options { compression, ..Qcow2Options::default() });
            }
        }
    }
}

/// Patterns that only a running machine makes: parts of clusters, zeros with and without allocation, discarded ranges,
/// compressed clusters among plain ones.
#[test]
fn written_by_a_guest() {
    for (version, cluster_size, extended_l2) in [
        (2, 512, false),
        (2, 64 << 10, false),
        (3, 512, false),
        (3, 64 << 10, false),
        (3, 64 << 10, true),
        (3, 2 * MIB, true),
    ] {
        let options = Qcow2Options {
            version: Some(version),
            cluster_size: Some(cluster_size),
            extended_l2,
            ..Qcow2Options::default()
        };
        let (directory, image) = room("guest.qcow2");
        images::qcow2_empty(&image, 8 * MIB + 512, &options).unwrap();
        let commands = [
            "write -P 1 0 3k",
            "write -P 2 130k 5k",
            "write -P 3 1M 700k",
            "write -z 1200k 64k",
            "write -z -u 1300k 64k",
            "write -z 3M 1M",
            "write -P 4 3100k 4k",
            "discard 1400k 100k",
            "write -P 5 8M 512",
            "write -P 6 2M 2k",
            "write -z 2M 1k",
        ];
        images::qemu_io(&image, &commands).unwrap();
        images::qemu_io(&image, &["write -c -P 7 4M 2M", "write -P 8 4100k 10k"]).unwrap();
        assert_as_qemu(directory.path(), &image, ImageFormat::Qcow2, &format!("guest, {options:?}"));
    }
}

#[test]
fn internal_snapshots_are_ignored() {
    for (version, extended_l2) in [(2, false), (3, false), (3, true)] {
        let (directory, image) = room("snapshots.qcow2");
        let options = Qcow2Options { version: Some(version), extended_l2, ..Qcow2Options::default() };
        images::qcow2_empty(&image, 4 * MIB, &options).unwrap();
        let path = image.to_str().unwrap();
        images::qemu_io(&image, &["write -P 1 0 1M"]).unwrap();
        images::run("qemu-img", &["snapshot", "-c", "first", path]).unwrap();
        images::qemu_io(&image, &["write -P 2 512k 1M", "write -z 0 64k"]).unwrap();
        images::run("qemu-img", &["snapshot", "-c", "second", path]).unwrap();
        images::qemu_io(&image, &["write -P 3 600k 100k", "write -P 4 3M 64k"]).unwrap();
        assert_as_qemu(directory.path(), &image, ImageFormat::Qcow2, &format!("snapshots, {options:?}"));
    }
}

#[test]
fn resized_images() {
    for size in ["3M", "40M"] {
        let (directory, image) = room("resized.qcow2");
        let raw = directory.path().join("source.raw");
        images::raw_with_data(&raw, 8 * MIB, 70, 11).unwrap();
        images::qcow2_from(&raw, &image, &Qcow2Options { cluster_size: Some(4096), ..Qcow2Options::default() })
            .unwrap();
        images::run("qemu-img", &["resize", "-q", "--shrink", image.to_str().unwrap(), size]).unwrap();
        assert_as_qemu(directory.path(), &image, ImageFormat::Qcow2, &format!("resized to {size}"));
    }
}

#[test]
fn converted_between_versions() {
    for compat in ["0.10", "1.1"] {
        let (directory, image) = room("amended.qcow2");
        let raw = directory.path().join("source.raw");
        images::raw_with_data(&raw, 4 * MIB, 50, 12).unwrap();
        let version = if compat == "1.1" { 2 } else { 3 };
        images::qcow2_from(&raw, &image, &Qcow2Options { version: Some(version), ..Qcow2Options::default() }).unwrap();
        images::run("qemu-img", &["amend", "-o", &format!("compat={compat}"), image.to_str().unwrap()]).unwrap();
        assert_as_qemu(directory.path(), &image, ImageFormat::Qcow2, &format!("amended to {compat}"));
    }
}

#[test]
fn a_file_cut_in_its_last_cluster() {
    let (directory, image) = room("cut.qcow2");
    images::qcow2_empty(&image, 2 * MIB, &Qcow2Options::default()).unwrap();
    images::qemu_io(&image, &["write -P 9 1M 64k"]).unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length - 1000).unwrap();
    assert_as_qemu(directory.path(), &image, ImageFormat::Qcow2, "cut by 1000 bytes");
}

#[test]
fn a_file_system_survives() {
    let (directory, image) = room("root.qcow2");
    let raw = directory.path().join("root.raw");
    images::ext4_with_files(&raw, 32 * MIB, 60, "root", 1).unwrap();
    images::qcow2_from(&raw, &image, &Qcow2Options { compression: Some("zstd"), ..Qcow2Options::default() }).unwrap();
    let target = directory.path().join("target.raw");
    used_file(&target, 32 * MIB);
    filled(&Image::open_file(&image, ImageFormat::Qcow2).unwrap(), &target, false);
    images::run("e2fsck", &["-fn", target.to_str().unwrap()]).unwrap();
    images::run("qemu-img", &["compare", image.to_str().unwrap(), target.to_str().unwrap()]).unwrap();
}

#[test]
fn raw_images_of_any_size_and_with_holes() {
    for (size, share) in
        [(1, 100), (511, 100), (513, 100), (4097, 100), (3 * MIB + 1, 30), (5 * MIB + 4095, 0), (4 * MIB, 100)]
    {
        let (directory, image) = room("image.raw");
        images::raw_with_data(&image, size, share, size).unwrap();
        assert_as_qemu(directory.path(), &image, ImageFormat::Raw, &format!("raw, {size} bytes, {share} %"));
    }
}

/// Qemu cuts such a disk down to sectors; we keep its last bytes. So the expectation is made by hand.
#[test]
fn a_virtual_size_between_two_sectors() {
    for compression in [None, Some("zlib"), Some("zstd")] {
        let (directory, image) = room("odd.qcow2");
        let raw = directory.path().join("source.raw");
        images::raw_with_data(&raw, 2 * MIB, 100, 13).unwrap();
        images::qcow2_from(&raw, &image, &Qcow2Options { compression, ..Qcow2Options::default() }).unwrap();
        let size = 2 * MIB - 777;
        set_virtual_size(&image, size);
        let opened = Image::open_file(&image, ImageFormat::Qcow2).unwrap();
        assert_eq!((opened.virtual_size(), opened.data_bytes()), (Some(size), size));
        let target = directory.path().join("target.raw");
        used_file(&target, 3 * MIB);
        filled(&opened, &target, false);
        assert_content(&target, &fs::read(&raw).unwrap()[..size as usize], "odd virtual size");
    }
}

#[test]
fn zeros_are_not_written_where_the_target_reads_zero() {
    let (directory, image) = room("zeros.raw");
    // Stored zeros: 8 MiB of them, with one byte in the middle.
    used_file(&image, 8 * MIB);
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&vec![0; 8 << 20], 0).unwrap();
    file.write_all_at(&[1], 5 * MIB + 70).unwrap();
    let target = directory.path().join("target.raw");
    sparse_file(&target, 16 * MIB);
    let done = filled(&Image::open_file(&image, ImageFormat::Raw).unwrap(), &target, true);
    assert_eq!((done.bytes_decoded, done.bytes_written), (8 * MIB, 4096));
}

fn set_virtual_size(image: &Path, size: u64) {
    File::options().write(true).open(image).unwrap().write_all_at(&size.to_be_bytes(), 24).unwrap();
}
