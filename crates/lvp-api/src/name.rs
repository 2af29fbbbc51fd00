//! Names of volumes: the rules of LVM, kept for every backend, so that a name that works on one works on all.
//!
//! Source: lvm(8), section "VALID NAMES": `[a-zA-Z0-9+_.-]`, no leading hyphen, not `.` or `..`, at most 127
//! characters, and the reserved words below.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::Invalid;

/// Longest name that LVM takes (the device-mapper name with its group must also stay below 128, which LVM checks).
const LONGEST: usize = 127;
/// Names that may not begin so.
const RESERVED_PREFIXES: [&str; 2] = ["snapshot", "pvmove"];
/// Names that may not contain these: LVM keeps them for the hidden parts of its own volumes.
const RESERVED_PARTS: [&str; 15] = [
    "_cdata", "_cmeta", "_corig", "_iorig", "_mlog", "_mimage", "_pmspare", "_rimage", "_rmeta", "_tdata", "_tmeta",
    "_vdata", "_vorigin", "_wcorig", "_imeta",
];

/// The name of a volume, checked.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct VolumeName(String);

impl VolumeName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Self, Invalid> {
        let refuse = |why: &str| Err(Invalid(format!("volume name '{}' {why}", name.escape_debug())));
        if name.is_empty() {
            return Err(Invalid("the volume name is empty".to_owned()));
        }
        if name.len() > LONGEST {
            return Err(Invalid(format!(
                "the volume name has {} characters; at most {LONGEST} are possible",
                name.len()
            )));
        }
        if name == "." || name == ".." {
            return refuse("is a directory, not a name");
        }
        if let Some(bad) = name.chars().find(|c| !c.is_ascii_alphanumeric() && !"+_.-".contains(*c)) {
            return refuse(&format!("contains '{}'; letters, digits and + _ . - are possible", bad.escape_debug()));
        }
        if name.starts_with('-') {
            return refuse("begins with '-'");
        }
        if RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
            || RESERVED_PARTS.iter().any(|part| name.contains(part))
        {
            return refuse("is reserved by LVM");
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<'de> Deserialize<'de> for VolumeName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_lvm_takes() {
        for name in ["a", "itx-master-controlplane-1", "vm_root.disk+1", "0", &"x".repeat(127)] {
            assert!(name.parse::<VolumeName>().is_ok(), "{name}");
        }
    }

    #[test]
    fn refuses_what_lvm_refuses() {
        for name in [
            "",
            ".",
            "..",
            "-a",
            "a/b",
            "../etc",
            "a b",
            "a\n",
            "ü",
            "snapshot1",
            "pvmove0",
            "x_tmeta",
            "a_rimage_0",
            &"x".repeat(128),
        ] {
            assert!(name.parse::<VolumeName>().is_err(), "{name}");
        }
    }
}
