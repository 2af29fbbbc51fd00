//! The configured targets by name, and the ones that an administrator writes out (`lvm:vg0`, `dir:/srv`).

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use lvp_api::{DiskFormat, ErrorCode, TargetSpec, VolumeName, ZeroPolicy};

use super::{LockRetry, VolumeBackend, backend};
use crate::error::{Error, Result};

/// The name of the target that a request means when it names none.
const DEFAULT: &str = "default";

/// What the configuration says of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetSettings {
    /// What it is.
    pub spec: TargetSpec,
    /// What is zeroed in its volumes.
    pub zero: ZeroPolicy,
    /// How its files hold their disks; raw where volumes are no files.
    pub format: DiskFormat,
    /// Whether new volumes are overlays on a base in the same directory; of qcow2 files only.
    pub linked: bool,
}

impl From<TargetSpec> for TargetSettings {
    fn from(spec: TargetSpec) -> Self {
        Self { spec, zero: ZeroPolicy::Full, format: DiskFormat::Raw, linked: false }
    }
}

/// All targets.
pub struct Targets {
    configured: BTreeMap<String, TargetSettings>,
    retry: LockRetry,
}

/// A target that was found: what it is, and its backend.
#[derive(Clone)]
pub struct Target {
    /// What it is, written out.
    pub spec: TargetSpec,
    /// What is zeroed in its volumes.
    pub zero: ZeroPolicy,
    /// How its files hold their disks.
    pub format: DiskFormat,
    /// Whether new volumes are overlays on a base.
    pub linked: bool,
    /// How to act on it.
    pub backend: Arc<dyn VolumeBackend>,
}

impl Target {
    /// What no two jobs may work on at once: the volume itself, by whatever target it was named.
    pub fn exclusive_key(&self, name: &VolumeName) -> String {
        match &self.spec {
            // Names are the group's, whichever pool a volume is in.
            TargetSpec::Lvm { volume_group, .. } => format!("lvm:{volume_group}/{name}"),
            TargetSpec::Directory { path } => {
                format!("dir:{}/{name}", canonical(path).display())
            }
            TargetSpec::Named(other) => format!("{other}/{name}"),
        }
    }
}

/// The path without links and dots, also where its end is not there yet.
fn canonical(path: &Path) -> PathBuf {
    for ancestor in path.ancestors() {
        if let (Ok(real), Ok(rest)) = (ancestor.canonicalize(), path.strip_prefix(ancestor)) {
            return if rest.as_os_str().is_empty() { real } else { real.join(rest) };
        }
    }
    path.to_owned()
}

impl Targets {
    /// These targets, by name.
    pub fn new(configured: BTreeMap<String, TargetSettings>, retry: LockRetry) -> Self {
        Self { configured, retry }
    }

    /// The target that a request names; the default one if it names none. Only an administrator may write one out,
    /// because that is to write anywhere on this machine.
    ///
    /// # Errors
    /// `target_not_found` with the known names, `invalid_target`, `not_permitted`.
    pub fn find(&self, text: Option<&str>, written_out_is_allowed: bool) -> Result<Target> {
        let text = text.unwrap_or(DEFAULT);
        let spec: TargetSpec = text.parse().map_err(|invalid| Error::invalid(ErrorCode::InvalidTarget, &invalid))?;
        let settings = match spec {
            TargetSpec::Named(name) => self.configured.get(&name).cloned().ok_or_else(|| self.not_found(&name))?,
            written_out => match self.configured.values().find(|known| known.spec == written_out) {
                // What is configured may be named either way.
                Some(known) => known.clone(),
                None if written_out_is_allowed => TargetSettings::from(written_out),
                None => return Err(not_configured(text)),
            },
        };
        self.target(&settings)
    }

    /// All configured targets.
    pub fn all(&self) -> Result<Vec<(String, Target)>> {
        self.configured.iter().map(|(name, settings)| Ok((name.clone(), self.target(settings)?))).collect()
    }

    /// The target of these settings, whatever is configured now.
    pub fn target(&self, settings: &TargetSettings) -> Result<Target> {
        let TargetSettings { spec, zero, format, linked } = settings.clone();
        Ok(Target { backend: backend(settings, &self.retry)?, spec, zero, format, linked })
    }

    fn not_found(&self, name: &str) -> Error {
        let known: Vec<&str> = self.configured.keys().map(String::as_str).collect();
        let error = Error::new(ErrorCode::TargetNotFound, format!("there is no target '{name}'"));
        if known.is_empty() {
            error.hint("set LVM_VOLUME_GROUP, or configure [targets.default]")
        } else {
            error.hint(format!("there are: {}", known.join(", ")))
        }
    }
}

fn not_configured(text: &str) -> Error {
    Error::new(
        ErrorCode::NotPermitted,
        format!("target '{text}' is not configured, and only this machine's administrator may write one out"),
    )
    .hint("configure it under [targets.NAME], or use the command line on the machine itself")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets() -> Targets {
        let configured = [("default", "lvm:vg0"), ("fast", "lvm:vg0/pool0")];
        let configured = configured
            .map(|(name, spec)| (name.to_owned(), TargetSettings::from(spec.parse::<TargetSpec>().unwrap())))
            .into();
        Targets::new(configured, LockRetry { attempts: 0, backoff: Vec::new() })
    }

    fn code(result: Result<Target>) -> ErrorCode {
        result.err().expect("an error").code()
    }

    #[test]
    fn a_target_is_found_by_name_or_written_out() {
        let targets = targets();
        assert_eq!(targets.find(None, false).unwrap().backend.label(), "lvm:vg0");
        assert_eq!(targets.find(Some("fast"), false).unwrap().backend.label(), "lvm:vg0/pool0");
        assert_eq!(targets.find(Some("lvm:vg0/pool0"), false).unwrap().backend.label(), "lvm:vg0/pool0");
        assert_eq!(targets.find(Some("dir:/srv"), true).unwrap().backend.label(), "dir:/srv");
        assert_eq!(code(targets.find(Some("dir:/etc"), false)), ErrorCode::NotPermitted);
        assert_eq!(code(targets.find(Some("slow"), true)), ErrorCode::TargetNotFound);
        assert_eq!(code(targets.find(Some("nfs:/x"), true)), ErrorCode::InvalidTarget);
    }

    #[test]
    fn one_volume_has_one_key_by_any_target() {
        let (targets, name) = (targets(), "web-1".parse().unwrap());
        let key = |target| targets.find(Some(target), true).unwrap().exclusive_key(&name);
        assert_eq!(key("default"), key("fast"));
        assert_eq!(key("dir:/tmp"), key("dir:/tmp/."));
        assert_ne!(key("dir:/tmp"), key("dir:/usr"));
        let directory = tempfile::tempdir().unwrap();
        let absent = format!("dir:{}/volumes/", directory.path().display());
        let before = key(&absent);
        std::fs::create_dir(directory.path().join("volumes")).unwrap();
        assert_eq!(key(absent.trim_end_matches('/')), before);
    }
}
