//! qcow2 files that lvp makes: a standalone one around a disk that is written as it is, and an overlay that holds nothing yet;
//! and which file below a qcow2 file names.
//!
//! The copy writes the disk's bytes at their place behind the tables, and the tables are written last, for what of it is not
//! a hole. An overlay is the same without data, and ends where the tables of the data would begin.
//!
//! ```text
//!  0  header │ refcount table │ refcount blocks │ L1 table │ L2 tables │ data: cluster n of the disk at data + n
//! ```
//! Every place is reserved for the whole disk, and the file is sparse, so nothing moves and only what is used takes space.
//! Until the header is written, which is the very last, the file is no image. The format is version 3 with clusters of
//! 64 KiB and refcounts of 16 bits (qcow2 specification), as `qemu-img create` makes it.
//! It leaves out compression and encryption, and reading what is in such a file: `format::qcow2`.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use crate::error::{Error, Result};

const CLUSTER: u64 = 64 << 10;
const CLUSTER_BITS: u32 = 16;
/// Entries of an L2 table.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of a block.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The cluster has one user: it can be written in place.
const COPIED: u64 = 1 << 63;
/// `refcount_order` of 16 bits.
const REFCOUNT_ORDER: u32 = 4;
/// The header with the compression type and its padding.
const HEADER_LENGTH: u32 = 112;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Length of the header of version 2, which has no length in it.
const HEADER_LENGTH_V2: u64 = 72;
/// The longest name of a file below (qcow2 specification, `backing_file_size`).
const LONGEST_NAME: u32 = 1023;
/// The name stands in the first cluster, and no cluster is larger.
const LARGEST_CLUSTER: u64 = 2 << 20;
/// More header extensions than any file has.
const MOST_EXTENSIONS: usize = 64;

/// Where everything is in the file; all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    virtual_size: u64,
    refcount_table: u64,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    blocks: u64,
    l1: u64,
    l2: u64,
    tables: u64,
    data: u64,
}

/// The file below, which an overlay shows where it has nothing of its own, as the overlay's header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its path, from the overlay's directory. What was read from a file may be any text.
    pub path: String,
    /// Its format; where it is not said, qemu guesses it.
    pub format: Option<String>,
}

impl Backing {
    /// A raw disk in the overlay's own directory.
    pub fn raw(name: &str) -> Self {
        Self { path: name.to_owned(), format: Some("raw".to_owned()) }
    }
}

impl Layout {
    /// For a disk of so many bytes.
    pub fn new(virtual_size: u64) -> Self {
        let clusters = virtual_size.div_ceil(CLUSTER);
        let tables = clusters.div_ceil(L2_ENTRIES);
        let l1_clusters = (tables * 8).div_ceil(CLUSTER);
        let rest = 1 + l1_clusters + tables + clusters;
        // The blocks count themselves and their table; a few rounds settle it.
        let (mut blocks, mut table_clusters) = (1, 1);
        loop {
            let needed = (rest + blocks + table_clusters).div_ceil(REFCOUNTS);
            let table_needed = (needed * 8).div_ceil(CLUSTER);
            if (needed, table_needed) == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = (needed, table_needed);
        }
        let refcount_blocks = CLUSTER * (1 + table_clusters);
        let l1 = refcount_blocks + CLUSTER * blocks;
        let l2 = l1 + CLUSTER * l1_clusters;
        Self {
            virtual_size,
            refcount_table: CLUSTER,
            refcount_table_clusters: table_clusters,
            refcount_blocks,
            blocks,
            l1,
            l2,
            tables,
            data: l2 + CLUSTER * tables,
        }
    }

    /// Where the disk begins in the file.
    pub fn data_offset(&self) -> u64 {
        self.data
    }

    /// The length of the file.
    pub fn file_size(&self) -> u64 {
        self.data + self.virtual_size.next_multiple_of(CLUSTER)
    }
}

/// Makes the file, whose disk is written and synced, an image: its tables, then its header, each on the device before the
/// next.
///
/// # Errors
/// `input_output`.
pub fn complete(file: &File, path: &Path, layout: &Layout, backing: Option<&Backing>) -> Result<()> {
    let failed = |error| Error::io("writing the tables of", path, error);
    let used = write_tables(file, layout).map_err(failed)?;
    write_refcounts(file, layout, &used).map_err(failed)?;
    file.sync_data().map_err(failed)?;
    file.write_all_at(&header(layout, backing), 0).map_err(failed)?;
    file.sync_all().map_err(failed)
}

