//! Examines a host for `lvp doctor`: tools, permissions, targets, libvirt, cache, object store, clock; each with its fix.
//!
//! It takes no lock and changes nothing, so it may run beside a daemon.

use std::{env, os::unix::fs::PermissionsExt, path::Path};

use lvp_api::{ByteSize, Check, HealthStatus, JobId, TargetSpec};

use crate::{
    db,
    error::Result,
    health::check,
    host::{confine, libvirt::Libvirt, pressure::PressureFile},
    image::probe_store,
    job,
    settings::{EngineSettings, LIBVIRT_URI, LibvirtSetting, POOL},
    task::blocking,
    volume::{Target, Targets, Volume},
};

/// Everything, in the order in which a host is set up.
pub async fn examine(settings: &EngineSettings, socket: &Path) -> Vec<Check> {
    let mut checks = vec![user(settings)];
    checks.extend(tools(settings));
    checks.push(confinement());
    checks.push(directory("state", &settings.state_directory, "LVP_STATE_DIR"));
    checks.push(database(settings).await);
    let libvirt = libvirt(settings).await;
    checks.push(cache(settings, libvirt.status == HealthStatus::Healthy).await);
    checks.push(libvirt);
    checks.extend(pressure(settings));
    let targets = Targets::new(settings.targets.clone(), settings.lock_retry.clone());
    match targets.all() {
        Ok(all) => {
            for (name, found) in all {
                checks.push(target(&name, found).await);
            }
        }
        Err(error) => checks.push(check("targets", Err(error))),
    }
    checks.extend(store(settings).await);
    checks.push(daemon(socket));
    checks
}

fn seen(name: &str, status: HealthStatus, message: impl Into<String>, hint: Option<&str>) -> Check {
    Check { name: name.to_owned(), status, message: message.into(), hint: hint.map(str::to_owned) }
}

fn uses_lvm(settings: &EngineSettings) -> bool {
    settings.targets.values().any(|target| matches!(target.spec, TargetSpec::Lvm { .. }))
}

fn user(settings: &EngineSettings) -> Check {
    if rustix::process::geteuid().is_root() {
        return seen("user", HealthStatus::Healthy, "root", None);
    }
    if uses_lvm(settings) {
        return seen(
            "user",
            HealthStatus::Unhealthy,
            "not root, and a target is LVM",
            Some("run lvp as root: LVM's commands need it"),
        );
    }
    seen("user", HealthStatus::Healthy, "not root, and no target needs it", None)
}

/// The programs that the targets need, with the packages that bring them.
fn tools(settings: &EngineSettings) -> Vec<Check> {
    if !uses_lvm(settings) {
        return Vec::new();
    }
    let found = |program: &&str| {
        let path = env::var_os("PATH").unwrap_or_default();
        !env::split_paths(&path).any(|folder| {
            folder.join(program).metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
        })
    };
    let missing: Vec<&str> = ["vgs", "lvs", "lvcreate", "lvchange", "lvremove"].into_iter().filter(found).collect();
    vec![if missing.is_empty() {
        seen("tools", HealthStatus::Healthy, "LVM's commands are there", None)
    } else {
        let hint = "apt install lvm2 (and look whether /usr/sbin is in PATH)";
        seen("tools", HealthStatus::Unhealthy, format!("missing: {}", missing.join(", ")), Some(hint))
    }]
}

/// Whether the guests' waits for their disks are told, where jobs shall heed them.
fn pressure(settings: &EngineSettings) -> Option<Check> {
    let courtesy = settings.courtesy.as_ref()?;
    let told = PressureFile::open(courtesy.file.as_deref()).and_then(|file| {
        let is_there = file.waited()?.is_some();
        let what = if is_there {
            "tells how long"
        } else {
            "is not there: no guests run, or not in this group; it tells how long"
        };
        Ok((HealthStatus::Healthy, format!("{} {what} guests wait for their disks", file.path().display())))
    });
    Some(check("io_pressure", told))
}

/// What holds the threads that decode images.
fn confinement() -> Check {
    match confine::available().missing() {
        None => {
            seen("confinement", HealthStatus::Healthy, "landlock and seccomp hold the threads that decode images", None)
        }
        Some(missing) => {
            let message = format!("this kernel has no {missing} for the threads that decode images");
            let hint = "use a kernel of 5.13 or newer with landlock in its `lsm=` list and with seccomp; \
                        until then, provision images that you trust only";
            seen("confinement", HealthStatus::Degraded, message, Some(hint))
        }
    }
}

