//! The image cache: one download for many, and libvirt's view of it.

use anyhow::{Context, Result, ensure};
use e2e::{
    bed::{BUCKET, World, set},
    fixture::Fixture,
};

use crate::{JOB, Scenario};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("ten_requests_for_one_image_are_one_download", ten_requests_for_one_image_are_one_download),
    ("libvirt_s_pool_lists_the_cached_image", libvirt_s_pool_lists_the_cached_image),
    ("a_cached_image_that_rotted_is_fetched_anew", a_cached_image_that_rotted_is_fetched_anew),
];

fn ten_requests_for_one_image_are_one_download(world: &World) -> Result<()> {
    let image = Fixture::qcow2("asked-for-ten-times", 40, 28)?;
    let published = world.publish(&image)?;
    let mut environment = world.environment("ten");
    set(&mut environment, "MAX_CONCURRENT_JOBS", Some("10"));
    set(&mut environment, "LVM_THIN_POOL", Some("pool0"));
    let daemon = world.serve_in("ten", &environment)?;
    let volumes: Vec<String> = (0..10).map(|number| format!("web-{number}")).collect();
    let ids = volumes.iter().map(|volume| daemon.provision(&published.onto(volume, "40M")));
    for id in ids.collect::<Result<Vec<_>>>()? {
        daemon.job_completed(&id, JOB)?;
    }
    let (fetched, size) = (world.minio.fetched(BUCKET, &image.name)?, image.path.metadata()?.len());
    // Each job looks at the header and the tables before it waits for the download.
    let tables = 10 * (512 << 10);
    ensure!((size..size + tables).contains(&fetched.bytes), "{fetched:?} of an image of {size} bytes");
    ensure!(world.volumes()? == volumes, "{:?}", world.volumes()?);
    for volume in ["web-0", "web-9"] {
        world.expect_image(&format!("/dev/vg0/{volume}"), &image)?;
    }
    Ok(())
}

fn libvirt_s_pool_lists_the_cached_image(world: &World) -> Result<()> {
    let mut environment = world.environment("pool");
    set(&mut environment, "LVP_CACHE_DIR", None);
    let daemon = world.serve_in("pool", &environment)?;
    ensure!(world.vm.run_ok("virsh vol-list images")?.lines().count() == 2, "the pool is not there, or not empty");
    let job = daemon.completed(&world.publish(&world.small)?.onto("web", "64M"))?;
    let path = job["image_path"].as_str().context("no image_path")?;
    let name = path.strip_prefix("/var/lib/libvirt/images/").with_context(|| format!("{path} is not in the pool"))?;
    ensure!(world.vm.run_ok(&format!("virsh vol-path --pool images {name}"))? == path);
    ensure!(
        world.vm.run_ok(&format!("sha256sum <{path}"))?.starts_with(&world.small.sha256),
        "it is not what was published"
    );
    ensure!(world.vm.run_ok("virsh pool-info images")?.contains("Autostart:      yes"));
    ensure!(daemon.delete(&format!("/api/v1/images/{name}"))?.status == 204);
    let listed = world.vm.run_ok("virsh vol-list images")?;
    ensure!(!listed.contains(name), "{listed}");
    Ok(())
}

fn a_cached_image_that_rotted_is_fetched_anew(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let daemon = world.serve("rot")?;
    let job = daemon.completed(&published.onto("web-1", "64M"))?;
    let path = job["image_path"].as_str().context("no image_path")?;
    world.vm.run_ok(&format!("printf rot | dd of={path} bs=1 seek=2000000 conv=notrunc status=none"))?;
    let job = daemon.completed(&published.onto("web-2", "64M"))?;
    ensure!(job["cache_hit"] == false, "{job:#}");
    world.expect_image("/dev/vg0/web-2", &world.small)
}