/// Makes an empty file an overlay of so many bytes that shows what is below and, behind its end, zeros.
///
/// # Errors
/// `input_output`.
pub fn write_overlay(file: &File, path: &Path, virtual_size: u64, backing: &Backing) -> Result<()> {
    let layout = Layout::new(virtual_size);
    file.set_len(layout.l2).map_err(|error| Error::io("growing", path, error))?;
    complete(file, path, &layout, Some(backing))
}

/// The file below that a qcow2 file names; none where it names none, or is no qcow2 file that qemu would open.
///
/// The name is whatever the last writer of the file put there: it is to be compared with what is known, never followed.
///
/// # Errors
/// When the file cannot be read.
pub fn backing_of(file: &File) -> io::Result<Option<Backing>> {
    let mut fixed = [0; 104];
    let there = read_at_most(file, &mut fixed, 0)? as u64;
    let u32_at = |at: usize| u32::from_be_bytes(std::array::from_fn(|index| fixed[at + index]));
    let offset = u64::from_be_bytes(std::array::from_fn(|index| fixed[8 + index]));
    let length = u32_at(16);
    if there < HEADER_LENGTH_V2 || fixed[..4] != MAGIC || offset == 0 {
        return Ok(None);
    }
    if length == 0 || length > LONGEST_NAME || offset > LARGEST_CLUSTER {
        return Ok(None);
    }
    let extensions = if u32_at(4) == 2 { HEADER_LENGTH_V2 } else { u64::from(u32_at(100)) };
    let Some(path) = text_at(file, offset, length)? else { return Ok(None) };
    Ok(Some(Backing { path, format: backing_format(file, extensions, offset)? }))
}

/// The format of the file below, from the header extensions between `at` and `end`.
fn backing_format(file: &File, mut at: u64, end: u64) -> io::Result<Option<String>> {
    for _ in 0..MOST_EXTENSIONS {
        let mut head = [0; 8];
        if at + 8 > end || read_at_most(file, &mut head, at)? < head.len() {
            break;
        }
        let [kind, length] = [0, 4].map(|at| u32::from_be_bytes(std::array::from_fn(|index| head[at + index])));
        at += 8;
        match kind {
            BACKING_FORMAT if length <= LONGEST_NAME => return text_at(file, at, length),
            0 => break,
            _ => at += u64::from(length).next_multiple_of(8),
        }
    }
    Ok(None)
}

/// A text of the header; none where the file ends before it.
fn text_at(file: &File, offset: u64, length: u32) -> io::Result<Option<String>> {
    let mut text = vec![0; length as usize];
    let there = read_at_most(file, &mut text, offset)?;
    Ok((there == text.len()).then(|| String::from_utf8_lossy(&text).into_owned()))
}

