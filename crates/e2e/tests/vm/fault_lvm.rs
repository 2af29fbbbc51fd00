//! LVM under a running job: pools and groups that others fill, commands that wait, hang or answer in another form, devices
//! that come late, a second daemon. It leaves out devices that fail (`fault_storage`).

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::bed::{BINARY, World, set};
use serde_json::Value;
use xtask::process::until;

use crate::{
    JOB, Scenario,
    waiting::{WAIT, go_on, waiting_at, waiting_in},
};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("a_group_that_others_fill_ends_the_job", a_group_that_others_fill_ends_the_job),
    ("a_thin_pool_that_others_fill_ends_the_job_and_not_the_daemon", a_thin_pool_that_others_fill_ends_the_job),
    ("a_thin_pool_that_waits_for_space_ends_the_job_and_not_the_daemon", a_thin_pool_that_waits_for_space_ends_the_job),
    ("a_thin_pool_without_metadata_left_ends_the_job_and_not_the_daemon", a_pool_without_metadata_left_ends_the_job),
    ("a_lock_of_lvm_that_is_held_is_waited_for", a_lock_of_lvm_that_is_held_is_waited_for),
    ("a_command_that_fails_on_a_lock_is_tried_again", a_command_that_fails_on_a_lock_is_tried_again),
    ("an_lvcreate_that_hangs_is_ended_and_its_volume_removed", an_lvcreate_that_hangs_is_ended),
    (
        "a_volume_that_cannot_be_made_inactive_again_is_said_to_be_active",
        a_volume_that_cannot_be_made_inactive_again_is_said_to_be_active,
    ),
    ("output_of_lvm_that_cannot_be_read_changes_nothing", output_of_lvm_that_cannot_be_read_changes_nothing),
    ("devices_that_appear_late_are_no_failure_and_without_udev_nothing_is_left", devices_that_appear_late_or_never),
    ("two_daemons_on_one_group_leave_each_others_volumes_alone", two_daemons_on_one_group),
];

/// The names of all volumes of `vg0`, sorted, on one line.
fn all_volumes(world: &World) -> Result<String> {
    world.vm.run_ok("lvs --noheadings -o lv_name vg0 | tr -d ' ' | sort | paste -sd ' '")
}

fn a_group_that_others_fill_ends_the_job(world: &World) -> Result<()> {
    let (daemon, id) = waiting_at(world, "group-full", "vg0", "ensure_volume.begin")?;
    world.vm.run_ok("lvcreate --quiet --yes --wipesignatures n --extents 100%FREE --name others vg0")?;
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "failed" && job["error_code"] == "insufficient_space", "{job:#}");
    ensure!(job["retryable"] == true && job["details"].get("not_undone").is_none(), "{job:#}");
    ensure!(world.volumes()? == ["others"], "{:?}", world.volumes()?);
    world.vm.run_ok("lvremove --quiet --yes vg0/others")?;
    daemon.completed(&world.publish(&world.small)?.onto("web", "80M")).map(drop)
}

/// A job that writes to a thin pool which others fill meanwhile; gives it as it ended, and the times when it was asked how it goes.
fn filled_under_a_job(world: &World, name: &str, when_full: &str) -> Result<(Value, Vec<Duration>)> {
    world.vm.run_ok(&format!(
        "lvcreate --quiet --yes --type thin-pool --size 100M --chunksize 64k --zero y --name small vg0
         {when_full}
         lvcreate --quiet --yes --virtualsize 200M --thinpool small --name other vg0"
    ))?;
    let mut environment = world.environment(name);
    set(&mut environment, "LVM_THIN_POOL", Some("small"));
    let request = world.publish(&world.large)?.onto("web", "96M");
    let (daemon, id) = waiting_in(world, name, &environment, "base.created", &request)?;
    // As much as the image needs is taken, and a write that waits for ever is nobody's but the job's.
    world.vm.run_ok("dd if=/dev/urandom of=/dev/vg0/other bs=1M count=60 oflag=direct status=none")?;
    world.vm.run_ok(&format!("rm {WAIT}"))?;
    let mut answers = Vec::new();
    let ended = until(JOB, || {
        let asked = Instant::now();
        let job = daemon.job(&id).ok()?;
        answers.push(asked.elapsed());
        ["failed", "completed"].iter().any(|status| job["status"] == *status).then_some(job)
    });
    let job =
        ended.ok_or_else(|| anyhow::anyhow!("the job did not end:\n{}", daemon.process.log().unwrap_or_default()))?;
    ensure!(job["status"] == "failed" && job["error_code"] == "insufficient_space", "{job:#}");
    ensure!(job["hint"].as_str().is_some_and(|hint| hint.contains("thin pool")), "{job:#}");
    ensure!(job["retryable"] == true && job["details"].get("not_undone").is_none(), "{job:#}");
    let left = all_volumes(world)?;
    ensure!(left == "other pool0 small", "left: {left}: {job:#}");
    world.vm.run_ok("lvremove --yes --quiet vg0/other vg0/small >/dev/null")?;
    Ok((job, answers))
}

