//! Who uses a volume now: the kernel's view and libvirt's, as sentences; and who may own it though nobody uses it.
//!
//! ```text
//!  refuse_in_use        before a volume is removed, read or written
//!  refuse_unfinished    before a job removes what it made itself and nobody was told of
//!  refuse_overwriting   before one that was there is written: also a physical volume of LVM in it
//!  refuse_beside        while this job holds it: before the first byte, and before it says what it holds
//! ```
//! It leaves out holding a volume: `host::block::OpenTarget`.

use std::{
    fmt::{self, Display},
    fs::File,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use lvp_api::{ErrorCode, JobId, VolumeName};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    host::{
        block::{self, OpenTarget},
        libvirt::{AttachedDisk, Libvirt},
    },
    qcow2_file::backing_of,
    volume::{Volume, VolumeBackend},
};

/// No chain of files below one another is longer.
const LONGEST_CHAIN: usize = 200;
/// udev looks into a device for a moment whenever somebody closed it after writing. It is waited for so many times, so long.
const SETTLING: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Who uses a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// The kernel or LVM, in their words.
    Seen(String),
    /// An active domain, by its name.
    Active(String),
    /// A domain that is suspended to disk, by its name.
    Saved(String),
}

impl Display for User {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seen(said) => formatter.write_str(said),
            Self::Active(domain) => write!(formatter, "attached to the active domain {domain}"),
            Self::Saved(domain) => {
                write!(formatter, "attached to the domain {domain}, which is suspended to disk (managed save)")
            }
        }
    }
}

/// The volume of this name as it is once nobody has it open for a moment only. Blocks, up to two seconds where somebody
/// keeps it open.
pub fn find_settled(backend: &dyn VolumeBackend, name: &VolumeName) -> Result<Option<Volume>> {
    for _ in 0..SETTLING {
        match backend.find(name)? {
            Some(volume) if volume.open => thread::sleep(BETWEEN_LOOKS),
            settled => return Ok(settled),
        }
    }
    backend.find(name)
}

/// Why the volume must not be overwritten or removed now; empty when nothing uses it. Blocks.
///
/// A volume that is attached to a domain that is shut off is free: reprovisioning it is what the seed is for. One that is
/// suspended to disk is not shut off: it goes on where it was, with what it knows of its disk.
///
/// # Errors
/// `libvirt_unavailable`, because then nobody knows which domains hold it.
pub fn users(volume: &Volume, libvirt: Option<&Libvirt>) -> Result<Vec<User>> {
    // The device of a logical volume that is not active is not there, and nobody uses it.
    let seen = if volume.path.exists() { block::users_of(&volume.path)? } else { Vec::new() };
    let mut users: Vec<User> = seen.into_iter().map(User::Seen).collect();
    users.extend(domains(&volume.path, libvirt)?);
    if users.is_empty() && volume.open {
        users.push(User::Seen("open, says LVM".to_owned()));
    }
    Ok(users)
}

/// Refuses a volume that something uses.
pub fn refuse_in_use(volume: &Volume, libvirt: Option<&Libvirt>) -> Result<()> {
    let users = users(volume, libvirt)?;
    if users.is_empty() { Ok(()) } else { Err(in_use(volume, "is in use", &users)) }
}

/// Refuses to let a job remove what it made itself, where something uses that. Blocks.
///
/// As long as it is incomplete nobody was told of it, so a libvirt that does not answer does not keep it: of a domain that
/// runs, the kernel shows the process. At the host's start lvp may well be there before libvirt.
///
/// # Errors
/// As [`refuse_in_use`], for what is complete or another job's.
pub fn refuse_unfinished(volume: &Volume, job: JobId, libvirt: Option<&Libvirt>) -> Result<()> {
    match refuse_in_use(volume, libvirt) {
        Err(error)
            if error.code() == ErrorCode::LibvirtUnavailable
                && volume.tags.incomplete
                && volume.tags.job == Some(job) =>
        {
            tracing::warn!(volume = %volume.name, error = %error.chain(), "which domains use it is not known");
            refuse_in_use(volume, None)
        }
        refused => refused,
    }
}

/// Refuses a volume that must not be overwritten: something uses it, or it is a physical volume of LVM.
///
/// A volume group that is not active has no users, and is lost all the same. What lvp made, or wrote an image to, is let
/// through, and what this job has `begun` to write: the label came with the image or from its guest, whose disk it is, and
/// who asks for the volume asks for the end of that disk.
pub fn refuse_overwriting(volume: &Volume, begun: bool, libvirt: Option<&Libvirt>) -> Result<()> {
    refuse_in_use(volume, libvirt)?;
    refuse_physical_volume(volume, begun)
}

/// Refuses a device that somebody else made a physical volume of. One that is not active is not looked at.
pub fn refuse_physical_volume(volume: &Volume, begun: bool) -> Result<()> {
    let is_device = volume.path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
    if begun || !is_device || volume.tags.made_by_lvp || volume.tags.image.is_some() {
        return Ok(());
    }
    let Some(identifier) = block::physical_volume(&volume.path)? else { return Ok(()) };
    let path = volume.path.display();
    let message = format!("volume {} is a physical volume of LVM ({identifier})", volume.name);
    Err(Error::new(
        ErrorCode::VolumeInUse,
        format!("{message}: it may be part of another volume group, maybe a guest's"),
    )
    .hint(format!("if nobody needs what is in it: `pvremove {path}`, or `wipefs --all {path}`; then try again"))
    .retry(false)
    .detail("volume", volume.name.as_str())
    .detail("physical_volume", identifier))
}

