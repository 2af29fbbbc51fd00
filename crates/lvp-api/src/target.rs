//! Where volumes live: a target's written form, `lvm:GROUP[/POOL]` or `dir:/PATH`, or the name of a configured one.
//!
//! It leaves out the settings of a configured target and everything that acts on one.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Invalid;

/// Which bytes of a volume are made zero, beside those that the image has as zeros.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ZeroPolicy {
    /// All that are not the image's: after a provision no byte of before is left.
    #[default]
    Full,
    /// Those up to the end of the image's disk; what lies behind is left as it was. For volumes that are known to be clean.
    Image,
}

impl ZeroPolicy {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Image => "image",
        }
    }
}

impl FromStr for ZeroPolicy {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        [Self::Full, Self::Image].into_iter().find(|policy| policy.name() == text).ok_or_else(|| {
            Invalid(format!("'{}' says not what is zeroed; there are full and image", text.escape_debug()))
        })
    }
}

/// How a directory's files hold their disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// As it is, in a sparse file `NAME.raw`.
    #[default]
    Raw,
    /// As a qcow2 image, `NAME.qcow2`. It needs no other file, unless its target is linked.
    Qcow2,
}

impl DiskFormat {
    /// The name on the wire, which is also the file name's ending.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl FromStr for DiskFormat {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        [Self::Raw, Self::Qcow2].into_iter().find(|format| format.name() == text).ok_or_else(|| {
            Invalid(format!("'{}' is no format of a volume; there are raw and qcow2", text.escape_debug()))
        })
    }
}

/// A place for volumes that a request or the configuration names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TargetSpec {
    /// An LVM volume group; with a pool, new volumes are thin.
    Lvm {
        /// The volume group.
        volume_group: String,
        /// The thin pool in it.
        thin_pool: Option<String>,
    },
    /// A directory of raw files.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
    /// A target of the configuration, by its name.
    Named(String),
}

fn is_lvm_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 127
        && !name.starts_with('-')
        && name != "."
        && name != ".."
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "+_.-".contains(c))
}

impl FromStr for TargetSpec {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = |why: &str| {
            Invalid(format!(
                "target '{}' {why}; write lvm:GROUP, lvm:GROUP/POOL, dir:/PATH or a configured name",
                text.escape_debug()
            ))
        };
        match text.split_once(':') {
            Some(("lvm", rest)) => {
                let (group, pool) = rest.split_once('/').map_or((rest, None), |(group, pool)| (group, Some(pool)));
                if !is_lvm_name(group) || !pool.is_none_or(is_lvm_name) {
                    return Err(invalid("does not name a volume group"));
                }
                Ok(Self::Lvm { volume_group: group.to_owned(), thin_pool: pool.map(str::to_owned) })
            }
            Some(("dir", path)) if path.split('/').any(|part| part == "..") => Err(invalid("has '..' in its path")),
            Some(("dir", path)) if path.starts_with('/') => Ok(Self::Directory { path: PathBuf::from(path) }),
            Some(("dir", _)) => Err(invalid("needs an absolute path")),
            Some(_) => Err(invalid("has an unknown kind")),
            None if is_lvm_name(text) => Ok(Self::Named(text.to_owned())),
            None => Err(invalid("is not a name")),
        }
    }
}

impl fmt::Display for TargetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lvm { volume_group, thin_pool: None } => write!(f, "lvm:{volume_group}"),
            Self::Lvm { volume_group, thin_pool: Some(pool) } => write!(f, "lvm:{volume_group}/{pool}"),
            Self::Directory { path } => write!(f, "dir:{}", path.display()),
            Self::Named(name) => f.write_str(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_prints() {
        for text in ["lvm:vg0", "lvm:vg0/pool0", "dir:/srv/volumes", "fast"] {
            assert_eq!(text.parse::<TargetSpec>().unwrap().to_string(), text);
        }
        for text in ["", "lvm:", "lvm:/pool", "lvm:vg0/", "lvm:-a", "dir:relative", "dir:/a/../b", "nfs:/x", "a b"] {
            assert!(text.parse::<TargetSpec>().is_err(), "{text}");
        }
    }
}
