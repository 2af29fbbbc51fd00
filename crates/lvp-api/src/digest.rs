//! Content digests: `sha256:<64 hex>` and `sha512:<128 hex>`. It leaves out computing them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::Invalid;

/// The hash functions that image checksums may use. Weaker ones (MD5, SHA-1) do not protect and are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DigestAlgorithm {
    /// SHA-256, 32 bytes.
    Sha256,
    /// SHA-512, 64 bytes.
    Sha512,
}

impl DigestAlgorithm {
    /// The name before the colon: `sha256`, `sha512`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// The length of the hexadecimal text.
    pub fn hex_length(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// A digest with its algorithm, always lower-case hexadecimal. Shown as `sha256:ab12…`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest {
    algorithm: DigestAlgorithm,
    hex: String,
}

impl Digest {
    /// From hexadecimal text of the algorithm's length; upper case is folded.
    pub fn new(algorithm: DigestAlgorithm, hex: &str) -> Result<Self, Invalid> {
        if hex.len() != algorithm.hex_length() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Invalid(format!(
                "a {} digest has {} hexadecimal digits; this has {} characters",
                algorithm.name(),
                algorithm.hex_length(),
                hex.len()
            )));
        }
        Ok(Self { algorithm, hex: hex.to_ascii_lowercase() })
    }

    /// From the raw bytes that a hash function gave.
    ///
    /// # Panics
    /// When the length is not the algorithm's: a defect of the caller.
    pub fn from_bytes(algorithm: DigestAlgorithm, bytes: &[u8]) -> Self {
        assert_eq!(bytes.len() * 2, algorithm.hex_length(), "digest length");
        Self { algorithm, hex: bytes.iter().map(|byte| format!("{byte:02x}")).collect() }
    }

    /// The hash function.
    pub fn algorithm(&self) -> DigestAlgorithm {
        self.algorithm
    }

    /// The hexadecimal text, lower case.
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

impl FromStr for Digest {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text.split_once(':') {
            Some((name, hex)) if name.eq_ignore_ascii_case("sha256") => Self::new(DigestAlgorithm::Sha256, hex),
            Some((name, hex)) if name.eq_ignore_ascii_case("sha512") => Self::new(DigestAlgorithm::Sha512, hex),
            Some((name, _)) => {
                Err(Invalid(format!("checksum algorithm '{name}' is not supported; use sha256 or sha512")))
            }
            None => Err(Invalid("a checksum is written sha256:<64 hex digits> or sha512:<128 hex digits>".to_owned())),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_prints_one_form() {
        let upper = format!("SHA256:{}", "AB".repeat(32));
        assert_eq!(upper.parse::<Digest>().unwrap().to_string(), format!("sha256:{}", "ab".repeat(32)));
        assert!(format!("sha512:{}", "0".repeat(128)).parse::<Digest>().is_ok());
    }

    #[test]
    fn refuses_what_does_not_protect() {
        for text in
            ["", "abc", "md5:d41d8cd98f00b204e9800998ecf8427e", "sha256:12", &format!("sha256:{}", "zz".repeat(32))]
        {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
