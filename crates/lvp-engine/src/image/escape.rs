//! Percent-encoding as S3 signatures want it, and its reverse.
//!
//! Source: Signature Version 4, "UriEncode": everything but `A-Z a-z 0-9 - . _ ~` is encoded, in upper-case
//! hexadecimal; the `/` between parts of a key is not. It leaves out form encoding (`+`), which paths do not use.

use std::fmt::Write;

/// Encodes a text; `keep_slash` for the key of an object.
pub(super) fn percent_encode(text: &str, keep_slash: bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (keep_slash && byte == b'/') {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// Decodes a text. A `%` that begins no code stands for itself; bytes that are not UTF-8 become U+FFFD.
pub(super) fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = (bytes[at] == b'%').then(|| hexadecimal(bytes.get(at + 1..at + 3)?)).flatten();
        decoded.push(code.unwrap_or(bytes[at]));
        at += if code.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

fn hexadecimal(digits: &[u8]) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(digits[0])? * 16 + digit(digits[1])?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_as_the_signature_wants() {
        assert_eq!(percent_encode("a b/ü+~", true), "a%20b/%C3%BC%2B~");
        assert_eq!(percent_encode("a/b", false), "a%2Fb");
    }

    proptest::proptest! {
        #[test]
        fn decoding_reverses_encoding(text: String) {
            proptest::prop_assert_eq!(percent_decode(&percent_encode(&text, true)), text);
        }
    }

    #[test]
    fn a_lone_percent_sign_stands_for_itself() {
        assert_eq!(percent_decode("100%"), "100%");
        assert_eq!(percent_decode("%zz%4"), "%zz%4");
        assert_eq!(percent_decode("%+1"), "%+1");
    }
}
