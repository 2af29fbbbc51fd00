//! The world of the end-to-end scenarios: the test machine, MinIO, and the built binary in the machine.
//!
//! It leaves out driving the daemon (`product`) and what a scenario asserts about lvp.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::{fixture::Fixture, minio::Minio, product::Product, vm::Vm};

/// The bucket that is there from the start.
pub const BUCKET: &str = "images";
/// The volume group of the test machine.
pub const VOLUME_GROUP: &str = "vg0";
/// The thin pool in it.
pub const THIN_POOL: &str = "pool0";
/// Where the binary is in the test machine: in its PATH.
pub const BINARY: &str = "/usr/local/bin/lvp";

/// Where the binary with the points of faults is in the test machine, once it was asked for.
pub const FAULTY_BINARY: &str = "/usr/local/bin/lvp-faulty";

/// What writing an image out, or comparing a volume with it, may take in the emulated machine.
const COMPARE: Duration = Duration::from_secs(600);
/// Takes away what a scenario left, and prints what could not be taken away.
const RESET: &str = r#"set +e
exec 3>&1 >/tmp/reset.log 2>&1
volumes() { lvs --noheadings --options lv_full_name vg0 | awk '$1 != "vg0/pool0" { print $1 }'; }
found() { virsh --quiet 'list --all --name; pool-list --all --name' | grep .; volumes; }
systemctl kill --kill-whom=all --signal=KILL 'test-*.service'
systemctl stop 'test-*.service'
left=$(found)
if [ -n "$left" ]; then
    for domain in $(virsh list --all --name); do virsh destroy $domain; virsh undefine --nvram --managed-save $domain; done
    for pool in $(virsh pool-list --all --name); do virsh pool-destroy $pool; virsh pool-undefine $pool; done
    awk '$1 ~ "^/dev/(mapper/)?vg0" { print $2 }' /proc/mounts | xargs --no-run-if-empty umount
    volumes | xargs --no-run-if-empty lvremove --force --yes
    left=$(found)
