//! Storage that fails under a running job: devices by device-mapper, and file systems that become full.
//!
//! A volume group `faulty` stands on a device `under`, whose table a scenario changes in the middle of a job, which waits at
//! a point for that. It leaves out LVM itself (`fault_lvm`), and what is refused before a job begins (`refusal`).

use anyhow::{Result, ensure};
use e2e::{
    bed::{World, set},
    product::Product,
};
use serde_json::Value;
use xtask::process::until;

use crate::{
    JOB, Scenario,
    waiting::{WAIT, go_on, go_to_the_next, waiting_at, waiting_in, waiting_twice},
};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("a_write_error_in_the_middle_leaves_nothing", a_write_error_in_the_middle_leaves_nothing),
    ("a_write_error_on_the_last_block_leaves_nothing", a_write_error_on_the_last_block_leaves_nothing),
    ("an_error_of_the_last_flush_leaves_nothing", an_error_of_the_last_flush_leaves_nothing),
    ("a_volume_is_flushed_before_it_says_what_it_holds", a_volume_is_flushed_before_it_says_what_it_holds),
    ("a_device_that_vanishes_ends_the_job_and_not_the_daemon", a_device_that_vanishes_ends_the_job),
    ("a_slow_device_only_takes_its_time", a_slow_device_only_takes_its_time),
    ("a_read_error_in_the_cache_is_told_and_leaves_nothing", a_read_error_in_the_cache_is_told),
    ("a_cache_that_others_fill_is_told_and_leaves_nothing", a_cache_that_others_fill_is_told),
    ("a_cache_that_others_fill_at_any_stage_leaves_nothing", a_cache_that_others_fill_at_any_stage),
    ("a_file_system_that_others_fill_ends_the_job", a_file_system_that_others_fill_ends_the_job),
    ("a_cache_that_becomes_read_only_is_told", a_cache_that_becomes_read_only_is_told),
];

/// The sectors of the device under the volume group `faulty`: 200 MiB.
const SECTORS: u64 = 200 * 2048;
/// Makes that volume group; its device is a stretch of a volume of `vg0`.
const MAKE: &str = "lvcreate --quiet --yes --size 200M --name under vg0 >/dev/null
    dmsetup create under --table '0 409600 linear /dev/vg0/under 0'
    pvcreate --quiet /dev/mapper/under >/dev/null; vgcreate --quiet faulty /dev/mapper/under >/dev/null; udevadm settle";
/// Takes it away, whatever its state is. The volumes of a group whose device failed are let go by device-mapper.
const UNMAKE: &str = "set +e; exec >/tmp/unmake.log 2>&1
    dmsetup suspend --noflush --nolockfs under; dmsetup reload under --table '0 409600 linear /dev/vg0/under 0'; dmsetup resume under
    vgremove --force --yes faulty; dmsetup ls | awk '/^faulty-/ { print $1 }' | xargs --no-run-if-empty -n1 dmsetup remove --force
    dmsetup remove --retry --force under; pvscan --cache; lvremove --force --yes vg0/under; true";

/// The volume group `faulty`, until dropped.
struct Faulty<'world> {
    world: &'world World,
}

impl<'world> Faulty<'world> {
    fn make(world: &'world World) -> Result<Self> {
        world.vm.run_ok(MAKE)?;
        Ok(Self { world })
    }

    /// Gives the device under the group this table.
    fn table(&self, table: &str) -> Result<()> {
        let load = "dmsetup suspend --noflush --nolockfs under; dmsetup load under; dmsetup resume under";
        self.world.vm.run_ok(&format!("printf '%b' '{table}' | {{ {load}; }}")).map(drop)
    }

    /// Makes the sectors from `from` on give errors, `count` of them.
    fn break_sectors(&self, from: u64, count: u64) -> Result<()> {
        let rest = from + count;
        let mut table = format!("0 {from} linear /dev/vg0/under 0\\n{from} {count} error\\n");
        if rest < SECTORS {
            table.push_str(&format!("{rest} {} linear /dev/vg0/under {rest}\\n", SECTORS - rest));
        }
        self.table(&table)
    }

    /// The first sector of the volume `web` on the device, and how many it has.
    fn place_of_web(&self) -> Result<(u64, u64)> {
        let printed = self.world.vm.run_ok(
            "pe=$(pvs --noheadings --nosuffix --units s -o pe_start /dev/mapper/under | tr -d ' ')
             dmsetup table faulty-web | awk '{ print $5, $2 }'; : $pe",
        )?;
        let mut numbers = printed.split_whitespace().map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(from), Some(count)) => Ok((from?, count?)),
            _ => anyhow::bail!("no place: {printed}"),
        }
    }
}

impl Drop for Faulty<'_> {
    fn drop(&mut self) {
        let _ = self.world.vm.run(UNMAKE);
    }
}

