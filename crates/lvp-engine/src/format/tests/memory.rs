//! Memory does not depend on the image: measured in a process of its own, which is this test started again.

use std::{env, fs, process::Command};

use e2e::images::{self, Qcow2Options};
use lvp_api::ImageFormat;

use super::{filled, room, sparse_file};
use crate::format::Image;

/// Set in the process that is measured: the directory with the image and the target.
const CHILD: &str = "LVP_TEST_MEMORY";
const LIMIT_KIB: u64 = 64 << 10;

/// The largest tables that can be: an L1 table of 32 MiB, and L2 tables and clusters of 2 MiB.
#[test]
fn memory_is_constant_whatever_the_image() {
    if let Some(directory) = env::var_os(CHILD) {
        let directory = std::path::Path::new(&directory);
        let image = Image::open_file(&directory.join("image.qcow2"), ImageFormat::Qcow2).unwrap();
        filled(&image, &directory.join("target.raw"), true);
        println!("PEAK {}", peak_kib());
        return;
    }
    let compressed = Some("zstd");
    for (size, cluster_size, compression) in
        [(128 << 30, 512, None), (4 << 40, 2 << 20, compressed), (8 << 30, 65536, compressed)]
    {
        let (directory, image) = room("image.qcow2");
        let options = Qcow2Options { cluster_size: Some(cluster_size), compression, ..Qcow2Options::default() };
        let compression_only_new = Qcow2Options { compression: None, ..options.clone() };
        images::qcow2_empty(&image, size, if compression.is_none() { &compression_only_new } else { &options })
            .unwrap();
        let far = format!("write -P 5 {} 1M", size - (1 << 20));
        images::qemu_io(&image, &["write -P 1 0 64M", "write -P 2 1G 8M", &far]).unwrap();
        sparse_file(&directory.path().join("target.raw"), size);
        let name = "format::tests::memory::memory_is_constant_whatever_the_image";
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(CHILD, directory.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let peak = said.lines().find_map(|line| line.split("PEAK ").nth(1)).unwrap_or_else(|| panic!("{output:?}"));
        let peak: u64 = peak.trim().parse().unwrap();
        assert!(peak < LIMIT_KIB, "{peak} KiB for {size} bytes in clusters of {cluster_size}");
    }
}

fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