fi
rm -rf /var/lib/lvp-* /var/lib/libvirt-volume-provisioner /var/lib/libvirt/images/{*,.lvp} /var/log/bed/*
echo $left >&3"#;

/// All that a scenario works with.
pub struct World {
    /// The test machine.
    pub vm: Vm,
    /// The object store.
    pub minio: Minio,
    /// The binary on the host.
    pub binary: PathBuf,
    /// An image that is written in a moment: a disk of 64 MiB with holes.
    pub small: Fixture,
    /// An image that takes a while: a disk of 96 MiB, almost full.
    pub large: Fixture,
}

/// An image in the object store.
#[derive(Debug, Clone)]
pub struct Published {
    /// Its URL as the test machine reaches it: `http://…/images/NAME`.
    pub url: String,
    /// The same as `s3://images/NAME`.
    pub s3_url: String,
}

impl Published {
    /// The request to write it to this volume, of a size such as `80M`.
    pub fn onto(&self, volume: &str, size: &str) -> Value {
        json!({"image_url": self.url, "volume_name": volume, "size": size})
    }
}

impl World {
    /// Boots a machine, starts MinIO, and copies the binary in.
    ///
    /// # Errors
    /// The binary is not built, or a part does not come up.
    pub fn start() -> Result<Self> {
        let binary = binary();
        ensure!(binary.is_file(), "there is no {}; `make build` makes it", binary.display());
        let minio = Minio::start()?;
        minio.make_bucket(BUCKET)?;
        let vm = Vm::boot()?;
        vm.copy_in(&binary, BINARY)?;
        vm.run_ok(&format!("chmod 755 {BINARY}"))?;
        let (small, large) = (Fixture::qcow2("small", 64, 8)?, Fixture::qcow2("large", 96, 84)?);
        Ok(Self { vm, minio, binary, small, large })
    }

    /// Puts an image and its `.sha256` (as `sha256sum` prints it) into the bucket.
    ///
    /// # Errors
    /// MinIO refuses.
    pub fn publish(&self, image: &Fixture) -> Result<Published> {
        let Fixture { name, sha256, .. } = image;
        self.minio.put(BUCKET, name, &image.path)?;
        self.minio.put_bytes(BUCKET, &format!("{name}.sha256"), format!("{sha256}  {name}\n").as_bytes())?;
        let url = format!("{}/{BUCKET}/{name}", self.minio.endpoint_in_vm());
        Ok(Published { url, s3_url: format!("s3://{BUCKET}/{name}") })
    }

    /// Checks every byte of a volume: first the image, as `qemu-img convert` in the machine writes it out, and then
    /// zeroes to the volume's end.
    ///
    /// # Errors
    /// A byte differs (the error names the first), or the volume is not there.
    pub fn expect_image(&self, device: &str, image: &Fixture) -> Result<()> {
        self.expect_content(device, image)?;
        let tail = format!(
            "volume=$(blockdev --getsize64 {device} 2>/dev/null || stat --dereference --format=%s {device})
             cmp --bytes=$((volume - {size})) --ignore-initial={size}:0 {device} /dev/zero",
            size = image.virtual_size
        );
        self.vm.run_ok_within(COMPARE, &tail).map(drop)
    }

    /// As [`World::expect_image`], without what follows the image: for a volume too large to be read.
    ///
    /// # Errors
    /// As [`World::expect_image`].
    pub fn expect_content(&self, device: &str, image: &Fixture) -> Result<()> {
        let (size, format) = (image.virtual_size, &image.format);
        let expected = format!("/var/lib/bed/{}", image.sha256);
        if self.vm.run(&format!("test -e {expected}"))?.code != 0 {
            let (copy, raw) = (format!("{expected}.copy"), format!("{expected}.raw"));
            self.vm.copy_in(&image.path, &copy)?;
            // On the disk before it has its name: a scenario may cut the power at any moment.
            let convert =
                format!("qemu-img convert -f {format} -O raw {copy} {raw}; rm {copy}; sync {raw}; mv {raw} {expected}");
            self.vm.run_ok_within(COMPARE, &convert)?;
        }
        self.vm.run_ok_within(COMPARE, &format!("cmp --print-bytes --bytes={size} {expected} {device}")).map(drop)
    }

    /// The environment of a daemon that works with MinIO and the volume group, with state and cache of its own under
    /// `/var/lib/lvp-NAME`. Change what a scenario needs changed with [`set`].
    pub fn environment(&self, name: &str) -> Vec<(String, String)> {
        let state = format!("/var/lib/lvp-{name}");
        let settings = [
            ("MINIO_ENDPOINT", self.minio.endpoint_in_vm()),
            ("MINIO_ACCESS_KEY", self.minio.access_key().to_owned()),
            ("MINIO_SECRET_KEY", self.minio.secret_key().to_owned()),
            ("LVM_VOLUME_GROUP", VOLUME_GROUP.to_owned()),
            ("LVP_CACHE_DIR", format!("{state}/cache")),
            ("LVP_STATE_DIR", state),
            ("PORT", "8080".to_owned()),
        ];
        settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Starts the daemon with [`World::environment`] and waits until it answers.
    ///
    /// # Errors
    /// It does not come up; the error quotes its log.
    pub fn serve(&self, name: &str) -> Result<Product<'_>> {
        self.serve_in(name, &self.environment(name))
    }

    /// As [`World::serve`], in an environment that a scenario changed.
    ///
    /// # Errors
    /// As [`World::serve`].
    pub fn serve_in(&self, name: &str, environment: &[(String, String)]) -> Result<Product<'_>> {
        Product::start(&self.vm, name, environment)
    }

    /// As [`World::serve_in`], by the binary with points that meet these faults (`fault.rs` of lvp's engine says how they
    /// are written).
    ///
    /// # Errors
    /// As [`World::serve`]; or that binary is not built.
    pub fn serve_faulty(&self, name: &str, environment: &[(String, String)], faults: &str) -> Result<Product<'_>> {
        let binary = self.faulty_binary()?;
        let faults = ("FAILPOINTS".to_owned(), faults.to_owned());
        Product::start_program(&self.vm, name, &[environment, &[faults]].concat(), binary)
    }

    /// The binary with the points of faults in the machine; it is copied there when it is first asked for.
    ///
    /// # Errors
    /// It is not built.
    pub fn faulty_binary(&self) -> Result<&'static str> {
        let built = faulty_binary();
        ensure!(built.is_file(), "there is no {}; scripts/e2e makes it", built.display());
        if self.vm.run(&format!("test -e {FAULTY_BINARY}"))?.code != 0 {
            self.vm.copy_in(&built, FAULTY_BINARY)?;
            self.vm.run_ok(&format!("chmod 755 {FAULTY_BINARY}"))?;
        }
        Ok(FAULTY_BINARY)
    }

    /// The files in the cache of the daemon NAME, and what else is kept there, but for the lock.
    ///
    /// # Errors
    /// There is no cache.
    pub fn cached(&self, name: &str) -> Result<Vec<String>> {
        let found = self.vm.run_ok(&format!("find /var/lib/lvp-{name}/cache -type f ! -name lock -printf '%P\\n'"))?;
        Ok(found.lines().map(str::to_owned).collect())
    }

    /// Defines a domain without an operating system that has this block device as its disk, and starts it paused.
    ///
    /// # Errors
    /// libvirt refuses.
    pub fn paused_domain(&self, name: &str, device: &str) -> Result<()> {
        self.start_paused(name, &format!("<source dev='{device}'/>"), "block", "raw")
    }

    /// As [`World::paused_domain`], with a file of this format as its disk.
    ///
    /// # Errors
    /// As [`World::paused_domain`].
    pub fn paused_domain_on(&self, name: &str, file: &str, format: &str) -> Result<()> {
        self.start_paused(name, &format!("<source file='{file}'/>"), "file", format)
    }

    fn start_paused(&self, name: &str, source: &str, kind: &str, format: &str) -> Result<()> {
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
             <os><type arch='x86_64' machine='q35'>hvm</type></os><devices>
             <disk type='{kind}' device='disk'><driver name='qemu' type='{format}'/>{source}
             <target dev='vda' bus='virtio'/></disk></devices></domain>"
        );
        let path = format!("/var/lib/bed/{name}.xml");
        self.vm.write(&path, xml.as_bytes())?;
        self.vm.run_ok(&format!("virsh define {path}; virsh start --paused {name}")).map(drop)
    }

    /// Makes the machine as it was: on, no domain, no storage pool, no spawned program, no volume but the thin pool,
    /// no state of a daemon.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn reset(&self) -> Result<()> {
        if !self.vm.is_on() {
            self.vm.boot_again()?;
        }
        if !self.minio.is_running() {
            self.minio.restart()?;
        }
        self.unthrottle()?;
        let left = self.vm.run_ok(RESET)?;
        ensure!(left.is_empty(), "left in the test machine: {left}\n{}", self.vm.run_ok("cat /tmp/reset.log")?);
        Ok(())
    }
}

/// Sets a variable of an environment, or takes it out.
pub fn set(environment: &mut Vec<(String, String)>, name: &str, value: Option<&str>) {
    environment.retain(|(other, _)| other != name);
    environment.extend(value.map(|value| (name.to_owned(), value.to_owned())));
}

/// The directory that cargo builds into.
pub fn target_directory() -> PathBuf {
    let workspace = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    // A relative one is relative to where cargo was called, which is the workspace.
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), |target| workspace.join(target))
}

/// The binary under test: `TEST_BED_BINARY`, or what `make build` leaves.
fn binary() -> PathBuf {
    std::env::var_os("TEST_BED_BINARY").map_or_else(|| target_directory().join("release/lvp"), PathBuf::from)
}

/// The binary with the points of faults on the host: `TEST_BED_FAULTY_BINARY`, or what `scripts/e2e` leaves.
pub fn faulty_binary() -> PathBuf {
    let built = || target_directory().join("faults/lvp");
    std::env::var_os("TEST_BED_FAULTY_BINARY").map_or_else(built, PathBuf::from)
}
