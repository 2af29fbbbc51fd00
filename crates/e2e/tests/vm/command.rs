//! The command line in the machine: without a daemon, and with one.

use anyhow::{Result, ensure};
use e2e::{
    bed::{BUCKET, World},
    vm::Output,
};
use serde_json::Value;

use crate::{JOB, Scenario};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("a_volume_is_provisioned_without_a_daemon", a_volume_is_provisioned_without_a_daemon),
    ("a_command_uses_the_daemon_that_is_there", a_command_uses_the_daemon_that_is_there),
    ("ctrl_c_cancels_and_takes_back", ctrl_c_cancels_and_takes_back),
    ("the_doctor_finds_a_configured_host_well", the_doctor_finds_a_configured_host_well),
    ("the_doctor_names_what_is_wrong", the_doctor_names_what_is_wrong),
    ("only_what_lvp_made_is_deleted_and_only_by_force", only_what_lvp_made_is_deleted_and_only_by_force),
];

/// Runs `lvp` with nothing but what its user would set.
fn lvp(world: &World, settings: &str, arguments: &str) -> Result<Output> {
    let minio = &world.minio;
    world.vm.run_within(
        JOB,
        &format!(
            "MINIO_ENDPOINT={} MINIO_ACCESS_KEY={} MINIO_SECRET_KEY={} LVM_VOLUME_GROUP=vg0 {settings} lvp {arguments}",
            minio.endpoint_in_vm(),
            minio.access_key(),
            minio.secret_key()
        ),
    )
}

fn expect_code(output: &Output, code: i32) -> Result<()> {
    ensure!(output.code == code, "not {code}: {output:?}");
    Ok(())
}

fn a_volume_is_provisioned_without_a_daemon(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let provision = format!("provision {} web-1 --size 200M", published.s3_url);
    let made = lvp(world, "", &provision)?;
    expect_code(&made, 0)?;
    ensure!(made.stdout.contains("/dev/vg0/web-1"), "{made:?}");
    world.expect_image("/dev/vg0/web-1", &world.small)?;
    let fetched = world.minio.fetched(BUCKET, &world.small.name)?;
    expect_code(&lvp(world, "", &provision.replace("web-1", "web-2"))?, 0)?;
    ensure!(world.minio.fetched(BUCKET, &world.small.name)? == fetched, "a hit fetched the image");
    expect_code(&lvp(world, "", "provision s3://images/absent.qcow2 web-3 --size 200M")?, 6)?;
    expect_code(&lvp(world, "", &format!("provision {} web-1 --size 300M", published.s3_url))?, 4)?;
    ensure!(world.volumes()? == ["web-1", "web-2"], "{:?}", world.volumes()?);
    Ok(())
}

fn a_command_uses_the_daemon_that_is_there(world: &World) -> Result<()> {
    let daemon = world.serve("there")?;
    let published = world.publish(&world.small)?;
    let state = "LVP_STATE_DIR=/var/lib/lvp-there";
    let made = lvp(world, state, &format!("provision {} web-1 --size 64M --output json", published.s3_url))?;
    expect_code(&made, 0)?;
    let job: Value = serde_json::from_str(&made.stdout)?;
    let id = job["job_id"].as_str().unwrap_or_default();
    ensure!(daemon.job(id)?["status"] == "completed", "the daemon does not know job {id}");
    world.expect_image("/dev/vg0/web-1", &world.small)?;
    let detached = lvp(world, state, &format!("provision {} web-2 --size 64M --detach", published.s3_url))?;
    expect_code(&detached, 0)?;
    expect_code(&lvp(world, state, &format!("job watch {}", detached.stdout.trim()))?, 0)?;
    let listed = lvp(world, state, "volume list")?;
    ensure!(listed.stdout.contains("web-1") && listed.stdout.contains("web-2"), "{listed:?}");
    Ok(())
}

fn ctrl_c_cancels_and_takes_back(world: &World) -> Result<()> {
    let published = world.publish(&world.large)?;
    world.throttle(8 << 20)?;
    let interrupted = lvp(
        world,
        "",
        &format!(
            "provision {} web --size 96M & command=$!
             until test -e /dev/vg0/web; do sleep 0.1; done
             kill -INT $command; wait $command",
            published.s3_url
        ),
    )?;
    world.unthrottle()?;
    expect_code(&interrupted, 130)?;
    ensure!(world.volumes()?.is_empty(), "{:?}", world.volumes()?);
    Ok(())
}

fn the_doctor_finds_a_configured_host_well(world: &World) -> Result<()> {
    let found = lvp(world, "", "doctor --output json")?;
    expect_code(&found, 0)?;
    let checks: Vec<Value> = serde_json::from_str(&found.stdout)?;
    ensure!(checks.len() > 6 && checks.iter().all(|check| check["status"] == "healthy"), "{found:?}");
    let names: Vec<&str> = checks.iter().filter_map(|check| check["name"].as_str()).collect();
    for name in ["user", "tools", "libvirt", "target:default", "object store", "clock"] {
        ensure!(names.contains(&name), "{name} is not looked at: {names:?}");
    }
    Ok(())
}

fn the_doctor_names_what_is_wrong(world: &World) -> Result<()> {
    let found = lvp(world, "LVM_THIN_POOL=nowhere MINIO_SECRET_KEY=another-secret", "doctor")?;
    expect_code(&found, 8)?;
    for words in ["vg0/nowhere", "refuses the keys", "fix:"] {
        ensure!(found.stdout.contains(words), "{words} is not in {found:?}");
    }
    Ok(())
}

fn only_what_lvp_made_is_deleted_and_only_by_force(world: &World) -> Result<()> {
    world.make_volume("by-hand", "--size 64M")?;
    let published = world.publish(&world.small)?;
    expect_code(&lvp(world, "", &format!("provision {} web --size 64M", published.s3_url))?, 0)?;
    // Provisioned by lvp, but not made by it.
    expect_code(&lvp(world, "", &format!("provision {} by-hand --size 64M", published.s3_url))?, 0)?;
    for (arguments, code) in [("web", 4), ("by-hand --force", 4), ("absent --force", 3)] {
        expect_code(&lvp(world, "", &format!("volume delete {arguments}"))?, code)?;
    }
    ensure!(world.volumes()? == ["by-hand", "web"]);
    world.vm.run_ok("mount /dev/vg0/web /mnt")?;
    expect_code(&lvp(world, "", "volume delete web --force")?, 4)?;
    world.vm.run_ok("umount /mnt; udevadm settle")?;
    expect_code(&lvp(world, "", "volume delete web --force")?, 0)?;
    ensure!(world.volumes()? == ["by-hand"]);
    Ok(())
}
