//! The digest of what a volume holds: `blake3:<64 hex>`, the same for one image on volumes of any size.
//!
//! The content is cut into pieces of 1 MiB. Pieces that are all zero are left out; of each other one, in order, its number
//! (64 bits, little endian) and its BLAKE3 are hashed by BLAKE3 again. So neither the zeros behind the image nor the order
//! in which a volume was written changes it. It leaves out computing it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::Invalid;

/// What stands before the digits.
const PREFIX: &str = "blake3:";
/// The digits of a BLAKE3.
const DIGITS: usize = 64;

/// The digest of a volume's content. Shown as `blake3:ab12…`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ContentDigest {
    hex: String,
}

impl ContentDigest {
    /// Bytes of a piece.
    pub const PIECE: u64 = 1 << 20;

    /// From the 32 bytes that BLAKE3 gave.
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        Self { hex: bytes.iter().map(|byte| format!("{byte:02x}")).collect() }
    }

    /// The hexadecimal text, lower case.
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

impl FromStr for ContentDigest {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let hex = text.strip_prefix(PREFIX).filter(|hex| hex.len() == DIGITS);
        match hex.filter(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            Some(hex) => Ok(Self { hex: hex.to_ascii_lowercase() }),
            None => Err(Invalid(format!("'{}' is not {PREFIX} and {DIGITS} hexadecimal digits", text.escape_debug()))),
        }
    }
}

impl fmt::Display for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex)
    }
}

impl fmt::Debug for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for ContentDigest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ContentDigest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_as_it_is_shown() {
        let digest = ContentDigest::from_bytes(&[0xab; 32]);
        assert_eq!(digest.to_string().parse::<ContentDigest>().unwrap(), digest);
        for text in ["", "blake3:", "sha256:00", &"a".repeat(64), &format!("blake3:{}", "g".repeat(64))] {
            assert!(text.parse::<ContentDigest>().is_err(), "{text}");
        }
    }
}
