//! The test bed itself: each part does what scenarios rely on. It asserts nothing of lvp but that it starts.

use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::{
    bed::{BINARY, BUCKET, World},
    fixture::Fixture,
    minio::Fetched,
};

use crate::Scenario;

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("group_and_thin_pool_are_there", group_and_thin_pool_are_there),
    ("volumes_come_and_go", volumes_come_and_go),
    ("a_paused_domain_holds_its_disk", a_paused_domain_holds_its_disk),
    ("commands_have_limits_and_codes", commands_have_limits_and_codes),
    ("a_background_program_is_killed_and_started_again", a_background_program_is_killed_and_started_again),
    ("minio_is_reached_and_counts", minio_is_reached_and_counts),
    ("minio_refuses_strangers_and_restarts", minio_refuses_strangers_and_restarts),
    ("every_byte_of_a_volume_is_compared", every_byte_of_a_volume_is_compared),
    ("the_binary_starts", the_binary_starts),
    ("disks_survive_a_power_cut", disks_survive_a_power_cut),
    ("reset_takes_away_what_was_left", reset_takes_away_what_was_left),
];

fn group_and_thin_pool_are_there(world: &World) -> Result<()> {
    let free = world.vm.run_ok("vgs --noheadings --nosuffix --units b --options vg_free vg0")?;
    ensure!(free.parse::<u64>()? > 3 << 30, "only {free} bytes free");
    let layout = world.vm.run_ok("lvs --noheadings --options lv_layout,lv_active vg0/pool0")?;
    ensure!(layout.split_whitespace().eq(["thin,pool", "active"]), "{layout}");
    let failed = world.vm.run_ok("systemctl --failed --plain --no-legend")?;
    ensure!(failed.is_empty(), "{failed}");
    let disks = world.vm.monitor("info block")?;
    ensure!(disks.contains("root.qcow2") && disks.contains("data.img"), "{disks}");
    Ok(())
}

fn volumes_come_and_go(world: &World) -> Result<()> {
    world.vm.run_ok("lvcreate --yes --name thick --size 64M vg0; lvcreate --yes --thin --name thin -V 1G vg0/pool0")?;
    world.vm.run_ok("test -b /dev/vg0/thick; test -b /dev/vg0/thin; blkdiscard /dev/vg0/thin")?;
    world.vm.run_ok("lvremove --yes vg0/thick vg0/thin; test ! -e /dev/vg0/thick")?;
    Ok(())
}

fn a_paused_domain_holds_its_disk(world: &World) -> Result<()> {
    world.vm.run_ok("lvcreate --yes --name disk --size 64M vg0")?;
    world.paused_domain("holder", "/dev/vg0/disk")?;
    let state = world.vm.run_ok("virsh domstate holder")?;
    ensure!(state == "paused", "{state}");
    let removed = world.vm.run("lvremove --yes vg0/disk")?;
    ensure!(removed.code != 0 && removed.stderr.contains("in use"), "{removed:?}");
    world.vm.run_ok("virsh destroy holder; virsh undefine holder; lvremove --yes vg0/disk")?;
    Ok(())
}

fn commands_have_limits_and_codes(world: &World) -> Result<()> {
    let output = world.vm.run("echo out; echo \"it's\" >&2; exit 3")?;
    ensure!((output.code, &*output.stdout, &*output.stderr) == (3, "out\n", "it's\n"), "{output:?}");
    ensure!(world.vm.run("false | true")?.code == 1, "a pipe's failure is lost");
    let error = world.vm.run_within(Duration::from_secs(1), "exec -a sleeper sleep 60").unwrap_err();
    ensure!(error.to_string().contains("did not end within 1 s"), "{error:#}");
    ensure!(world.vm.run("pgrep -f ^sleeper")?.code == 1, "it runs on in the machine");
    Ok(())
}

fn a_background_program_is_killed_and_started_again(world: &World) -> Result<()> {
    let environment = [("WORDS".to_owned(), "two words".to_owned())];
    let sleeper = world.vm.spawn("sleeper", &environment, &["sh", "-c", "echo \"$WORDS\"; sleep 60 & wait"])?;
    let first = sleeper.id()?;
    sleeper.kill_9()?;
    ensure!(!sleeper.is_running()? && sleeper.id().is_err(), "it survived");
    ensure!(world.vm.run("pgrep -x sleep")?.code == 1, "its child survived");
    sleeper.start_again()?;
    ensure!(sleeper.id()? != first);
    sleeper.stop()?;
    ensure!(sleeper.log()? == "two words\ntwo words", "{}", sleeper.log()?);
    Ok(())
}

