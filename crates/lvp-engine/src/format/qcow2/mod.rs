//! Our own reader of qcow2, versions 2 and 3, read-only and without other files: zlib and zstd, extended L2 entries,
//! clusters of 512 B to 2 MiB. Internal snapshots are ignored: the active disk is read. An image that names a file below is
//! refused; only `overlay` beside this module reads one, of a volume of ours.
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
//! ```
//! It leaves out refcounts, snapshots, bitmaps, encryption, data files, and writing: `qcow2_file`.

mod check;
mod decode;
mod extents;
mod header;
mod tables;

pub use check::{check, check_first_level};
pub use decode::Decoder;
pub use extents::Extents;
pub use header::Header;
pub use tables::{Cluster, cluster_at};
