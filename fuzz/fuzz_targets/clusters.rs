//! Compressed clusters: a valid file around the fuzzer's bytes, so that these reach the decoders at once. The first byte
//! chooses the method and the size of a cluster. Whatever a decoder and its buffer held before, the outcome is the same:
//! no byte of another cluster shows through.

#![no_main]

use std::sync::{Arc, Mutex, PoisonError};

use libfuzzer_sys::{Corpus, fuzz_target};
use lvp_api::{ErrorCode, ImageFormat};
use lvp_engine::format::{Bytes, Decoder};
use lvp_fuzz::{around_cluster, opened, walk};

/// Sizes of clusters, as powers of two: to the usual one, since larger ones are only slower.
const BITS: [u32; 8] = [16, 9, 12, 10, 11, 13, 14, 15];

/// One that has decoded all inputs before.
static USED: Mutex<Option<Decoder>> = Mutex::new(None);

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((choice, stored)) = input.split_first() else { return Corpus::Reject };
    let bits = BITS[usize::from(choice >> 1) % BITS.len()];
    if stored.is_empty() || stored.len() > 2 << bits {
        return Corpus::Reject;
    }
    let bytes = Arc::new(around_cluster(bits, choice % 2 == 1, stored));
    let image = opened(bytes.clone(), ImageFormat::Qcow2).expect("the image around the cluster is in order");
    walk(&image, bytes.len());
    let extent = image.extents().next().expect("it has an extent").expect("its tables can be read");
    let decoded = |decoder: &mut Decoder, before: u8| {
        let mut cluster = vec![before; 1 << bits];
        match image.read(&extent, decoder, &mut cluster) {
            Ok(()) => Some(cluster),
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::ImageInvalid, "{error:?}");
                None
            }
        }
    };
    let fresh = decoded(&mut Decoder::new().unwrap(), 0);
    let mut used = USED.lock().unwrap_or_else(PoisonError::into_inner);
    let again = decoded(used.get_or_insert_with(|| Decoder::new().unwrap()), 0xaa);
    assert!(fresh == again, "what was decoded before makes a difference");
    Corpus::Keep
});