fn a_thin_pool_that_others_fill_ends_the_job(world: &World) -> Result<()> {
    filled_under_a_job(world, "thin-full", "lvchange --quiet --errorwhenfull y vg0/small").map(drop)
}

fn a_thin_pool_that_waits_for_space_ends_the_job(world: &World) -> Result<()> {
    let (job, answers) = filled_under_a_job(world, "thin-waits", "")?;
    // The daemon answered all the time, in which the kernel let the job's writes wait.
    let (longest, all) = (answers.iter().max().copied().unwrap_or_default(), answers.iter().sum::<Duration>());
    eprintln!(
        "asked {} times, {:.1} s at most, {:.0} s in all",
        answers.len(),
        longest.as_secs_f32(),
        all.as_secs_f32()
    );
    ensure!(answers.len() > 20 && longest < Duration::from_secs(20), "{answers:?} {job:#}");
    Ok(())
}

/// Makes volumes in the pool `small`, of which LVM knows nothing, until its metadata has no room.
const FILL_METADATA: &str =
    "id=1000; while dmsetup message vg0-small-tpool 0 \"create_thin $id\" 2>/dev/null; do id=$((id + 1)); done
    dmsetup status vg0-small-tpool >&2; test $id -gt 1010";

fn a_pool_without_metadata_left_ends_the_job(world: &World) -> Result<()> {
    world.vm.run_ok(
        "lvcreate --quiet --yes --type thin-pool --size 100M --poolmetadatasize 2M --chunksize 64k --zero y --name small vg0",
    )?;
    let mut environment = world.environment("metadata-full");
    set(&mut environment, "LVM_THIN_POOL", Some("small"));
    let request = world.publish(&world.large)?.onto("web", "96M");
    let (daemon, id) = waiting_in(world, "metadata-full", &environment, "base.created", &request)?;
    world.vm.run_ok(FILL_METADATA)?;
    let job = go_on(world, &daemon, &id)?;
    // Before anything else: until then nobody can take the pool away.
    world.vm.run_ok("lvextend --quiet --yes --poolmetadatasize +8M vg0/small")?;
    ensure!(job["status"] == "failed", "{job:#}");
    // A pool without room for metadata removes nothing either, so what is left is said.
    ensure!(job["details"]["not_undone"].to_string().contains("ensure_volume"), "{job:#}");
    daemon.process.kill_9()?;
    drop(daemon);
    let daemon = world.serve_in("metadata-full", &environment)?;
    let swept = until(JOB, || all_volumes(world).is_ok_and(|left| left == "pool0 small").then_some(()));
    ensure!(swept.is_some(), "left: {}\n{}", all_volumes(world)?, daemon.process.log()?);
    daemon.completed(&request)?;
    world.expect_image("/dev/vg0/web", &world.large)?;
    world.vm.run_ok("lvremove --yes --quiet vg0/small >/dev/null").map(drop)
}

fn a_lock_of_lvm_that_is_held_is_waited_for(world: &World) -> Result<()> {
    let (daemon, id) = waiting_at(world, "locked", "vg0", "ensure_volume.begin")?;
    // As another command of LVM holds it.
    let _holder = world.vm.spawn("holder", &[], &["flock", "/run/lock/lvm/V_vg0", "sleep", "20"])?;
    world.vm.run_ok("until ! flock --nonblock /run/lock/lvm/V_vg0 true; do sleep 0.05; done")?;
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "completed", "{job:#}");
    world.expect_image("/dev/vg0/web", &world.small)
}

/// Makes LVM's commands fail at once when another one holds the lock; what was there before comes back.
const DO_NOT_WAIT: &str = "mv /etc/lvm/lvmlocal.conf /etc/lvm/lvmlocal.conf.kept 2>/dev/null || true
    printf 'global { wait_for_locks = 0 }\n' >/etc/lvm/lvmlocal.conf";
const WAIT_AGAIN: &str =
    "rm /etc/lvm/lvmlocal.conf; mv /etc/lvm/lvmlocal.conf.kept /etc/lvm/lvmlocal.conf 2>/dev/null || true";

