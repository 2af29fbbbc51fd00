//! What is remembered of cached images and of partial downloads: what is read can be written and read again as the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lvp_engine::parsers;

fuzz_target!(|input: &[u8]| {
    for parse in [parsers::sidecar, parsers::origin] {
        if let Ok(written) = parse(input) {
            let again = parse(&written).expect("what is written can be read");
            assert!(written == again, "{}\n{}", String::from_utf8_lossy(&written), String::from_utf8_lossy(&again));
        }
    }
});
