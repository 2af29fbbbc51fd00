//! The whole gate on arbitrary bytes, and the map of what it lets through.

#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use lvp_api::ImageFormat;
use lvp_engine::format::Bytes;
use lvp_fuzz::{image, opened, walk};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((_, bytes)) = image(input) else { return Corpus::Reject };
    if let Some(image) = opened(bytes.clone(), ImageFormat::Qcow2) {
        walk(&image, bytes.len());
    }
    Corpus::Keep
});