fn a_command_that_fails_on_a_lock_is_tried_again(world: &World) -> Result<()> {
    let mut environment = world.environment("contended");
    set(&mut environment, "LVM_RETRY_ATTEMPTS", Some("60"));
    set(&mut environment, "LVM_RETRY_BACKOFF_MS", Some("1000"));
    let request = world.publish(&world.small)?.onto("web", "80M");
    let (daemon, id) = waiting_in(world, "contended", &environment, "ensure_volume.begin", &request)?;
    world.vm.run_ok(DO_NOT_WAIT)?;
    let _holder = world.vm.spawn("holder", &[], &["flock", "/run/lock/lvm/V_vg0", "sleep", "10"])?;
    world.vm.run_ok("until ! flock --nonblock /run/lock/lvm/V_vg0 true; do sleep 0.05; done")?;
    let job = go_on(world, &daemon, &id);
    world.vm.run_ok(WAIT_AGAIN)?;
    let job = job?;
    ensure!(job["status"] == "completed", "{job:#}");
    ensure!(daemon.process.log()?.contains("LVM is locked by another command"), "it did not meet the lock");
    world.expect_image("/dev/vg0/web", &world.small)
}

/// A program of this name that is found before LVM's own.
fn instead_of(world: &World, program: &str, script: &str) -> Result<()> {
    world.vm.write(&format!("/opt/other/{program}"), format!("#!/bin/sh\n{script}\n").as_bytes())?;
    world.vm.run_ok(&format!("chmod 755 /opt/other/{program}")).map(drop)
}

