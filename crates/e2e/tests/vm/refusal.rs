//! What is refused, each with its code and its reason, and that nothing is left behind and nothing was touched.

use anyhow::{Result, ensure};
use e2e::bed::{BINARY, World, set};

use crate::{JOB, Scenario};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("a_mounted_volume_is_in_use", a_mounted_volume_is_in_use),
    ("a_volume_that_a_program_has_open_is_in_use", a_volume_that_a_program_has_open_is_in_use),
    ("a_volume_under_another_device_is_in_use", a_volume_under_another_device_is_in_use),
    ("the_disk_of_an_active_domain_is_in_use_and_of_one_shut_off_is_not", the_disk_of_an_active_domain_is_in_use),
    ("the_disk_of_a_domain_suspended_to_disk_is_in_use", the_disk_of_a_domain_suspended_to_disk_is_in_use),
    ("a_volume_mounted_in_another_namespace_is_in_use", a_volume_mounted_in_another_namespace_is_in_use),
    ("a_volume_by_its_other_name_is_in_use", a_volume_by_its_other_name_is_in_use),
    ("a_volume_below_an_overlay_of_a_domain_is_in_use", a_volume_below_an_overlay_of_a_domain_is_in_use),
    ("a_volume_with_a_physical_volume_in_it_is_refused", a_volume_with_a_physical_volume_in_it_is_refused),
    (
        "a_job_that_is_refused_leaves_an_inactive_volume_inactive",
        a_job_that_is_refused_leaves_an_inactive_volume_inactive,
    ),
    (
        "a_domain_that_starts_while_its_volume_is_written_gets_none_or_fails_the_job",
        a_domain_that_starts_while_its_volume_is_written_gets_none_or_fails_the_job,
    ),
    ("a_volume_larger_than_the_group_is_refused", a_volume_larger_than_the_group_is_refused),
    ("an_image_larger_than_its_thin_pool_is_refused", an_image_larger_than_its_thin_pool_is_refused),
    ("two_jobs_never_count_on_the_same_space_of_a_thin_pool", two_jobs_never_count_on_the_same_space_of_a_thin_pool),
    ("a_group_that_is_not_there_is_named", a_group_that_is_not_there_is_named),
    ("a_pool_is_no_volume", a_pool_is_no_volume),
    ("another_address_than_loopback_is_refused", another_address_than_loopback_is_refused),
];

/// Asks for the volume `web`, which is in use; the error names `user`, and no byte has changed.
fn expect_in_use(world: &World, state: &str, user: &str) -> Result<()> {
    let before = world.content("web")?;
    let daemon = world.serve(state)?;
    let job = daemon.failed(&world.publish(&world.small)?.onto("web", "64M"), "volume_in_use")?;
    ensure!(job["error"].as_str().is_some_and(|words| words.contains(user)), "{job:#}");
    ensure!(job["retryable"] == true && job["hint"].is_string(), "{job:#}");
    let show = daemon.get("/api/v1/volumes/web")?.json()?;
    ensure!(show["in_use"].as_str().is_some_and(|words| words.contains(user)), "{show:#}");
    ensure!(world.content("web")? == before, "the volume was touched");
    Ok(())
}

fn a_mounted_volume_is_in_use(world: &World) -> Result<()> {
    world
        .vm
        .run_ok("lvcreate --yes --name web --size 64M vg0; mkfs.ext4 -q /dev/vg0/web; mount -o ro /dev/vg0/web /mnt")?;
    expect_in_use(world, "mounted", "/mnt")?;
    world.vm.run_ok("umount /mnt; udevadm settle")?;
    let daemon = world.serve("unmounted")?;
    daemon.completed(&world.publish(&world.small)?.onto("web", "64M"))?;
    world.expect_image("/dev/vg0/web", &world.small)
}

fn a_volume_that_a_program_has_open_is_in_use(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    let _reader = world.vm.spawn("reader", &[], &["sh", "-c", "exec sleep 600 <>/dev/vg0/web"])?;
    expect_in_use(world, "open", "sleep")
}

fn a_volume_under_another_device_is_in_use(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    world.vm.run_ok("dmsetup create above --table '0 131072 linear /dev/vg0/web 0'")?;
    let outcome = expect_in_use(world, "under", "above");
    world.vm.run_ok("dmsetup remove --retry above")?;
    outcome
}

fn the_disk_of_an_active_domain_is_in_use(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    world.paused_domain("holder", "/dev/vg0/web")?;
    expect_in_use(world, "attached", "holder")?;
    world.vm.run_ok("virsh destroy holder; udevadm settle")?;
    let daemon = world.serve("detached")?;
    daemon.completed(&world.publish(&world.small)?.onto("web", "64M"))?;
    world.expect_image("/dev/vg0/web", &world.small)
}