/// That a job failed with this code and a sentence with `word`, and left no volume in the group.
fn expect_failed(world: &World, group: &str, job: &Value, code: &str, word: &str) -> Result<()> {
    ensure!(job["status"] == "failed" && job["error_code"] == code, "not failed with {code}: {job:#}");
    ensure!(job["retryable"] == true, "{job:#}");
    ensure!(job["error"].as_str().is_some_and(|words| words.contains(word)), "no {word}: {job:#}");
    ensure!(job["details"].get("not_undone").is_none(), "{job:#}");
    let left = world.vm.run_ok(&format!("lvs --noheadings -o lv_name {group} | grep -c '^ *web$' || true"))?;
    ensure!(left == "0", "the volume is left: {job:#}");
    Ok(())
}

/// That a new start of the daemon finds what is left in the group `faulty` and takes it back.
fn expect_swept(world: &World, daemon: &Product<'_>) -> Result<()> {
    daemon.process.kill_9()?;
    daemon.start_again()?;
    let gone = || world.vm.run_ok("lvs --noheadings -o lv_name faulty").is_ok_and(|left| left.is_empty()).then_some(());
    ensure!(until(JOB, gone).is_some(), "left: {}\n{}", world.vm.run_ok("lvs -o+tags faulty")?, daemon.process.log()?);
    Ok(())
}

fn a_write_error_in_the_middle_leaves_nothing(world: &World) -> Result<()> {
    let faulty = Faulty::make(world)?;
    let (daemon, id) = waiting_at(world, "middle", "faulty", "ensure_volume.end")?;
    let (from, count) = faulty.place_of_web()?;
    faulty.break_sectors(from + count / 4, count / 2)?;
    let job = go_on(world, &daemon, &id)?;
    expect_failed(world, "faulty", &job, "input_output", "web")?;
    // Once the device is in order again, so is the next job.
    faulty.table("0 409600 linear /dev/vg0/under 0\\n")?;
    daemon.completed(&world.publish(&world.small)?.onto("web", "80M"))?;
    world.expect_image("/dev/faulty/web", &world.small)
}

fn a_write_error_on_the_last_block_leaves_nothing(world: &World) -> Result<()> {
    let faulty = Faulty::make(world)?;
    let (daemon, id) = waiting_at(world, "last", "faulty", "ensure_volume.end")?;
    let (from, count) = faulty.place_of_web()?;
    faulty.break_sectors(from + count - 8, 8)?;
    let job = go_on(world, &daemon, &id)?;
    expect_failed(world, "faulty", &job, "input_output", "web")
}

fn an_error_of_the_last_flush_leaves_nothing(world: &World) -> Result<()> {
    let faulty = Faulty::make(world)?;
    let (daemon, id) = waiting_at(world, "flush", "faulty", "finish_volume.begin")?;
    // Reads go on, so that LVM finds its group; writes and flushes fail from now on.
    faulty.table("0 409600 flakey /dev/vg0/under 0 0 3600 1 error_writes\\n")?;
    world.vm.run_ok(&format!("rm {WAIT}"))?;
    // The volume cannot be removed while LVM cannot write either: the device is mended before the job takes it back.
    let failed = until(JOB, || daemon.process.log().is_ok_and(|log| log.contains("could not be undone")).then_some(()));
    faulty.table("0 409600 linear /dev/vg0/under 0\\n")?;
    let job = daemon.job_ended(&id, JOB)?;
    ensure!(job["status"] == "failed" && job["retryable"] == true, "{job:#}");
    ensure!(job["error"].as_str().is_some_and(|words| words.contains("flushing /dev/faulty/web")), "{job:#}");
    ensure!(failed.is_none() || job["details"]["not_undone"].to_string().contains("ensure_volume"), "{job:#}");
    // What could not be taken back is taken back at the next start.
    expect_swept(world, &daemon)
}

/// The test machine's disks keep what was not flushed, as they are files of the host: so a power cut alone shows nothing of it.
fn a_volume_is_flushed_before_it_says_what_it_holds(world: &World) -> Result<()> {
    // The flushes that the disk of the group has done (Documentation/block/stat.rst).
    let flushes = || -> Result<u64> { Ok(world.vm.run_ok("awk '{ print $16 }' /sys/block/vdb/stat")?.parse()?) };
    let (daemon, id) = waiting_twice(world, "flushed", "finish_volume.begin", "volume.synced")?;
    let before = flushes()?;
    go_to_the_next(world, &daemon, &id, "volume.synced")?;
    ensure!(flushes()? > before, "{before} flushes before and after");
    ensure!(!world.tags("web")?.iter().any(|tag| tag.starts_with("lvp.image=")), "{:?}", world.tags("web")?);
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "completed", "{job:#}");
    world.expect_image("/dev/vg0/web", &world.small)
}

