//! Sizes in bytes, as people write them (`50G`, `1.5TiB`) and as programs do (53687091200).
//!
//! `K M G T P` and `Ki … Pi` (with or without `B`) all mean powers of 1024, as in LVM's and qemu's tools;
//! decimal units are refused rather than misread.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::Invalid;

/// Bytes in a mebibyte.
pub const MIB: u64 = 1 << 20;
/// Bytes in a gibibyte.
pub const GIB: u64 = 1 << 30;

/// A number of bytes. In JSON a number; text with a unit is read too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u64); 5] = [("K", 1 << 10), ("M", MIB), ("G", GIB), ("T", 1 << 40), ("P", 1 << 50)];

impl FromStr for ByteSize {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let trimmed = text.trim();
        let invalid = || {
            Invalid(format!(
                "'{text}' is not a size; write bytes or a number with K, M, G, T or P (powers of 1024), such as 50G"
            ))
        };
        let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let factor = unit_factor(unit.trim()).ok_or_else(invalid)?;
        if let Ok(whole) = number.parse::<u64>() {
            return whole
                .checked_mul(factor)
                .map(Self)
                .ok_or_else(|| Invalid(format!("'{text}' is more bytes than can be counted")));
        }
        let fraction: f64 = number.parse().map_err(|_| invalid())?;
        let bytes = fraction * factor as f64;
        if factor == 1 || !bytes.is_finite() || bytes >= u64::MAX as f64 {
            return Err(invalid());
        }
        Ok(Self(bytes as u64))
    }
}

fn unit_factor(unit: &str) -> Option<u64> {
    if unit.is_empty() || unit.eq_ignore_ascii_case("b") {
        return Some(1);
    }
    let letter = unit.get(..1)?.to_ascii_uppercase();
    let rest = unit.get(1..)?;
    let known_rest = rest.is_empty() || rest == "i" || rest == "iB";
    UNITS.iter().find(|(name, _)| *name == letter && known_rest).map(|(_, factor)| *factor)
}

impl fmt::Display for ByteSize {
    /// With the largest unit that leaves a number of at least one, two decimals at most: `50 GiB`, `1.5 MiB`, `512 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((name, factor)) = UNITS.iter().rev().find(|(_, factor)| self.0 >= *factor) else {
            return write!(f, "{} B", self.0);
        };
        let text = format!("{:.2}", self.0 as f64 / *factor as f64);
        write!(f, "{} {name}iB", text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl Serialize for ByteSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size: bytes as a number, or text such as \"50G\"")
            }
            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("50G", 50 * GIB),
            ("50 GiB", 50 * GIB),
            ("50g", 50 * GIB),
            ("1.5M", MIB + MIB / 2),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().0, bytes, "{text}");
        }
    }

    #[test]
    fn refuses_what_it_would_misread() {
        for text in ["", "G", "-1G", "50GB", "1.5", "1e9", "50 G B", "99999999999P", "1..5G", "50Gé", "é"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn prints_short() {
        assert_eq!(ByteSize(50 * GIB).to_string(), "50 GiB");
        assert_eq!(ByteSize(MIB + MIB / 2).to_string(), "1.5 MiB");
        assert_eq!(ByteSize(10).to_string(), "10 B");
        assert_eq!(ByteSize(0).to_string(), "0 B");
    }
}