fn minio_is_reached_and_counts(world: &World) -> Result<()> {
    let url = format!("{}/minio/health/live", world.minio.endpoint_in_vm());
    ensure!(world.vm.http("GET", &url, None)?.status == 200);
    world.minio.put_bytes(BUCKET, "ten-bytes", b"0123456789")?;
    ensure!(world.minio.fetched(BUCKET, "ten-bytes")? == Fetched::default());
    let get = format!(
        "curl -sS --fail --user {}:{} --aws-sigv4 aws:amz:us-east-1:s3 -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' {}/{BUCKET}/ten-bytes",
        world.minio.access_key(),
        world.minio.secret_key(),
        world.minio.endpoint_in_vm(),
    );
    ensure!(world.vm.run_ok(&get)? == "0123456789");
    ensure!(world.vm.run_ok(&format!("{get} -H 'Range: bytes=2-4'"))? == "234");
    let fetched = world.minio.fetched(BUCKET, "ten-bytes")?;
    ensure!(fetched == Fetched { requests: 2, bytes: 13 }, "{fetched:?}");
    Ok(())
}

fn minio_refuses_strangers_and_restarts(world: &World) -> Result<()> {
    world.minio.put_bytes(BUCKET, "kept", b"kept")?;
    let url = format!("{}/{BUCKET}/kept", world.minio.endpoint_in_vm());
    ensure!(world.vm.http("GET", &url, None)?.status == 403);
    world.minio.stop();
    ensure!(world.vm.http("GET", &url, None).is_err(), "it answers, stopped");
    world.minio.restart()?;
    ensure!(world.vm.http("GET", &url, None)?.status == 403);
    world.minio.remove(BUCKET, "kept")?;
    Ok(())
}

fn every_byte_of_a_volume_is_compared(world: &World) -> Result<()> {
    let image = Fixture::qcow2("compared", 64, 8)?;
    let published = world.publish(&image)?;
    ensure!(published.url.ends_with("/images/compared.qcow2") && published.s3_url == "s3://images/compared.qcow2");
    world.vm.copy_in(&image.path, "/var/lib/bed/compared.qcow2")?;
    world.vm.run_ok(
        "lvcreate --yes --name compared --size 72M vg0; blkdiscard --zeroout /dev/vg0/compared
         qemu-img convert -n -O raw /var/lib/bed/compared.qcow2 /dev/vg0/compared",
    )?;
    world.expect_image("/dev/vg0/compared", &image)?;
    world.vm.run_ok("e2fsck -fn /dev/vg0/compared")?;
    world.vm.run_ok(
        "lvcreate --yes --name exact --size 64M vg0; dd if=/dev/vg0/compared of=/dev/vg0/exact bs=1M count=64",
    )?;
    world.expect_image("/dev/vg0/exact", &image)?;
    for place in ["32 << 20", "(72 << 20) - 1"] {
        let write = |byte: &str| {
            format!("printf '{byte}' | dd of=/dev/vg0/compared bs=1 seek=$(({place})) conv=notrunc status=none")
        };
        let before = world.vm.run_ok(&format!(
            "dd if=/dev/vg0/compared bs=1 skip=$(({place})) count=1 status=none | od -An -to1 | tr -d ' '"
        ))?;
        world.vm.run_ok(&write(if before == "252" { r"\253" } else { r"\252" }))?;
        let seen = world.expect_image("/dev/vg0/compared", &image);
        ensure!(seen.is_err(), "a wrong byte at {place} is not seen");
        world.vm.run_ok(&write(&format!(r"\{before}")))?;
        world.expect_image("/dev/vg0/compared", &image)?;
    }
    Ok(())
}

fn the_binary_starts(world: &World) -> Result<()> {
    let output = world.vm.run(&format!("{BINARY} --version"))?;
    ensure!(output.code == 0, "{output:?}");
    Ok(())
}

fn disks_survive_a_power_cut(world: &World) -> Result<()> {
    world.vm.run_ok("lvcreate --yes --name kept --size 8M vg0; echo kept | dd of=/dev/vg0/kept conv=fsync")?;
    world.vm.write("/root/synced", b"synced")?;
    world.vm.run_ok("sync; echo not synced >/root/not-synced")?;
    world.vm.kill_power()?;
    ensure!(world.vm.run("true").is_err(), "a machine without power answers");
    world.vm.boot_again()?;
    ensure!(world.vm.run_ok("head -c 4 /dev/vg0/kept; cat /root/synced")? == "keptsynced");
    ensure!(world.vm.run_ok("cat /root/not-synced || true")?.is_empty(), "memory survived the power cut");
    Ok(())
}

fn reset_takes_away_what_was_left(world: &World) -> Result<()> {
    world.vm.run_ok(
        "lvcreate --yes --name mounted --size 16M vg0; mkfs.ext4 -q /dev/vg0/mounted; mount /dev/vg0/mounted /mnt
         lvcreate --yes --thin --name thin -V 64M vg0/pool0; lvcreate --yes --name disk --size 16M vg0",
    )?;
    world.paused_domain("left", "/dev/vg0/disk")?;
    world.reset()?;
    ensure!(world.vm.run_ok("lvs --noheadings --options lv_name vg0")? == "pool0");
    ensure!(world.vm.run_ok("virsh list --all --name")?.is_empty());
    Ok(())
}
