//! Copies to block devices: loop devices with sectors of 512 and 4096 bytes. They need root.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::FileExt,
    path::Path,
};

use e2e::images::{self, LoopDevice, Qcow2Options};
use lvp_api::ImageFormat;

use super::{OLD, OPTIONS, populate, room, sparse_file, sync, used_file};
use crate::{
    format::{Image, populate::Counts},
    host::block::BlockTarget,
    progress::Progress,
};

const MIB: u64 = 1 << 20;

fn image_in(directory: &Path, size: u64, options: &Qcow2Options) -> (Image, Vec<u8>) {
    let (raw, path) = (directory.join("source.raw"), directory.join("image.qcow2"));
    images::raw_with_data(&raw, size, 40, 31).unwrap();
    images::qcow2_from(&raw, &path, options).unwrap();
    (Image::open_file(&path, ImageFormat::Qcow2).unwrap(), fs::read(&raw).unwrap())
}

fn copied(image: &Image, device: &LoopDevice, size: u64, reads_zero: bool) -> Counts {
    let target = BlockTarget { path: device.path.clone(), offset: 0, size, reads_zero };
    let done = populate(image, &target, &OPTIONS, &Progress::default()).unwrap().counts;
    sync(&target).unwrap();
    assert_eq!(done.bytes_written + done.bytes_zeroed + done.bytes_skipped, size);
    done
}

fn assert_device(device: &LoopDevice, size: u64, expected: &[u8]) {
    let mut content = Vec::new();
    File::open(&device.path).unwrap().read_to_end(&mut content).unwrap();
    assert_eq!(content.len() as u64, size);
    assert!(content[..expected.len()] == *expected, "the image differs on {}", device.path.display());
    assert!(content[expected.len()..].iter().all(|byte| *byte == 0), "old data in the tail");
}

#[test]
fn old_data_is_gone_from_a_used_device() {
    for sector_size in [512, 4096] {
        // Small clusters make data that begins and ends between two sectors of 4 KiB.
        for cluster_size in [512, 64 << 10] {
            let options = Qcow2Options { cluster_size: Some(cluster_size), ..Qcow2Options::default() };
            let (directory, file) = room("device");
            let (image, expected) = image_in(directory.path(), 6 * MIB + 1536, &options);
            let size = 40 * MIB;
            used_file(&file, size);
            let device = LoopDevice::attach(&file, sector_size).unwrap();
            let done = copied(&image, &device, size, false);
            assert_eq!(done.bytes_skipped, 0);
            assert!(done.bytes_zeroed > 30 * MIB);
            assert_device(&device, size, &expected);
        }
    }
}

#[test]
fn a_device_that_reads_zero_is_written_only_where_data_is() {
    for (sector_size, compression) in [(512, "zlib"), (4096, "zstd")] {
        let options = Qcow2Options { compression: Some(compression), ..Qcow2Options::default() };
        let (directory, file) = room("device");
        let (image, expected) = image_in(directory.path(), 6 * MIB + 512, &options);
        sparse_file(&file, 24 * MIB);
        let device = LoopDevice::attach(&file, sector_size).unwrap();
        let done = copied(&image, &device, 24 * MIB, true);
        assert_eq!(done.bytes_zeroed, 0);
        assert!(done.bytes_skipped > 17 * MIB);
        assert_device(&device, 24 * MIB, &expected);
    }
}

/// A device of 512-byte sectors whose size is not a multiple of 4 KiB, full to its last byte.
#[test]
fn the_last_partial_block_of_a_device() {
    let (directory, file) = room("device");
    let size = 3 * MIB + 512 * 3;
    let image = directory.path().join("image.raw");
    used_file(&image, size);
    File::options().write(true).open(&image).unwrap().write_all_at(b"the end", size - 7).unwrap();
    sparse_file(&file, size);
    let device = LoopDevice::attach(&file, 512).unwrap();
    copied(&Image::open_file(&image, ImageFormat::Raw).unwrap(), &device, size, false);
    let mut expected = vec![OLD; size as usize];
    expected[size as usize - 7..].copy_from_slice(b"the end");
    assert_device(&device, size, &expected);
}