/// As libvirt-guests leaves guests when the host stops. It is made by lvp, so that only its user keeps it from being removed.
fn the_disk_of_a_domain_suspended_to_disk_is_in_use(world: &World) -> Result<()> {
    let order = world.publish(&world.small)?.onto("web", "64M");
    world.serve("before-suspend")?.completed(&order)?;
    world.paused_domain("holder", "/dev/vg0/web")?;
    world.vm.run_ok("virsh managedsave holder; udevadm settle")?;
    ensure!(world.vm.run_ok("virsh domstate holder")?.trim() == "shut off", "it is not suspended");
    expect_in_use(world, "suspended", "the domain holder, which is suspended to disk (managed save)")?;
    let daemon = world.serve("suspended-still")?;
    let job = daemon.failed(&order, "volume_in_use")?;
    let hint = job["hint"].as_str().unwrap_or_default();
    ensure!(hint.contains("virsh managedsave-remove holder"), "{job:#}");
    let kept = daemon.delete("/api/v1/volumes/web?force=true")?;
    ensure!(kept.status == 409 && kept.json()?["error"] == "volume_in_use", "{kept:?}");
    // The way out that the hint names.
    world.vm.run_ok("virsh managedsave-remove holder")?;
    daemon.completed(&order)?;
    world.expect_image("/dev/vg0/web", &world.small)?;
    ensure!(daemon.delete("/api/v1/volumes/web?force=true")?.status == 204, "it is not removed");
    Ok(())
}

fn a_volume_mounted_in_another_namespace_is_in_use(world: &World) -> Result<()> {
    world.vm.run_ok("lvcreate --yes --name web --size 64M vg0; mkfs.ext4 -q /dev/vg0/web; udevadm settle")?;
    let mount = "mount -o ro /dev/vg0/web /mnt && exec sleep 600";
    let _apart =
        world.vm.spawn("mounter", &[], &["unshare", "--mount", "--propagation", "private", "sh", "-c", mount])?;
    world.vm.run_ok("until grep -qs /dev/mapper/vg0-web /proc/[0-9]*/mountinfo; do sleep 0.1; done")?;
    ensure!(!world.vm.run_ok("cat /proc/self/mountinfo")?.contains("vg0-web"), "it is mounted elsewhere only");
    expect_in_use(world, "apart", "mounted at /mnt")
}

fn a_volume_by_its_other_name_is_in_use(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    let id = world.vm.run_ok(
        "for one in /dev/disk/by-id/dm-uuid-LVM-*; do
             if [ $one -ef /dev/vg0/web ]; then echo $one; fi
         done",
    )?;
    ensure!(!id.trim().is_empty(), "udev gives the volume no name by its id");
    for (state, device) in [("mapper", "/dev/mapper/vg0-web"), ("by-id", id.trim())] {
        world.paused_domain("holder", device)?;
        expect_in_use(world, state, "holder")?;
        world.vm.run_ok("virsh destroy holder; virsh undefine holder; udevadm settle")?;
    }
    Ok(())
}

fn a_volume_below_an_overlay_of_a_domain_is_in_use(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    let top = "/var/lib/bed/top.qcow2";
    world.vm.run_ok(&format!("qemu-img create -q -f qcow2 -b /dev/vg0/web -F raw {top}"))?;
    world.paused_domain_on("holder", top, "qcow2")?;
    let outcome = expect_in_use(world, "below", "attached to the active domain holder");
    world.vm.run_ok(&format!("virsh destroy holder; rm {top}; udevadm settle"))?;
    outcome
}

fn a_volume_with_a_physical_volume_in_it_is_refused(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    // As in a guest, or on a host that looks for volume groups in volumes; the group is not active.
    let inside = "--config devices/scan_lvs=1";
    world.vm.run_ok(&format!(
        "pvcreate {inside} --yes /dev/vg0/web && vgcreate {inside} inner /dev/vg0/web && vgchange {inside} -an inner; udevadm settle"
    ))?;
    let before = world.content("web")?;
    let daemon = world.serve("label")?;
    let order = world.publish(&world.small)?.onto("web", "64M");
    for state in ["-ay", "-an"] {
        world.vm.run_ok(&format!("lvchange {state} vg0/web; udevadm settle"))?;
        let job = daemon.failed(&order, "volume_in_use")?;
        ensure!(job["error"].as_str().is_some_and(|words| words.contains("is a physical volume of LVM")), "{job:#}");
        ensure!(job["hint"].as_str().is_some_and(|words| words.contains("wipefs")), "{job:#}");
        ensure!(job["retryable"] == false, "{job:#}");
    }
    world.vm.run_ok("lvchange -ay vg0/web; udevadm settle")?;
    ensure!(world.content("web")? == before, "the volume was touched");
    world.vm.run_ok("wipefs --all /dev/vg0/web; udevadm settle")?;
    daemon.completed(&order)?;
    world.expect_image("/dev/vg0/web", &world.small)
}