fn a_device_that_vanishes_ends_the_job(world: &World) -> Result<()> {
    let faulty = Faulty::make(world)?;
    let (daemon, id) = waiting_at(world, "gone", "faulty", "ensure_volume.end")?;
    faulty.table("0 409600 error\\n")?;
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "failed" && job["retryable"] == true, "{job:#}");
    ensure!(job["details"]["not_undone"].to_string().contains("ensure_volume"), "what is left is said: {job:#}");
    // When it comes back, a start of the daemon finds what was left and takes it back.
    faulty.table("0 409600 linear /dev/vg0/under 0\\n")?;
    world.vm.run_ok("vgck faulty || true")?;
    expect_swept(world, &daemon)
}

fn a_slow_device_only_takes_its_time(world: &World) -> Result<()> {
    let faulty = Faulty::make(world)?;
    let (daemon, id) = waiting_at(world, "slow", "faulty", "ensure_volume.end")?;
    // Each read and write takes a fifth of a second longer.
    faulty.table("0 409600 delay /dev/vg0/under 0 200\\n")?;
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "completed", "{job:#}");
    faulty.table("0 409600 linear /dev/vg0/under 0\\n")?;
    world.expect_image("/dev/faulty/web", &world.small)
}

/// A file system of its own for the cache, of 64 MiB, on a device `cache` over the volume of that name; until dropped.
struct SmallCache<'world> {
    world: &'world World,
}

impl<'world> SmallCache<'world> {
    fn make(world: &'world World) -> Result<Self> {
        world.vm.run_ok(
            "lvcreate --quiet --yes --size 64M --name cache vg0 >/dev/null; mkdir -p /srv/cache
             dmsetup create cache --table '0 131072 linear /dev/vg0/cache 0'
             mkfs.ext4 -q -O ^has_journal /dev/mapper/cache; mount /dev/mapper/cache /srv/cache",
        )?;
        Ok(Self { world })
    }

    fn environment(&self, name: &str) -> Vec<(String, String)> {
        let mut environment = self.world.environment(name);
        set(&mut environment, "LVP_CACHE_DIR", Some("/srv/cache"));
        environment
    }
}

impl Drop for SmallCache<'_> {
    fn drop(&mut self) {
        let unmake = "set +e; exec >/tmp/unmake.log 2>&1; umount --lazy /srv/cache; umount --lazy /srv/cache
            dmsetup remove --retry --force cache; lvremove --force --yes vg0/cache; true";
        let _ = self.world.vm.run(unmake);
    }
}

fn a_read_error_in_the_cache_is_told(world: &World) -> Result<()> {
    let cache = SmallCache::make(world)?;
    let daemon = world.serve_in("unreadable", &cache.environment("unreadable"))?;
    let published = world.publish(&world.small)?;
    daemon.completed(&published.onto("web-1", "64M"))?;
    // A block in the middle of the cached file, as its file system has placed it, in units of 1 KiB.
    let break_it = "file=$(ls /srv/cache/*.qcow2); sync; echo 3 >/proc/sys/vm/drop_caches
        block=$(filefrag -b1024 -v $file | awk '$1 == \"0:\" { split($4, at, /\\./); print at[1] + 1024 }')
        at=$((block * 2)); rest=$((at + 8))
        dmsetup suspend --noflush --nolockfs cache
        printf '%b' \"0 $at linear /dev/vg0/cache 0\\\\n$at 8 error\\\\n$rest $((131072 - rest)) linear /dev/vg0/cache $rest\\\\n\" |
            dmsetup load cache
        dmsetup resume cache; ! cat $file >/dev/null 2>&1";
    world.vm.run_ok(break_it)?;
    let mut request = published.onto("web-2", "64M");
    request["checksum"] = format!("sha256:{}", world.small.sha256).into();
    let job = daemon.job_ended(&daemon.provision(&request)?, JOB)?;
    match job["status"].as_str() {
        // The damaged file was put aside and the image fetched anew.
        Some("completed") => world.expect_image("/dev/vg0/web-2", &world.small),
        _ => {
            ensure!(job["error"].as_str().is_some_and(|words| words.contains("/srv/cache/")), "{job:#}");
            ensure!(job["error_code"] == "input_output" && world.volumes()? == ["cache", "web-1"], "{job:#}");
            Ok(())
        }
    }
}

/// Takes what is free on the file system of the cache.
const FILL: &str = "dd if=/dev/zero of=/srv/cache/others bs=1M status=none 2>/dev/null || true
    dd if=/dev/zero of=/srv/cache/rest bs=1k status=none 2>/dev/null || true; sync";

