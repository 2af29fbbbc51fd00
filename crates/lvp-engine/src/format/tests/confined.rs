//! The threads that decode are confined: seen from inside of them, by an image that tries what a decoder taken over would.

use std::{
    fs::File,
    io::{self, ErrorKind},
    net::TcpStream,
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use e2e::images::{self, Qcow2Options};
use lvp_api::ImageFormat;

use super::{Memory, OPTIONS, populate, room, sparse_file};
use crate::{
    error::Result,
    format::{Bytes, Image},
    host::block::BlockTarget,
    progress::Progress,
};

/// What was tried in which thread, and how it failed.
type Tried = Arc<Mutex<Vec<(String, Option<ErrorKind>)>>>;

/// An image whose every read tries to get out of the thread that reads.
struct Escaping {
    bytes: Memory,
    tried: Tried,
}

impl Bytes for Escaping {
    fn len(&self) -> u64 {
        self.bytes.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let attempts: [(&str, io::Result<()>); 3] = [
            ("opens a file", File::open("/etc/hostname").map(drop)),
            ("connects", TcpStream::connect("127.0.0.1:9").map(drop)),
            ("starts a program", Command::new("true").status().map(drop)),
        ];
        let thread = thread::current().name().unwrap_or_default().to_owned();
        for (what, outcome) in attempts {
            self.tried.lock().unwrap().push((format!("{thread} {what}"), outcome.err().map(|error| error.kind())));
        }
        self.bytes.read_exact_at(buffer, offset)
    }

    fn name(&self) -> String {
        self.bytes.name()
    }
}

#[test]
fn the_threads_that_decode_reach_nothing_and_still_copy() {
    let (directory, path) = room("image.qcow2");
    let (raw, target) = (directory.path().join("source.raw"), directory.path().join("target.raw"));
    images::raw_with_data(&raw, 6 << 20, 50, 3).unwrap();
    images::qcow2_from(&raw, &path, &Qcow2Options { compression: Some("zstd"), ..Qcow2Options::default() }).unwrap();
    let tried = Tried::default();
    let bytes = Escaping { bytes: Memory(std::fs::read(&path).unwrap()), tried: tried.clone() };
    let image = Image::open(Arc::new(bytes), ImageFormat::Qcow2).unwrap();
    // What was tried before is not in a thread of the copy.
    tried.lock().unwrap().clear();
    let size = image.virtual_size().unwrap();
    sparse_file(&target, size);
    let goal = BlockTarget { path: target.clone(), offset: 0, size, reads_zero: true };
    populate(&image, &goal, &OPTIONS, &Progress::default()).unwrap();
    super::assert_content(&target, &std::fs::read(&raw).unwrap(), "copied by confined threads");
    let tried = tried.lock().unwrap();
    assert!(tried.len() > 30, "{tried:?}");
    for (what, outcome) in tried.iter() {
        assert_eq!(*outcome, Some(ErrorKind::PermissionDenied), "{what}");
    }
}