/// Refuses a volume that somebody uses beside this job, which holds it. Blocks.
///
/// # Errors
/// `volume_in_use`; `libvirt_unavailable` as for [`users`].
pub fn refuse_beside(volume: &Volume, held: &OpenTarget, libvirt: Option<&Libvirt>) -> Result<()> {
    let mut users: Vec<User> = held.users()?.into_iter().map(User::Seen).collect();
    users.extend(domains(&volume.path, libvirt)?);
    if users.is_empty() { Ok(()) } else { Err(in_use(volume, "is in use", &users)) }
}

/// Refuses to say that a volume holds its image when somebody came to use it while it was written. Blocks.
///
/// A libvirt that does not answer does not undo the work: of a domain that runs, the kernel shows the process.
///
/// # Errors
/// `volume_in_use`.
pub fn refuse_late_users(volume: &Volume, held: &OpenTarget, libvirt: Option<&Libvirt>) -> Result<()> {
    let mut users: Vec<User> = held.users()?.into_iter().map(User::Seen).collect();
    match domains(&volume.path, libvirt) {
        Ok(domains) => users.extend(domains),
        Err(error) => {
            tracing::warn!(volume = %volume.name, error = %error.chain(), "which domains use it is not known");
        }
    }
    if users.is_empty() {
        return Ok(());
    }
    Err(in_use(volume, "came into use while it was written, and is not noted as holding the image", &users).hint(
        "who used it may have read an image that was half written: shut the domain down, unmount the volume or stop the \
         program, then try again",
    ))
}

fn in_use(volume: &Volume, how: &str, users: &[User]) -> Error {
    let said: Vec<String> = users.iter().map(User::to_string).collect();
    let saved = users.iter().find_map(|user| match user {
        User::Saved(domain) => Some(format!(
            "start the domain {domain} and shut it down, or give up what it had in memory with `virsh managedsave-remove \
             {domain}`; then try again"
        )),
        _ => None,
    });
    let hint = saved
        .unwrap_or_else(|| "shut the domain down, unmount the volume or stop the program, then try again".to_owned());
    Error::new(ErrorCode::VolumeInUse, format!("volume {} {how}: {}", volume.name, said.join("; ")))
        .hint(hint)
        .detail("volume", volume.name.as_str())
        .detail("users", said)
}

/// The active and saved domains that have this as a disk, or below one.
fn domains(path: &Path, libvirt: Option<&Libvirt>) -> Result<Vec<User>> {
    let Some(libvirt) = libvirt else { return Ok(Vec::new()) };
    let disks = libvirt.disks_in_use()?;
    let uses = |disk: &AttachedDisk| {
        is_same_file(&disk.path, path)
            || (disk.is_qcow2 && files_below(&disk.path).iter().any(|below| is_same_file(below, path)))
    };
    let user = |disk: AttachedDisk| if disk.is_saved { User::Saved(disk.domain) } else { User::Active(disk.domain) };
    let mut users: Vec<User> = disks.into_iter().filter(uses).map(user).collect();
    users.dedup();
    Ok(users)
}

/// What the headers of a chain of qcow2 files name, where libvirt does not say it. A name that is said to be raw leads no
/// further: what a guest wrote on a raw disk is not believed.
pub(super) fn files_below(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut above = top.to_owned();
    while found.len() < LONGEST_CHAIN
        && above.metadata().is_ok_and(|it| it.is_file() || it.file_type().is_block_device())
    {
        let Ok(Some(backing)) = File::open(&above).and_then(|file| backing_of(&file)) else { break };
        let names = file_names(&backing.path);
        let folder = above.parent().unwrap_or(Path::new("/")).to_owned();
        found.extend(names.iter().map(|name| folder.join(name)));
        match names.as_slice() {
            // Without a word about its format, qemu looks into it and finds out.
            [name] if backing.format.as_deref().is_none_or(|format| format == "qcow2") => above = folder.join(name),
            _ => break,
        }
    }
    found
}

/// The files in a name as qemu writes it: a path, one behind the name of a driver, or JSON.
fn file_names(name: &str) -> Vec<String> {
    fn collect(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(key, value)| match value.as_str() {
                Some(text) if key == "filename" || key.ends_with(".filename") => into.push(text.to_owned()),
                _ => collect(value, into),
            }),
            Value::Array(values) => values.iter().for_each(|value| collect(value, into)),
            _ => {}
        }
    }
    if let Some(json) = name.strip_prefix("json:") {
        let mut found = Vec::new();
        collect(&serde_json::from_str(json).unwrap_or_default(), &mut found);
        return found;
    }
    let path = ["file:", "host_device:"].iter().find_map(|driver| name.strip_prefix(driver));
    vec![path.unwrap_or(name).to_owned()]
}

/// Whether two paths are one file or one device, by whatever name.
pub(super) fn is_same_file(one: &Path, other: &Path) -> bool {
    match (one.metadata(), other.metadata()) {
        (Ok(one), Ok(other)) if one.file_type().is_block_device() && other.file_type().is_block_device() => {
            one.rdev() == other.rdev()
        }
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => one == other,
    }
}

#[cfg(test)]
mod tests;