/// Fills it while a job waits at this point, and gives the job as it ended; nothing of it may be left but what it says.
fn filled_at(world: &World, point: &str, request: &Value) -> Result<Value> {
    let cache = SmallCache::make(world)?;
    let (daemon, id) = waiting_in(world, "cache-full", &cache.environment("cache-full"), point, request)?;
    world.vm.run_ok(FILL)?;
    let job = go_on(world, &daemon, &id)?;
    daemon.process.stop()?;
    let left = world.vm.run_ok("cd /srv/cache; find . -type f ! -name lock ! -name others ! -name rest")?;
    let (images, rest): (Vec<&str>, Vec<&str>) = left.lines().partition(|file| file.ends_with(".qcow2"));
    let is_cached = images.len() == 1;
    ensure!(
        images.len() <= 1 && rest.iter().all(|file| is_cached && !file.contains("partial")),
        "at {point}, left: {left}"
    );
    Ok(job)
}

fn a_cache_that_others_fill_is_told(world: &World) -> Result<()> {
    let job = filled_at(world, "download.received", &world.publish(&world.large)?.onto("web", "96M"))?;
    ensure!(job["status"] == "failed" && job["error_code"] == "cache_full" && job["retryable"] == true, "{job:#}");
    ensure!(world.volumes()?.is_empty(), "{:?}", world.volumes()?);
    Ok(())
}

fn a_cache_that_others_fill_at_any_stage(world: &World) -> Result<()> {
    let request = world.publish(&world.small)?.onto("web", "80M");
    for point in ["ensure_volume.begin", "download.verified", "cache.remembered", "cache.published", "populate.written"]
    {
        let job = filled_at(world, point, &request)?;
        eprintln!("{point}: {} {}", job["status"], job["error_code"]);
        match job["status"].as_str() {
            Some("completed") => world.expect_image("/dev/vg0/web", &world.small)?,
            _ => ensure!(job["error_code"] == "cache_full" && world.volumes()?.is_empty(), "at {point}: {job:#}"),
        }
        world.vm.run_ok("lvremove --quiet --yes vg0/web >/dev/null 2>&1 || true; rm -r /var/lib/lvp-cache-full")?;
    }
    Ok(())
}

/// A directory of qcow2 volumes on a file system of its own, and where it is described.
const FILES: &str = "lvcreate --quiet --yes --size 200M --name files vg0 >/dev/null; mkdir -p /srv/files
    mkfs.ext4 -q -O ^has_journal /dev/vg0/files; mount /dev/vg0/files /srv/files; mkdir /srv/files/volumes
    printf '[targets.files]\nkind = \"dir\"\npath = \"/srv/files/volumes\"\nformat = \"qcow2\"\n' >/var/lib/lvp-files.toml";

fn a_file_system_that_others_fill_ends_the_job(world: &World) -> Result<()> {
    world.vm.run_ok(FILES)?;
    let mut environment = world.environment("files");
    set(&mut environment, "LVP_CONFIG", Some("/var/lib/lvp-files.toml"));
    let mut request = world.publish(&world.large)?.onto("web", "96M");
    request["target"] = "files".into();
    let waits = waiting_in(world, "files", &environment, "populate.written", &request);
    let outcome = waits.and_then(|(daemon, id)| {
        world.vm.run_ok(&FILL.replace("/srv/cache", "/srv/files"))?;
        let job = go_on(world, &daemon, &id)?;
        ensure!(job["status"] == "failed" && job["error_code"] == "insufficient_space", "{job:#}");
        ensure!(job["retryable"] == true, "{job:#}");
        let left = world.vm.run_ok("find /srv/files/volumes -type f")?;
        ensure!(left.is_empty() && job["details"].get("not_undone").is_none(), "left: {left}: {job:#}");
        Ok(())
    });
    world.vm.run_ok("umount --lazy /srv/files; lvremove --quiet --yes vg0/files >/dev/null")?;
    outcome
}

fn a_cache_that_becomes_read_only_is_told(world: &World) -> Result<()> {
    let cache = SmallCache::make(world)?;
    let request = world.publish(&world.small)?.onto("web", "64M");
    let daemon = world.serve_in("cache-ro", &cache.environment("cache-ro"))?;
    // What is open stays so; nothing can be made or changed from now on.
    world.vm.run_ok("mount --bind /srv/cache /srv/cache; mount -o remount,bind,ro /srv/cache")?;
    let job = daemon.job_ended(&daemon.provision(&request)?, JOB)?;
    ensure!(
        job["status"] == "failed" && job["error"].as_str().is_some_and(|words| words.contains("/srv/cache")),
        "{job:#}"
    );
    ensure!(world.volumes()? == ["cache"], "{:?}", world.volumes()?);
    let health = daemon.get("/health")?;
    ensure!(health.body.contains("/srv/cache") && health.status == 503, "{} {}", health.status, health.body);
    Ok(())
}