/// The environment of a daemon that finds those programs first.
fn environment_with_other(world: &World, name: &str) -> Vec<(String, String)> {
    let mut environment = world.environment(name);
    set(&mut environment, "PATH", Some("/opt/other:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
    environment
}

fn an_lvcreate_that_hangs_is_ended(world: &World) -> Result<()> {
    // It has made the volume, and does not end.
    instead_of(world, "lvcreate", "/usr/sbin/lvcreate \"$@\"; sleep 3600")?;
    let daemon = world.serve_in("hanging", &environment_with_other(world, "hanging"))?;
    let job = daemon.job_ended(&daemon.provision(&world.publish(&world.small)?.onto("web", "64M"))?, JOB)?;
    ensure!(job["status"] == "failed" && job["error_code"] == "command_failed" && job["retryable"] == true, "{job:#}");
    ensure!(job["error"].as_str().is_some_and(|words| words.contains("did not end within")), "{job:#}");
    ensure!(world.volumes()?.is_empty() && job["details"].get("not_undone").is_none(), "{job:#}");
    let left = world.vm.run_ok(
        "pgrep --list-full --full '^sleep 3600$' || true
        for daemon in $(pgrep --exact lvp); do ps --ppid $daemon -o stat=,args= || true; done | grep '^Z' || true",
    )?;
    ensure!(left.trim().is_empty(), "what hung is left: {left}");
    world.vm.run_ok("rm -r /opt/other").map(drop)
}

fn a_volume_that_cannot_be_made_inactive_again_is_said_to_be_active(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    let inside = "--config devices/scan_lvs=1";
    world.vm.run_ok(&format!("pvcreate {inside} --yes /dev/vg0/web; udevadm settle"))?;
    let before = world.content("web")?;
    world.vm.run_ok("lvchange -an vg0/web; udevadm settle; test ! -e /dev/vg0/web")?;
    let refuse = "case \" $* \" in *' -an '*) echo 'Logical volume vg0/web in use.' >&2; exit 5;; esac";
    instead_of(world, "lvchange", &format!("{refuse}\nexec /usr/sbin/lvchange \"$@\""))?;
    let daemon = world.serve_in("stays-active", &environment_with_other(world, "stays-active"))?;
    // It fails for what is in the volume, and says what else it could not do.
    let job = daemon.failed(&world.publish(&world.small)?.onto("web", "64M"), "volume_in_use")?;
    ensure!(job["error"].as_str().is_some_and(|words| words.contains("is a physical volume of LVM")), "{job:#}");
    let left = job["details"]["not_undone"].to_string();
    ensure!(left.contains("is still active (`lvchange -an vg0/web`)") && left.contains("in use."), "{job:#}");
    ensure!(world.fact("web", "lv_active")? == "active" && world.content("web")? == before, "the volume was touched");
    // The command that it names does what is left.
    world.vm.run_ok("lvchange -an vg0/web; udevadm settle; test ! -e /dev/vg0/web; rm -r /opt/other").map(drop)
}

fn output_of_lvm_that_cannot_be_read_changes_nothing(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    let before = world.content("web")?;
    // A later LVM might say it so.
    instead_of(world, "lvs", "echo '{ \"report\": 7 }'")?;
    let daemon = world.serve_in("strange", &environment_with_other(world, "strange"))?;
    let job = daemon.job_ended(&daemon.provision(&world.publish(&world.small)?.onto("web", "64M"))?, JOB)?;
    ensure!(
        job["status"] == "failed" && job["details"]["command"].as_str().is_some_and(|words| words.starts_with("lvs ")),
        "{job:#}"
    );
    ensure!(world.content("web")? == before && world.volumes()? == ["web"], "something was touched");
    world.vm.run_ok("rm -r /opt/other").map(drop)
}

fn devices_that_appear_late_or_never(world: &World) -> Result<()> {
    let (daemon, id) = waiting_at(world, "late", "vg0", "ensure_volume.begin")?;
    // What udev makes of a new device comes five seconds later.
    world.vm.run_ok(
        "udevadm control --stop-exec-queue; systemd-run --quiet --on-active=5 udevadm control --start-exec-queue",
    )?;
    let begun = Instant::now();
    let job = go_on(world, &daemon, &id)?;
    world.vm.run_ok("udevadm control --start-exec-queue; udevadm settle")?;
    ensure!(job["status"] == "completed" && begun.elapsed() > Duration::from_secs(3), "{job:#}");
    world.expect_image("/dev/vg0/web", &world.small)?;
    // Without udev LVM cannot make a volume.
    let units = "systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd.service";
    world.vm.run_ok(&format!("systemctl stop {units}"))?;
    let request = world.publish(&world.small)?.onto("web-2", "80M");
    let ended = daemon.provision(&request).and_then(|id| daemon.job_ended(&id, JOB));
    world.vm.run_ok(&format!("systemctl start {units}; udevadm trigger; udevadm settle"))?;
    let job = ended?;
    ensure!(job["error_code"] == "command_failed" && job["retryable"] == true, "{job:#}");
    ensure!(job["hint"].as_str().is_some_and(|hint| hint.contains("udev")), "{job:#}");
    ensure!(world.volumes()? == ["web"] && job["details"].get("not_undone").is_none(), "{job:#}");
    daemon.completed(&request)?;
    world.expect_image("/dev/vg0/web-2", &world.small)
}

/// The port of the second daemon.
const SECOND: u16 = 8082;

fn two_daemons_on_one_group(world: &World) -> Result<()> {
    let (first, id) = waiting_at(world, "first", "vg0", "populate.written")?;
    let mut environment = world.environment("second");
    set(&mut environment, "PORT", Some(&SECOND.to_string()));
    let second = world.vm.spawn("second", &environment, &[BINARY, "serve"])?;
    let ask = |method: &str, path: &str, body: Option<&Value>| {
        let url = format!("http://127.0.0.1:{SECOND}{path}");
        world.vm.http(method, &url, body.map(Value::to_string).as_deref())
    };
    let submit = |request: &Value| -> Result<Value> {
        let id =
            ask("POST", "/api/v1/provision", Some(request))?.json()?["job_id"].as_str().unwrap_or_default().to_owned();
        let ended = until(JOB, || {
            let job = ask("GET", &format!("/api/v1/jobs/{id}"), None).and_then(|answer| answer.json()).ok()?;
            ["completed", "failed"].iter().any(|status| job["status"] == *status).then_some(job)
        });
        ended.ok_or_else(|| {
            anyhow::anyhow!("the second daemon's job {id} did not end:\n{}", second.log().unwrap_or_default())
        })
    };
    // It has looked for leftovers, and does not take the first one's volume for one.
    let looked = until(JOB, || second.log().is_ok_and(|log| log.contains("looked for leftovers")).then_some(()));
    ensure!(looked.is_some(), "{}", second.log()?);
    let request = world.publish(&world.small)?.onto("web", "80M");
    let refused = submit(&request)?;
    ensure!(refused["error_code"] == "volume_in_use" && refused["retryable"] == true, "{refused:#}");
    let deleted = ask("DELETE", "/api/v1/volumes/web?force=true", None)?;
    ensure!(deleted.status == 409 && deleted.json()?["error"] == "volume_in_use", "{}", deleted.body);
    let job = go_on(world, &first, &id)?;
    ensure!(job["status"] == "completed", "{job:#}");
    world.expect_image("/dev/vg0/web", &world.small)?;
    // Each by itself, at the same time.
    let (one, other) =
        (world.publish(&world.large)?.onto("web-1", "96M"), world.publish(&world.large)?.onto("web-2", "96M"));
    let id = first.provision(&one)?;
    ensure!(submit(&other)?["status"] == "completed", "{}", second.log()?);
    first.job_completed(&id, JOB)?;
    ensure!(world.volumes()? == ["web", "web-1", "web-2"], "{:?}", world.volumes()?);
    world.expect_image("/dev/vg0/web-1", &world.large)?;
    world.expect_image("/dev/vg0/web-2", &world.large)
}