fn directory(name: &str, path: &Path, variable: &str) -> Check {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let may_write = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).is_ok();
    if !may_write {
        let hint = format!("set {variable} to a directory that this user may write to, or run lvp as its owner");
        return seen(name, HealthStatus::Unhealthy, format!("{} is not writable", existing.display()), Some(&hint));
    }
    let free = rustix::fs::statvfs(existing).map(|facts| facts.f_bavail * facts.f_frsize).unwrap_or(0);
    if free < lvp_api::GIB {
        let hint = format!("free some space, or set {variable} to a larger file system");
        return seen(name, HealthStatus::Degraded, format!("{}: {} free", path.display(), ByteSize(free)), Some(&hint));
    }
    seen(name, HealthStatus::Healthy, format!("{}: writable, {} free", path.display(), ByteSize(free)), None)
}

/// The database of jobs, as it is.
async fn database(settings: &EngineSettings) -> Check {
    let path = settings.database();
    let shown = path.display().to_string();
    if !path.exists() {
        return seen("database", HealthStatus::Healthy, format!("{shown}: none yet"), None);
    }
    let examined = blocking(move || {
        let facts = db::examine(&path)?;
        // An older one is brought up to date at the start.
        let unreadable = if facts.version == db::VERSION { job::unreadable(&path)? } else { Vec::new() };
        Ok((facts, unreadable))
    });
    match examined.await {
        Ok((facts, unreadable)) if unreadable.is_empty() => {
            let words = format!("{shown}: in order, {} jobs, schema version {}", facts.jobs, facts.version);
            seen("database", HealthStatus::Healthy, words, None)
        }
        Ok((facts, unreadable)) => {
            let words = format!(
                "{shown}: of {} jobs {} cannot be read and are left as they are: {}",
                facts.jobs,
                unreadable.len(),
                unreadable.join(", ")
            );
            seen("database", HealthStatus::Degraded, words, Some(db::OUT_OF_UNREADABLE))
        }
        Err(error) => check("database", Err(error)),
    }
}

/// Where images will be cached: as configured, or in libvirt's pool where there is a libvirt.
async fn cache(settings: &EngineSettings, libvirt_answers: bool) -> Check {
    if let Some(path) = &settings.cache_directory {
        return directory("cache", path, "LVP_CACHE_DIR");
    }
    let below_state = settings.state_directory.join("images");
    if !libvirt_answers || settings.libvirt == LibvirtSetting::Off {
        return directory("cache", &below_state, "LVP_CACHE_DIR");
    }
    let uri = libvirt_uri(&settings.libvirt);
    match blocking(move || Libvirt::new(uri).pool(POOL)).await {
        Ok(Some((path, true))) => directory("cache", &path, "LVP_CACHE_DIR"),
        Ok(Some((path, false))) => {
            let message = format!("libvirt's pool '{POOL}' at {} is not started; lvp will start it", path.display());
            seen("cache", HealthStatus::Healthy, message, None)
        }
        Ok(None) => {
            seen("cache", HealthStatus::Healthy, format!("libvirt has no pool '{POOL}' yet; lvp will make it"), None)
        }
        // What has no pools, as a session without storage, has no place for one.
        Err(_) => directory("cache", &below_state, "LVP_CACHE_DIR"),
    }
}

fn libvirt_uri(setting: &LibvirtSetting) -> String {
    match setting {
        LibvirtSetting::Uri(uri) => uri.clone(),
        _ => LIBVIRT_URI.to_owned(),
    }
}

async fn libvirt(settings: &EngineSettings) -> Check {
    let (uri, required) = match &settings.libvirt {
        LibvirtSetting::Off => {
            return seen("libvirt", HealthStatus::Healthy, "turned off (LVP_LIBVIRT_URI=none)", None);
        }
        LibvirtSetting::Uri(uri) => (uri.clone(), true),
        LibvirtSetting::Automatic => ("qemu:///system".to_owned(), uses_lvm(settings)),
    };
    let answer = blocking(move || Libvirt::new(uri).version()).await;
    let mut check =
        check("libvirt", answer.map(|version| (HealthStatus::Healthy, format!("version {version} answers"))));
    if check.status == HealthStatus::Unhealthy && !required {
        check.status = HealthStatus::Healthy;
        check.message = "not there, and no target needs it".to_owned();
    }
    check
}