/// What is in it shows only when it is active: it is looked at, and put back.
fn a_job_that_is_refused_leaves_an_inactive_volume_inactive(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    let inside = "--config devices/scan_lvs=1";
    world.vm.run_ok(&format!("pvcreate {inside} --yes /dev/vg0/web; udevadm settle"))?;
    let before = world.content("web")?;
    let daemon = world.serve("put-back")?;
    let order = world.publish(&world.small)?.onto("web", "64M");
    world.vm.run_ok("lvchange --activate n vg0/web; udevadm settle; test ! -e /dev/vg0/web")?;
    let job = daemon.failed(&order, "volume_in_use")?;
    ensure!(job["error"].as_str().is_some_and(|words| words.contains("is a physical volume of LVM")), "{job:#}");
    ensure!(job["details"].get("not_undone").is_none(), "{job:#}");
    ensure!(world.fact("web", "lv_active")?.is_empty(), "it is active");
    world.vm.run_ok("test ! -e /dev/vg0/web")?;
    // One that was active stays so.
    world.vm.run_ok("lvchange --activate y vg0/web; udevadm settle")?;
    daemon.failed(&order, "volume_in_use")?;
    ensure!(world.fact("web", "lv_active")? == "active", "it is not active any more");
    ensure!(world.content("web")? == before, "the volume was touched");
    Ok(())
}

fn a_domain_that_starts_while_its_volume_is_written_gets_none_or_fails_the_job(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    let daemon = world.serve("late")?;
    let mut slow = world.publish(&world.small)?.onto("web", "64M");
    slow["limit_rate"] = "1M".into();
    let id = daemon.provision(&slow)?;
    daemon.populating(&id)?;
    let started = world.paused_domain("late", "/dev/vg0/web").is_ok();
    let job = daemon.job_ended(&id, JOB)?;
    let tags = world.fact("web", "lv_tags")?;
    if started {
        ensure!(job["status"] == "failed" && job["error_code"] == "volume_in_use", "{job:#}");
        ensure!(
            job["error"].as_str().is_some_and(|words| words.contains("came into use") && words.contains("late")),
            "{job:#}"
        );
        ensure!(!tags.contains("lvp.image"), "it says that it holds the image: {tags}");
    } else {
        ensure!(job["status"] == "completed" && tags.contains("lvp.image"), "{job:#} {tags}");
    }
    world.vm.run_ok("virsh destroy late || true; udevadm settle")?;
    slow["limit_rate"] = serde_json::Value::Null;
    daemon.completed(&slow)?;
    world.expect_image("/dev/vg0/web", &world.small)
}

fn a_volume_larger_than_the_group_is_refused(world: &World) -> Result<()> {
    let daemon = world.serve("huge")?;
    let free: u64 = world.vm.run_ok("vgs --noheadings --nosuffix --units b -o vg_free vg0")?.parse()?;
    let job = daemon.failed(&world.publish(&world.small)?.onto("web", "20G"), "insufficient_space")?;
    ensure!(job["details"]["needed_bytes"] == 20_u64 << 30 && job["details"]["free_bytes"] == free, "{job:#}");
    ensure!(world.volumes()?.is_empty() && world.cached("huge")?.is_empty(), "something is left");
    // All of it, to the last extent, is not too much.
    world
        .vm
        .run_ok("lvcreate --yes --name most --extents 100%FREE vg0; lvreduce --force --yes --size -64M vg0/most")?;
    daemon.completed(&world.publish(&world.small)?.onto("web", "64M"))?;
    let job = daemon.failed(&world.publish(&world.small)?.onto("web-2", "64M"), "insufficient_space")?;
    ensure!(job["details"]["free_bytes"] == 0, "{job:#}");
    ensure!(world.volumes()? == ["most", "web"], "something is left");
    Ok(())
}

