//! A program that has a file open, as qemu has the disks of its guest. It leaves out what it does with it: nothing.

use std::{
    fs::File,
    process::{Child, Command},
};

/// The program, which ends after a minute, or when dropped.
pub struct Holder(Child);

impl Holder {
    /// One that has this file open.
    ///
    /// # Panics
    /// The program cannot be started.
    pub fn of(file: File) -> Self {
        Self(Command::new("sleep").arg("60").stdin(file).spawn().expect("sleep is there"))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
