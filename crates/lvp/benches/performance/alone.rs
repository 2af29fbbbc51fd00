//! The stages of a provision, each alone: what no way can be faster than, if nothing else is in its way.
//!
//! It leaves out the download, which the manual way's `curl` tells.

use std::{
    fs::File,
    io::Read,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use anyhow::Result;
use aws_lc_rs::digest::{Context, SHA256};
use lvp_api::ImageFormat;
use lvp_engine::{
    format::{Content, Decoder, Extent, Image},
    host::block::{AlignedBuffer, BlockTarget, OpenTarget},
};

/// What is read or written at once.
const PIECE: u64 = 1 << 20;
/// The largest cluster.
const CLUSTER: usize = 2 << 20;

/// SHA-256 of a file in the page cache; seconds, and the digest.
pub fn hash(path: &Path) -> Result<(f64, String)> {
    let begun = Instant::now();
    let (mut file, mut context, mut buffer) = (File::open(path)?, Context::new(&SHA256), vec![0; PIECE as usize]);
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        context.update(&buffer[..count]);
    }
    let digest = context.finish();
    let hexadecimal = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((begun.elapsed().as_secs_f64(), hexadecimal))
}

/// Reads and decodes all data of an image in one thread; seconds, and the bytes of data.
pub fn decode(path: &Path, format: &str) -> Result<(f64, u64)> {
    let image = Image::open_file(path, format.parse::<ImageFormat>()?)?;
    let (mut decoder, mut buffer) = (Decoder::new()?, vec![0; CLUSTER]);
    let begun = Instant::now();
    for extent in image.extents() {
        for piece in pieces(extent?) {
            image.read(&piece, &mut decoder, &mut buffer)?;
        }
    }
    Ok((begun.elapsed().as_secs_f64(), image.data_bytes()))
}

/// An extent in pieces; a compressed cluster is one.
fn pieces(extent: Extent) -> Vec<Extent> {
    let Content::Plain { stored } = extent.content else {
        return if extent.content == Content::Zero { Vec::new() } else { vec![extent] };
    };
    let starts = (0..extent.length).step_by(PIECE as usize);
    let piece = |at: u64| Extent {
        guest: extent.guest + at,
        length: PIECE.min(extent.length - at),
        content: Content::Plain { stored: stored + at },
    };
    starts.map(piece).collect()
}

/// Writes so many bytes, which are not zero, to a new target and flushes it; seconds.
pub fn write(target: &Path, size: u64, bytes: u64, threads: usize) -> Result<f64> {
    let open = OpenTarget::open(&BlockTarget { path: target.to_owned(), offset: 0, size, reads_zero: true })?;
    let next = AtomicU64::new(0);
    let begun = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let work = || -> Result<()> {
            let mut buffer = AlignedBuffer::new(PIECE as usize);
            buffer.fill(0x5a);
            loop {
                let at = next.fetch_add(PIECE, Ordering::Relaxed);
                if at >= bytes {
                    return Ok(());
                }
                open.write_at(&buffer, at)?;
            }
        };
        let writers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        writers.into_iter().try_for_each(|writer| writer.join().expect("a writer does not panic"))
    })?;
    open.sync()?;
    Ok(begun.elapsed().as_secs_f64())
}