fn an_image_larger_than_its_thin_pool_is_refused(world: &World) -> Result<()> {
    world.vm.run_ok("lvcreate --yes --type thin-pool --name tiny --size 64M vg0")?;
    let mut environment = world.environment("tiny");
    set(&mut environment, "LVM_THIN_POOL", Some("tiny"));
    let daemon = world.serve_in("tiny", &environment)?;
    let job = daemon.failed(&world.publish(&world.large)?.onto("web", "1G"), "insufficient_space")?;
    ensure!(job["retryable"] == true && job["details"]["free_bytes"] == 64 << 20, "{job:#}");
    ensure!(world.volumes()?.is_empty(), "something is left");
    // What fits is written.
    daemon.completed(&world.publish(&world.small)?.onto("web", "256M"))?;
    world.expect_image("/dev/vg0/web", &world.small)
}

/// In a pool that does not zero, a volume takes its whole size, little by little.
fn two_jobs_never_count_on_the_same_space_of_a_thin_pool(world: &World) -> Result<()> {
    world.vm.run_ok("lvcreate --yes --type thin-pool --zero n --name narrow --size 160M vg0")?;
    let mut environment = world.environment("narrow");
    set(&mut environment, "LVM_THIN_POOL", Some("narrow"));
    let daemon = world.serve_in("narrow", &environment)?;
    let mut slow = world.publish(&world.small)?.onto("web-1", "72M");
    // It writes for as long as this takes.
    slow["limit_rate"] = "64K".into();
    let first = daemon.provision(&slow)?;
    daemon.job_when(&first, JOB, |job| job["device_path"].is_string())?;
    let second = world.publish(&world.large)?.onto("web-2", "96M");
    let refused = daemon.failed(&second, "insufficient_space")?;
    let number = |name: &str| refused["details"][name].as_u64().unwrap_or_default();
    ensure!(number("promised_bytes") > 32 << 20 && number("free_bytes") > 104 << 20, "{refused:#}");
    ensure!(refused["retryable"] == true && number("kept_bytes") == 8 << 20, "{refused:#}");
    ensure!(world.volumes()? == ["web-1"], "something is left");
    daemon.delete(&format!("/api/v1/jobs/{first}"))?;
    daemon.job_ended(&first, JOB)?;
    daemon.completed(&second)?;
    world.expect_image("/dev/vg0/web-2", &world.large)
}

fn a_group_that_is_not_there_is_named(world: &World) -> Result<()> {
    let mut environment = world.environment("nowhere");
    set(&mut environment, "LVM_VOLUME_GROUP", Some("nowhere"));
    let daemon = world.serve_in("nowhere", &environment)?;
    let job = daemon.failed(&world.publish(&world.small)?.onto("web", "64M"), "target_unavailable")?;
    ensure!(job["error"].as_str().is_some_and(|words| words.contains("nowhere")), "{job:#}");
    for path in ["/readyz", "/health"] {
        let answer = daemon.get(path)?;
        ensure!(answer.status == 503, "{path}: {answer:?}");
        let health = answer.json()?;
        let check = health["checks"].as_array().and_then(|all| all.iter().find(|one| one["name"] == "target:default"));
        let check = check.unwrap_or(&health);
        ensure!(check["status"] == "unhealthy" && check["hint"].is_string(), "{health:#}");
        ensure!(check["message"].as_str().is_some_and(|words| words.contains("nowhere")), "{health:#}");
    }
    ensure!(daemon.get("/livez")?.status == 200 && world.cached("nowhere")?.is_empty());
    Ok(())
}

fn a_pool_is_no_volume(world: &World) -> Result<()> {
    let daemon = world.serve("pool")?;
    let size = world.fact("pool0", "lv_size")?;
    let job = daemon.failed(&world.publish(&world.small)?.onto("pool0", &size), "volume_incompatible")?;
    ensure!(job["error"].as_str().is_some_and(|words| words.contains("thin pool")), "{job:#}");
    let kept = daemon.delete("/api/v1/volumes/pool0?force=true")?;
    ensure!(kept.status == 409 && kept.json()?["error"] == "volume_not_ours", "{kept:?}");
    world.fact("pool0", "lv_name").map(drop)
}

fn another_address_than_loopback_is_refused(world: &World) -> Result<()> {
    for host in ["0.0.0.0", "10.0.2.15", "::"] {
        let refused = world.vm.run_within(
            JOB,
            &format!(
                "HOST={host} LVP_STATE_DIR=/var/lib/lvp-open LVP_CACHE_DIR=/var/lib/lvp-open/cache {BINARY} serve"
            ),
        )?;
        ensure!(refused.code == 2 && refused.stderr.contains("no authentication"), "{host}: {refused:?}");
    }
    Ok(())
}
