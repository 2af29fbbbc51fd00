//! Stopping: by a cancel, by an error of one worker, by a panic of one.

use std::{
    fs,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use e2e::images::LoopDevice;
use lvp_api::{ErrorCode, ImageFormat};

use super::{OLD, OPTIONS, populate, room, sparse_file, sync, used_file};
use crate::{
    error::{Error, Result},
    format::{Bytes, FileBytes, Image},
    host::block::BlockTarget,
    progress::{Progress, Stop},
};

const SIZE: u64 = 256 << 20;

/// What happens at a read of a file.
#[derive(Clone, Copy)]
enum Fault {
    Slow,
    FailsAt(u64),
    PanicsAt(u64),
}

/// A file on a bad disk.
struct Faulty(FileBytes, Fault);

impl Bytes for Faulty {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let has = |at: u64| (offset..offset + buffer.len() as u64).contains(&at);
        match self.1 {
            Fault::Slow => thread::sleep(Duration::from_millis(20)),
            Fault::FailsAt(at) if has(at) => {
                return Err(Error::new(ErrorCode::InputOutput, "the disk has a bad sector"));
            }
            Fault::PanicsAt(at) if has(at) => panic!("as the test wants it"),
            // To print a panic takes a while; it must not be all the time that the others need to finish.
            Fault::PanicsAt(at) if offset > at => thread::sleep(Duration::from_millis(50)),
            _ => {}
        }
        self.0.read_exact_at(buffer, offset)
    }

    fn name(&self) -> String {
        self.0.name()
    }
}

fn image_with(directory: &Path, fault: Fault) -> Image {
    let path = directory.join("image.raw");
    used_file(&path, SIZE);
    Image::open(Arc::new(Faulty(FileBytes::open(&path).unwrap(), fault)), ImageFormat::Raw).unwrap()
}

fn target_in(directory: &Path) -> BlockTarget {
    let path = directory.join("target.raw");
    sparse_file(&path, SIZE);
    BlockTarget { path, offset: 0, size: SIZE, reads_zero: true }
}

#[test]
fn a_cancel_stops_all_writers_within_a_second() {
    for (reason, code) in [(Stop::Cancel, ErrorCode::Cancelled), (Stop::Shutdown, ErrorCode::ShuttingDown)] {
        let (directory, _) = room("");
        let image = image_with(directory.path(), Fault::Slow);
        let target = target_in(directory.path());
        let progress = Progress::default();
        let (error, late) = thread::scope(|scope| {
            let copying = scope.spawn(|| populate(&image, &target, &OPTIONS, &progress).unwrap_err());
            while progress.snapshot().bytes_processed < 8 << 20 {
                thread::sleep(Duration::from_millis(5));
            }
            progress.stop(reason);
            let stopped = Instant::now();
            (copying.join().unwrap(), stopped.elapsed())
        });
        assert_eq!(error.code(), code);
        assert!(late < Duration::from_secs(1), "{late:?}");
        let done = progress.snapshot().bytes_processed;
        assert!(done < SIZE / 2, "{done} bytes were copied in spite of the cancel");
        // Nothing was written behind what was counted, and nothing is written now.
        let written = fs::read(&target.path).unwrap().iter().filter(|byte| **byte == OLD).count() as u64;
        assert!(written < SIZE / 2);
        thread::sleep(Duration::from_millis(100));
        let later = fs::read(&target.path).unwrap().iter().filter(|byte| **byte == OLD).count() as u64;
        assert_eq!(written, later);
    }
}

/// As above, to a device: it is released, and nothing is written behind where the copy was.
#[test]
fn a_cancel_leaves_a_device_that_can_be_opened_again() {
    let (directory, file) = room("device");
    let image = image_with(directory.path(), Fault::Slow);
    sparse_file(&file, SIZE);
    let device = LoopDevice::attach(&file, 4096).unwrap();
    let target = BlockTarget { path: device.path.clone(), offset: 0, size: SIZE, reads_zero: false };
    let progress = Progress::default();
    let (error, late) = thread::scope(|scope| {
        let copying = scope.spawn(|| populate(&image, &target, &OPTIONS, &progress).unwrap_err());
        while progress.snapshot().bytes_processed < 8 << 20 {
            thread::sleep(Duration::from_millis(5));
        }
        progress.stop(Stop::Cancel);
        let stopped = Instant::now();
        (copying.join().unwrap(), stopped.elapsed())
    });
    assert_eq!(error.code(), ErrorCode::Cancelled);
    assert!(late < Duration::from_secs(1), "{late:?}");
    assert!(progress.snapshot().bytes_processed < SIZE / 2);
    sync(&target).unwrap();
    let content = fs::read(&device.path).unwrap();
    assert!(content[..4 << 20].iter().all(|byte| *byte == OLD));
    assert!(content[SIZE as usize / 2..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_job_that_was_cancelled_before_writes_nothing() {
    let (directory, _) = room("");
    let image = image_with(directory.path(), Fault::Slow);
    let target = target_in(directory.path());
    let progress = Progress::default();
    progress.stop(Stop::Cancel);
    assert_eq!(populate(&image, &target, &OPTIONS, &progress).unwrap_err().code(), ErrorCode::Cancelled);
    assert!(fs::read(&target.path).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn the_error_of_one_worker_stops_the_others() {
    let (directory, _) = room("");
    let image = image_with(directory.path(), Fault::FailsAt(20 << 20));
    let progress = Progress::default();
    let error = populate(&image, &target_in(directory.path()), &OPTIONS, &progress).unwrap_err();
    assert_eq!(error.to_string(), "the disk has a bad sector");
    assert!(progress.snapshot().bytes_processed < SIZE / 2);
}

#[test]
fn a_panic_is_an_error_of_ours_and_stops_the_others() {
    let (directory, _) = room("");
    let image = image_with(directory.path(), Fault::PanicsAt(20 << 20));
    let progress = Progress::default();
    let error = populate(&image, &target_in(directory.path()), &OPTIONS, &progress).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Internal);
    assert!(progress.snapshot().bytes_processed < SIZE / 2);
}

#[test]
fn an_image_larger_than_the_target_is_refused_with_both_sizes() {
    let (directory, _) = room("");
    let image = image_with(directory.path(), Fault::Slow);
    let mut target = target_in(directory.path());
    target.size = SIZE - 512;
    sparse_file(&target.path, target.size);
    let error = populate(&image, &target, &OPTIONS, &Progress::default()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::ImageTooLarge);
    assert!(error.to_string().contains("268435456") && error.to_string().contains("268434944"), "{error:?}");
}
