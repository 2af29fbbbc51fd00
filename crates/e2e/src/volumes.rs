//! The volumes of the test machine as LVM and the kernel see them: facts for scenarios to compare.
//!
//! Nothing here is lvp's view. It leaves out what they hold as an image: `World::expect_image`.

use anyhow::{Result, ensure};

use crate::bed::{VOLUME_GROUP, World};

/// What the names of bases begin with.
const BASE: &str = "lvp-base-";

impl World {
    /// The names of all volumes of the group, apart from thin pools and bases, sorted.
    ///
    /// # Errors
    /// LVM fails.
    pub fn volumes(&self) -> Result<Vec<String>> {
        Ok(self.all_volumes()?.into_iter().filter(|name| !name.starts_with(BASE)).collect())
    }

    /// The names of all bases in the group, sealed or not, sorted.
    ///
    /// # Errors
    /// LVM fails.
    pub fn bases(&self) -> Result<Vec<String>> {
        Ok(self.all_volumes()?.into_iter().filter(|name| name.starts_with(BASE)).collect())
    }

    fn all_volumes(&self) -> Result<Vec<String>> {
        let names = self.vm.run_ok(&format!(
            "lvs --noheadings --sort lv_name --options lv_name,lv_layout {VOLUME_GROUP} |
               awk '$2 !~ /pool/ {{ print $1 }}'"
        ))?;
        Ok(names.split_whitespace().map(str::to_owned).collect())
    }

    /// A field of a volume in `lvs`, such as `lv_uuid`.
    ///
    /// # Errors
    /// The volume is not there.
    pub fn fact(&self, volume: &str, field: &str) -> Result<String> {
        let options = format!("--noheadings --nosuffix --units b --options {field}");
        self.vm.run_ok(&format!("lvs {options} {VOLUME_GROUP}/{volume}"))
    }

    /// The tags of a volume.
    ///
    /// # Errors
    /// The volume is not there.
    pub fn tags(&self, volume: &str) -> Result<Vec<String>> {
        Ok(self.fact(volume, "lv_tags")?.split(',').map(str::to_owned).collect())
    }

    /// The digest of all bytes of a volume.
    ///
    /// # Errors
    /// The volume is not there.
    pub fn content(&self, volume: &str) -> Result<String> {
        self.vm.run_ok(&format!("sha256sum </dev/{VOLUME_GROUP}/{volume}"))
    }

    /// Makes a volume as somebody else would, with further options of `lvcreate` (`--size 80M`), and fills it with 0xAA.
    ///
    /// # Errors
    /// LVM refuses.
    pub fn make_volume(&self, volume: &str, options: &str) -> Result<()> {
        let device = format!("/dev/{VOLUME_GROUP}/{volume}");
        self.vm
            .run_ok(&format!(
                r"lvcreate --yes --name {volume} {options} {VOLUME_GROUP}
                  head --bytes=$(blockdev --getsize64 {device}) /dev/zero | tr '\0' '\252' |
                    dd of={device} bs=1M iflag=fullblock conv=fsync status=none
                  udevadm settle"
            ))
            .map(drop)
    }

    /// Lets the group's disk write so many bytes in a second at most, until [`World::unthrottle`]: a job can then be
    /// caught while it writes.
    ///
    /// # Errors
    /// The machine is off.
    pub fn throttle(&self, bytes: u64) -> Result<()> {
        let answer = self.vm.monitor(&format!("block_set_io_throttle data 0 0 {bytes} 0 0 0"))?;
        ensure!(answer.is_empty(), "the disk cannot be slowed down: {answer}");
        Ok(())
    }

    /// Lets the group's disk write as fast as it can.
    ///
    /// # Errors
    /// The machine is off.
    pub fn unthrottle(&self) -> Result<()> {
        self.throttle(0)
    }
}