async fn target(name: &str, target: Target) -> Check {
    let (name, label) = (format!("target:{name}"), target.backend.label());
    let found: Result<_> = blocking(move || {
        let unsealed = target.backend.bases()?.map_or(Ok(Vec::new()), |bases| bases.unsealed())?;
        Ok((target.backend.space()?, target.backend.list()?, unsealed))
    })
    .await;
    match found {
        Err(error) => check(&name, Err(error)),
        Ok((space, volumes, unsealed)) => {
            let free = format!("{label}: {} of {} free", ByteSize(space.free), ByteSize(space.total));
            match without_base(&volumes) {
                None => match incomplete(&volumes, &unsealed) {
                    None => seen(&name, HealthStatus::Healthy, free, None),
                    Some(incomplete) => {
                        let hint = "a job works on it, or the daemon removes it once nobody uses it, of an unknown job after leftover_grace";
                        seen(&name, HealthStatus::Healthy, format!("{free}; incomplete: {incomplete}"), Some(hint))
                    }
                },
                Some(lost) => {
                    let hint = "bring the base back from a backup, with its extended attributes (cp -a); \
                                until then the volume cannot be read";
                    seen(&name, HealthStatus::Unhealthy, format!("{free}; {lost}"), Some(hint))
                }
            }
        }
    }
}

/// Which volumes are linked to what is not there.
fn without_base(volumes: &[Volume]) -> Option<String> {
    let lost: Vec<String> = volumes
        .iter()
        .filter_map(|volume| Some((&volume.name, volume.link.as_ref().filter(|link| link.base.is_none())?)))
        .map(|(volume, link)| format!("{volume} needs {}, which is not there or no complete base", link.name))
        .collect();
    (!lost.is_empty()).then(|| lost.join("; "))
}

/// Which volumes hold nothing that was promised, and whose bases are not finished.
fn incomplete(volumes: &[Volume], unsealed: &[JobId]) -> Option<String> {
    let names = volumes.iter().filter(|volume| volume.tags.incomplete).map(|volume| volume.name.to_string());
    let names: Vec<String> = names.chain(unsealed.iter().map(|job| format!("the base of job {job}"))).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

async fn store(settings: &EngineSettings) -> Vec<Check> {
    let probe = match probe_store(&settings.sources).await {
        Ok(Some(probe)) => probe,
        Ok(None) => {
            return vec![seen(
                "object store",
                HealthStatus::Healthy,
                "none is configured (MINIO_ENDPOINT); http(s) URLs work",
                None,
            )];
        }
        Err(error) => return vec![check("object store", Err(error))],
    };
    let keys = match probe.keys_accepted {
        None => seen(
            "object store",
            HealthStatus::Healthy,
            "answers; no keys are configured, so only public buckets work",
            None,
        ),
        Some(true) => seen("object store", HealthStatus::Healthy, "answers and takes the keys", None),
        Some(false) => {
            let hint = "check MINIO_ACCESS_KEY, MINIO_SECRET_KEY and MINIO_REGION";
            seen("object store", HealthStatus::Unhealthy, "answers, but refuses the keys", Some(hint))
        }
    };
    let clock = match probe.clock_skew {
        None => seen("clock", HealthStatus::Degraded, "not compared: the store does not say its time", None),
        Some(skew) if probe.clock_is_wrong() => {
            let message = format!("{} s apart from the object store's, which refuses signatures then", skew.as_secs());
            seen("clock", HealthStatus::Unhealthy, message, Some("set the clock: timedatectl set-ntp true"))
        }
        Some(skew) => {
            seen("clock", HealthStatus::Healthy, format!("{} s apart from the object store's", skew.as_secs()), None)
        }
    };
    vec![keys, clock]
}

fn daemon(socket: &Path) -> Check {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return seen("daemon", HealthStatus::Healthy, format!("answers at {}", socket.display()), None);
    }
    let message = format!("none answers at {}; commands do their work themselves", socket.display());
    seen("daemon", HealthStatus::Healthy, message, None)
}
