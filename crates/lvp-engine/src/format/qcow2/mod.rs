//! Our own reader (and, for new volumes, writer) of qcow2, versions 2 and 3, read-only and without other files: zlib and zstd, extended L2 entries,
//! clusters of 512 B to 2 MiB. Internal snapshots are ignored: the active disk is read.
//!
//! Source of every fact: the qcow2 specification (docs/interop/qcow2.txt of QEMU), and where that leaves room, what
//! `qemu-img` writes and accepts.
//!
//! ```text
//! header    the header and its extensions, checked
//! tables    the entries of L1 and L2 tables, decoded and checked one by one
//! check     all tables against one another
//! extents   the map, as a walk over the tables
//! decode    one compressed cluster
//! write     the tables of a new file, around a disk that is in it
//! ```
//! The reader leaves out refcounts, snapshots, bitmaps, encryption, backing and data files.

mod check;
mod decode;
mod extents;
mod header;
mod tables;
mod write;

pub use check::{check, check_first_level};
pub use decode::Decoder;
pub use extents::Extents;
pub use header::Header;
pub use write::{Layout, complete};
