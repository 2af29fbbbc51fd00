//! How long tasks waited for I/O, as the kernel tells it: pressure stall information (Documentation/accounting/psi.rst).
//!
//! Only the line `some` is read: the time in which at least one task waited. It leaves out what follows from it: see
//! `courtesy`.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use lvp_api::ErrorCode;

use crate::error::{Error, Result};

/// The guests of this host: the slice of systemd in which libvirt puts each. It is there as long as there are any.
pub const OF_GUESTS: &str = "/sys/fs/cgroup/machine.slice/io.pressure";
/// The whole host; there is one where the kernel tells pressure at all.
const OF_HOST: &str = "/proc/pressure/io";
/// Where cgroups are.
const CGROUPS: &str = "/sys/fs/cgroup";
/// There is one in a hierarchy of cgroups that tells pressure (cgroup v2).
const UNIFIED: &str = "/sys/fs/cgroup/cgroup.controllers";

/// A file that tells the pressure of I/O.
#[derive(Debug, Clone)]
pub struct PressureFile {
    path: PathBuf,
}

impl PressureFile {
    /// This file, or the guests'.
    ///
    /// # Errors
    /// `invalid_configuration` when it never tells anything here.
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let file = Self { path: path.unwrap_or(Path::new(OF_GUESTS)).to_owned() };
        let missing = |what: &str, way_out: &str| {
            Err(Error::new(ErrorCode::InvalidConfiguration, format!("io_pressure_limit is set, but {what}"))
                .hint(way_out.to_owned()))
        };
        if fs::read_to_string(OF_HOST).is_err() {
            return missing("this kernel tells no pressure", "boot it with psi=1, or leave io_pressure_limit out");
        }
        match path {
            None if !Path::new(UNIFIED).exists() => missing(
                "guests have no cgroup of version 2 here, which would tell theirs",
                "set io_pressure_file to /proc/pressure/io, which counts lvp's own waits too, or leave io_pressure_limit out",
            ),
            // A group comes with its first task.
            Some(path) if !path.exists() && !path.starts_with(CGROUPS) => missing(
                &format!("there is no {}", path.display()),
                "set io_pressure_file to the io.pressure of a cgroup, or leave it out for the guests'",
            ),
            _ => file.waited().map(|_| file),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How long tasks have waited so far; nothing where there is no such group now, and so nobody who waits.
    ///
    /// # Errors
    /// `invalid_configuration` when that is no such file; `input_output`.
    pub fn waited(&self) -> Result<Option<Duration>> {
        match fs::read_to_string(&self.path) {
            Ok(text) => some_total(&text).map(Some).ok_or_else(|| {
                let message = format!("{} tells no pressure of I/O", self.path.display());
                Error::new(ErrorCode::InvalidConfiguration, message)
                    .hint("set io_pressure_file to the io.pressure of a cgroup, or to /proc/pressure/io")
            }),
            // A group that goes while its file is read says ENODEV.
            Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(Error::io("reading", &self.path, error)),
        }
    }
}

/// The sum of the line `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, which is in microseconds.
fn some_total(text: &str) -> Option<Duration> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let total = line.split_whitespace().find_map(|word| word.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_some_is_read() {
        let told =
            "some avg10=0.36 avg60=0.61 avg300=1.52 total=1269942148\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!(some_total(told), Some(Duration::from_micros(1_269_942_148)));
        for other in ["", "some", "some total=", "some avg10=0.00\n", "full avg10=0.00 total=7\n", "some total=-1\n"] {
            assert_eq!(some_total(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_group_that_is_not_there_waits_for_nothing_and_another_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("io.pressure");
        let file = PressureFile { path: path.clone() };
        assert_eq!(file.waited().unwrap(), None);
        fs::write(&path, "some avg10=0.00 avg60=0.00 avg300=0.00 total=12\n").unwrap();
        assert_eq!(file.waited().unwrap(), Some(Duration::from_micros(12)));
        fs::write(&path, "a file of somebody else\n").unwrap();
        assert_eq!(file.waited().unwrap_err().code(), ErrorCode::InvalidConfiguration);
    }
}
