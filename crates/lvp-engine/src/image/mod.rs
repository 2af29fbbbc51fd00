//! Images: where they come from, what promises their bytes, and the content-addressed cache that keeps them.
//!
//! ```text
//!   images      Images: resolve, fetch, publish, verify, list, pin, delete
//!   ├─ location   image URLs                     ├─ directory   names, lock, rename
//!   ├─ checksum   `<url>.sha256`                 ├─ sidecar     what is remembered per image
//!   ├─ source     look, ranges, streams          ├─ index       lookups, admission, eviction
//!   │  ├─ web, file   one attempt                ├─ entry       an image in use
//!   │  ├─ http, sign  one request                ├─ flight      one download per image
//!   │  ├─ retry       when again                 └─ download    from the source to a file
//!   │  └─ pace        when too slow                 ├─ pieces   several ranges at once
//!                                                  ├─ writer   file, mark, hash
//!                                                  └─ partial  what a restart continues
//!   ├─ chunks       digests that a hit is checked by
//!   ├─ users        who uses a file beside us
//!   ├─ resolved     a wanted image, looked up
//!   └─ reader       random access before the fetch
//! ```
//! It leaves out what is in an image: who asks for one reads its format between [`Images::fetch`] and
//! [`Unpublished::publish`], so that nothing unread is published.

mod checksum;
mod chunks;
mod directory;
mod download;
mod entry;
mod escape;
mod file;
mod flight;
mod full;
mod hasher;
mod http;
mod images;
mod index;
mod location;
mod pace;
#[cfg(feature = "fuzz")]
pub mod parsers;
mod partial;
mod pieces;
mod probe;
mod reader;
mod resolved;
mod retry;
mod settings;
mod sidecar;
mod sign;
mod source;
#[cfg(test)]
mod tests;
mod users;
mod web;
mod writer;

pub use download::{Along, Growing};
pub use entry::{Entry, Stamp};
pub use images::{Fetch, ImageSettings, Images, Unpublished, Wanted};
pub use location::ImageUrl;
pub use probe::probe_store;
pub use reader::Reader;
pub use resolved::Resolved;
pub use settings::{Credentials, Secret, SourceSettings, parse_endpoint};
pub use source::serves_no_parts;
pub use users::Users;