fn read_at_most(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < into.len() {
        match file.read_at(&mut into[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Writes the L2 tables that map something, and the L1 table; gives which tables those are.
fn write_tables(file: &File, layout: &Layout) -> io::Result<Vec<bool>> {
    let mut used = vec![false; layout.tables as usize];
    let mut table = vec![0; CLUSTER as usize];
    let mut current = None;
    for_each_cluster(file, layout, |cluster| {
        let index = cluster / L2_ENTRIES;
        if current != Some(index) {
            if let Some(before) = current.replace(index) {
                file.write_all_at(&table, layout.l2 + before * CLUSTER)?;
            }
            table.fill(0);
            used[index as usize] = true;
        }
        let at = (cluster % L2_ENTRIES * 8) as usize;
        table[at..at + 8].copy_from_slice(&(COPIED | (layout.data + cluster * CLUSTER)).to_be_bytes());
        Ok(())
    })?;
    if let Some(last) = current {
        file.write_all_at(&table, layout.l2 + last * CLUSTER)?;
    }
    for (index, _) in used.iter().enumerate().filter(|(_, used)| **used) {
        let entry = COPIED | (layout.l2 + index as u64 * CLUSTER);
        file.write_all_at(&entry.to_be_bytes(), layout.l1 + index as u64 * 8)?;
    }
    Ok(used)
}

/// Writes a refcount of 1 for every cluster that is used.
fn write_refcounts(file: &File, layout: &Layout, used: &[bool]) -> io::Result<()> {
    let mut blocks = Refcounts { file, layout, current: None, block: vec![0; CLUSTER as usize] };
    // The blocks' own places count whether or not they are written: a place in the table is all that says so.
    let fixed = 0..1 + layout.refcount_table_clusters;
    let tables = layout.l2 / CLUSTER;
    let l1 = layout.l1 / CLUSTER..tables;
    let first_block = layout.refcount_blocks / CLUSTER;
    let written = blocks_in_use(file, layout, used)?;
    let block_clusters = written.iter().map(|block| first_block + block);
    let l2 = (0..layout.tables).filter(|index| used[*index as usize]).map(|index| tables + index);
    for cluster in fixed.chain(block_clusters).chain(l1).chain(l2) {
        blocks.count(cluster)?;
    }
    let data = layout.data / CLUSTER;
    for_each_cluster(file, layout, |cluster| blocks.count(data + cluster))?;
    blocks.flush()
}

/// The refcount blocks that have something to count, in order.
fn blocks_in_use(file: &File, layout: &Layout, used: &[bool]) -> io::Result<Vec<u64>> {
    let mut found = vec![false; layout.blocks as usize];
    let mut note = |cluster: u64| found[(cluster / REFCOUNTS) as usize] = true;
    (0..layout.l2 / CLUSTER).for_each(&mut note);
    let tables = layout.l2 / CLUSTER;
    (0..layout.tables).filter(|index| used[*index as usize]).for_each(|index| note(tables + index));
    for_each_cluster(file, layout, |cluster| {
        note(layout.data / CLUSTER + cluster);
        Ok(())
    })?;
    Ok((0..layout.blocks).filter(|block| found[*block as usize]).collect())
}

/// The refcount block that is being filled. Clusters come in ascending order.
struct Refcounts<'a> {
    file: &'a File,
    layout: &'a Layout,
    current: Option<u64>,
    block: Vec<u8>,
}

impl Refcounts<'_> {
    fn count(&mut self, cluster: u64) -> io::Result<()> {
        let index = cluster / REFCOUNTS;
        if self.current != Some(index) {
            self.flush()?;
            self.current = Some(index);
            self.block.fill(0);
        }
        let at = (cluster % REFCOUNTS * 2) as usize;
        self.block[at..at + 2].copy_from_slice(&1_u16.to_be_bytes());
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let Some(index) = self.current.take() else { return Ok(()) };
        let offset = self.layout.refcount_blocks + index * CLUSTER;
        self.file.write_all_at(&self.block, offset)?;
        self.file.write_all_at(&offset.to_be_bytes(), self.layout.refcount_table + index * 8)
    }
}

/// Calls `each` with every cluster of the disk that is not a hole of the file, in order.
fn for_each_cluster(file: &File, layout: &Layout, mut each: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
    let end = layout.data + layout.virtual_size;
    let (mut at, mut next) = (layout.data, 0);
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?.min(end);
        let first = ((start - layout.data) / CLUSTER).max(next);
        next = (at - layout.data).div_ceil(CLUSTER);
        (first..next).try_for_each(&mut each)?;
    }
    Ok(())
}

fn header(layout: &Layout, backing: Option<&Backing>) -> Vec<u8> {
    let mut extensions = Vec::new();
    if let Some(format) = backing.and_then(|backing| backing.format.as_deref()) {
        extensions.extend(BACKING_FORMAT.to_be_bytes());
        extensions.extend((format.len() as u32).to_be_bytes());
        extensions.extend(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
    }
    extensions.extend([0; 8]);
    let name = backing.map_or("", |backing| backing.path.as_str());
    let name_offset = if name.is_empty() { 0 } else { u64::from(HEADER_LENGTH) + extensions.len() as u64 };
    let mut header = Vec::from(MAGIC);
    let u32 = |header: &mut Vec<u8>, value: u32| header.extend(value.to_be_bytes());
    let u64 = |header: &mut Vec<u8>, value: u64| header.extend(value.to_be_bytes());
    u32(&mut header, 3);
    u64(&mut header, name_offset);
    u32(&mut header, name.len() as u32);
    u32(&mut header, CLUSTER_BITS);
    u64(&mut header, layout.virtual_size);
    u32(&mut header, 0); // not encrypted
    u32(&mut header, layout.tables as u32);
    u64(&mut header, layout.l1);
    u64(&mut header, layout.refcount_table);
    u32(&mut header, layout.refcount_table_clusters as u32);
    u32(&mut header, 0); // no snapshots
    u64(&mut header, 0);
    u64(&mut header, 0); // features: incompatible, compatible, autoclear
    u64(&mut header, 0);
    u64(&mut header, 0);
    u32(&mut header, REFCOUNT_ORDER);
    u32(&mut header, HEADER_LENGTH);
    header.resize(HEADER_LENGTH as usize, 0);
    header.extend(extensions);
    header.extend(name.as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use std::fs;

    use e2e::images;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A file with this disk in it, made an image.
    fn image(path: &Path, disk: &[(u64, Vec<u8>)], virtual_size: u64) {
        let layout = Layout::new(virtual_size);
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(layout.file_size()).unwrap();
        for (offset, bytes) in disk {
            file.write_all_at(bytes, layout.data_offset() + offset).unwrap();
        }
        complete(&file, path, &layout, None).unwrap();
    }

    fn check(path: &Path) {
        let said = images::run("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]).unwrap();
        assert!(said.contains("No errors were found"), "{said}");
    }

    #[test]
    fn qemu_finds_no_error_and_the_same_disk() {
        for (virtual_size, places) in [
            (512, vec![0]),
            (CLUSTER, vec![]),
            (3 * MIB + 512, vec![0, 70_000, 3 * MIB]),
            (700 * MIB, vec![5, 511 * MIB, 512 * MIB, 700 * MIB - 4096]),
            (5 << 40, vec![0, 1 << 40, (5 << 40) - 4096]),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("image.qcow2");
            let disk: Vec<_> = places.iter().map(|at| (*at, vec![7; 4096.min(virtual_size - at) as usize])).collect();
            image(&path, &disk, virtual_size);
            assert_eq!(backing_of(&File::open(&path).unwrap()).unwrap(), None);
            check(&path);
            for (at, bytes) in &disk {
                let read = format!("read -P 7 {at} {}", bytes.len());
                images::qemu_io(&path, &[&read]).unwrap();
            }
            let info = images::run("qemu-img", &["info", path.to_str().unwrap()]).unwrap();
            assert!(info.contains(&format!("({virtual_size} bytes)")), "{info}");
            // What a machine does with it then.
            if virtual_size >= 3 * MIB {
                images::qemu_io(&path, &["write -P 9 1M 1M", "read -P 9 1M 1M"]).unwrap();
                check(&path);
            }
        }
    }

    #[test]
    fn an_overlay_shows_what_is_below_and_zeros_behind_and_is_small() {
        for virtual_size in [4 * MIB, 700 * MIB + CLUSTER, 50 << 30, 8 << 40] {
            let directory = tempfile::tempdir().unwrap();
            let (base, overlay) = (directory.path().join("base.raw"), directory.path().join("overlay.qcow2"));
            fs::write(&base, vec![5; MIB as usize]).unwrap();
            let file = fs::OpenOptions::new().write(true).create_new(true).open(&overlay).unwrap();
            write_overlay(&file, &overlay, virtual_size, &Backing::raw("base.raw")).unwrap();
            assert_eq!(backing_of(&File::open(&overlay).unwrap()).unwrap(), Some(Backing::raw("base.raw")));
            let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&overlay).unwrap());
            assert!(blocks * 512 < MIB, "{blocks} blocks of an overlay of {virtual_size} bytes");
            check(&overlay);
            let info = images::run("qemu-img", &["info", overlay.to_str().unwrap()]).unwrap();
            assert!(info.contains(&format!("({virtual_size} bytes)")) && info.contains("format: raw"), "{info}");
            let end = format!("read -P 0 {} 64k", virtual_size - CLUSTER);
            let commands = ["read -P 5 0 1M", "read -P 0 1M 3M", &end, "write -P 6 512k 1M", "read -P 6 512k 1M"];
            images::qemu_io(&overlay, &commands).unwrap();
            let last = format!("write -P 7 {} 64k", virtual_size - CLUSTER);
            images::qemu_io(&overlay, &[&last, &last.replace("write", "read"), "read -P 6 512k 1M"]).unwrap();
            check(&overlay);
            assert!(fs::read(&base).unwrap().iter().all(|byte| *byte == 5));
        }
    }

    #[test]
    fn what_qemu_img_names_below_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let longest = "b".repeat(200);
        fs::write(at(&longest), vec![0; MIB as usize]).unwrap();
        for (name, options) in [("v3", "compat=1.1,cluster_size=2M"), ("v2", "compat=0.10,cluster_size=512")] {
            let arguments = ["create", "-q", "-f", "qcow2", "-o", options, "-b", &longest, "-F", "raw", &at(name)];
            images::run("qemu-img", &arguments).unwrap();
            assert_eq!(backing_of(&File::open(at(name)).unwrap()).unwrap(), Some(Backing::raw(&longest)), "{name}");
        }
        // The name is known before the content: nothing that follows from a damaged one is read.
        let whole = fs::read(at("v3")).unwrap();
        for (at_byte, value) in [(0, 0), (8, 0xff), (16, 0xff), (18, 0xff)] {
            let mut bytes = whole[..4096].to_vec();
            bytes[at_byte] = value;
            fs::write(at("damaged"), bytes).unwrap();
            assert_eq!(backing_of(&File::open(at("damaged")).unwrap()).unwrap(), None, "{at_byte}");
        }
        for length in [0, 3, 71, 104, 300] {
            fs::write(at("cut"), &whole[..length]).unwrap();
            assert_eq!(backing_of(&File::open(at("cut")).unwrap()).unwrap(), None, "{length}");
        }
    }
}
