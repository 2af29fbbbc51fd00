//! The cheap gate on arbitrary bytes, declared as either format: it refuses in known words, and reads no more than a
//! header, its extensions and one table have.

#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use lvp_api::ImageFormat;
use lvp_engine::format::{Bytes, VIRTUAL_SIZE_LIMIT, inspect};
use lvp_fuzz::{assert_refusal, image};

fuzz_target!(|input: &[u8]| -> Corpus {
    for format in [ImageFormat::Qcow2, ImageFormat::Raw] {
        let Some((_, bytes)) = image(input) else { return Corpus::Reject };
        match inspect(&*bytes, format) {
            Ok(header) => {
                assert!(header.virtual_size.is_some_and(|size| (1..=VIRTUAL_SIZE_LIMIT).contains(&size)));
                assert_eq!(header.stored_size, bytes.len());
            }
            Err(error) => assert_refusal(&error),
        }
        // The extensions once and the table once; the same field may be read by two windows.
        assert!(bytes.bytes_read() <= 2 * bytes.len() + 1024, "{} bytes were read", bytes.bytes_read());
    }
    Corpus::Keep
});
