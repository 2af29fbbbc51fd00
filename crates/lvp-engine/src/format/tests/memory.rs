//! Memory does not depend on the image: measured in a process of its own, which is the test started again.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use e2e::images::{self, Qcow2Options};
use lvp_api::ImageFormat;

use super::{accounted, filled, packed, room, sparse_file};
use crate::format::Image;

/// Set in the process that is measured: the directory to work in.
const CHILD: &str = "LVP_TEST_MEMORY";
const QCOW2: &str = "memory_is_constant_whatever_the_image";
const LIMIT_KIB: u64 = 64 << 10;

#[test]
fn memory_is_constant_whatever_the_image() {
    if let Some(directory) = directory_of_the_process() {
        let image = Image::open_file(&directory.join("image.qcow2"), ImageFormat::Qcow2).unwrap();
        filled(&image, &directory.join("target.raw"), true);
        say_peak();
        return;
    }
    let (directory, image) = room("image.qcow2");
    let size = largest_tables(&image);
    assert_peak(QCOW2, directory.path(), size, "the largest tables");
    for (size, cluster_size) in [(4 << 40, 2 << 20), (8 << 30, 64 << 10)] {
        let (directory, image) = room("image.qcow2");
        let raw = directory.path().join("source.raw");
        images::raw_with_data(&raw, 96 << 20, 80, 41).unwrap();
        let compression = Some("zstd");
        let options = Qcow2Options { cluster_size: Some(cluster_size), compression, ..Qcow2Options::default() };
        images::qcow2_from(&raw, &image, &options).unwrap();
        images::run("qemu-img", &["resize", "-q", image.to_str().unwrap(), &size.to_string()]).unwrap();
        let far = format!("write -P 5 {} 1M", size - (1 << 20));
        images::qemu_io(&image, &["write -P 2 1G 8M", &far]).unwrap();
        assert_peak(QCOW2, directory.path(), size, &format!("{size} bytes in clusters of {cluster_size}"));
    }
}

/// As above, of streams that ask for all the memory that they get, and need it for their data: 1 GiB, most of it zeros.
#[test]
fn memory_is_constant_whatever_the_stream() {
    let kinds: [(ImageFormat, &[&str]); 3] = [
        (ImageFormat::RawGz, &["-1"]),
        (ImageFormat::RawZst, &["-3", "--long=23", "--no-content-size"]),
        (ImageFormat::RawXz, &["--lzma2=preset=0,dict=16MiB"]),
    ];
    if let Some(directory) = env::var_os(CHILD) {
        let directory = Path::new(&directory);
        let format = kinds.map(|(format, _)| format).into_iter().find(|format| directory.join(format.name()).exists());
        let format = format.unwrap();
        let image = Image::open_file(&directory.join(format.name()), format).unwrap();
        accounted(&image, &directory.join("target.raw"), false);
        say_peak();
        return;
    }
    let (directory, raw) = room("source.raw");
    images::raw_with_data(&raw, 40 << 20, 90, 43).unwrap();
    let data = fs::read(&raw).unwrap();
    for (format, options) in kinds {
        let (directory, image) = room(format.name());
        let zeros = packed(&vec![0; 64 << 20], format, options);
        fs::write(&image, [packed(&data, format, options), zeros.repeat(16)].concat()).unwrap();
        assert_peak("memory_is_constant_whatever_the_stream", directory.path(), 2 << 30, format.name());
    }
    drop(directory);
}

/// Makes an image with the smallest clusters, an L1 table of 32 MiB, and L2 tables all over a file of the most clusters
/// that are accepted; says how large its disk is. Almost all of the file is a hole.
fn largest_tables(image: &Path) -> u64 {
    let file = File::create(image).unwrap();
    let (disk, l1) = (128 << 30, 2048);
    file.set_len(64 << 30).unwrap();
    let mut header = [0; 104];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9_u32.to_be_bytes());
    put(24, &u64::to_be_bytes(disk));
    put(36, &(4_u32 << 20).to_be_bytes());
    put(40, &u64::to_be_bytes(l1));
    put(48, &512_u64.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    file.write_all_at(&header, 0).unwrap();
    let mut table = vec![0; 32 << 20];
    for index in 0..1 << 17 {
        let l2 = (64 << 20) + index * (480 << 10);
        table[index as usize * 256..][..8].copy_from_slice(&u64::to_be_bytes(l2));
    }
    file.write_all_at(&table, l1).unwrap();
    // The first table has one cluster of data.
    file.write_all_at(&u64::to_be_bytes(48 << 20), 64 << 20).unwrap();
    file.write_all_at(&[7; 512], 48 << 20).unwrap();
    disk
}

/// Copies the image in a process of its own, which runs this test, and holds its peak against the limit.
fn assert_peak(test: &str, directory: &Path, size: u64, what: &str) {
    sparse_file(&directory.join("target.raw"), size);
    in_a_process_of_its_own(&format!("format::tests::memory::{test}"), directory, what);
}

/// Starts a test again in a process of its own, and holds its peak against the limit. In that process, gives the
/// directory to work in; it ends with [`say_peak`].
pub(super) fn in_a_process_of_its_own(test: &str, directory: &Path, what: &str) -> Option<PathBuf> {
    if let Some(directory) = directory_of_the_process() {
        return Some(directory);
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, directory)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let peak = said.lines().find_map(|line| line.split("PEAK ").nth(1)).unwrap_or_else(|| panic!("{output:?}"));
    let peak: u64 = peak.trim().parse().unwrap();
    println!("{peak} KiB for {what}");
    assert!(output.status.success() && peak < LIMIT_KIB, "{peak} KiB for {what}: {output:?}");
    None
}

fn directory_of_the_process() -> Option<PathBuf> {
    env::var_os(CHILD).map(PathBuf::from)
}

/// Ends the process that is measured.
pub(super) fn say_peak() {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("PEAK {}", line.trim().trim_end_matches(" kB"));
}
