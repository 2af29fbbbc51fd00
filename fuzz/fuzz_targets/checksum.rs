//! Checksum files: the first line is the image's name, the rest the file. A digest that is found stands in the file.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lvp_engine::parsers;

fuzz_target!(|input: &[u8]| {
    let end = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let name = String::from_utf8_lossy(&input[..end]);
    let file = input.get(end + 1..).unwrap_or_default();
    match parsers::checksum(file, &name) {
        Ok(digest) => {
            let text = String::from_utf8_lossy(file).to_ascii_lowercase();
            assert!(text.contains(digest.hex()), "{} does not stand in the file", digest.hex());
        }
        Err(why) => assert!(!why.is_empty() && !why.contains(char::is_control), "{why:?}"),
    }
});
