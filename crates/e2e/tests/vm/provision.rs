//! New volumes: thick, thin, of every kind of image; the second request is a hit; the seed's own curl lines.

use anyhow::{Context, Result, ensure};
use e2e::{
    bed::{BUCKET, World, set},
    fixture::Fixture,
};
use serde_json::{Value, json};

use crate::Scenario;

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("a_new_thick_volume_is_the_image_and_a_hit_downloads_nothing", a_new_thick_volume_then_a_hit),
    ("a_new_thin_volume_takes_only_what_the_image_has", a_new_thin_volume_takes_only_what_the_image_has),
    ("a_thick_volume_on_used_extents_shows_nothing_old", a_thick_volume_on_used_extents_shows_nothing_old),
    ("a_configured_target_is_named_either_way", a_configured_target_is_named_either_way),
    ("every_kind_of_image_is_written", every_kind_of_image_is_written),
    ("the_curl_lines_of_the_readme_work", the_curl_lines_of_the_readme_work),
    ("the_curl_lines_work_under_jobs", the_curl_lines_work_under_jobs),
];

fn a_new_thick_volume_then_a_hit(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let before = world.minio.fetched(BUCKET, &world.small.name)?;
    let daemon = world.serve("new")?;
    let job = daemon.completed(&published.onto("web-1", "80M"))?;
    ensure!(job["cache_hit"] == false && job["device_path"] == "/dev/vg0/web-1", "{job:#}");
    world.expect_image("/dev/vg0/web-1", &world.small)?;
    ensure!(world.fact("web-1", "lv_size")? == (80 << 20).to_string() && world.fact("web-1", "lv_layout")? == "linear");
    let id = job["job_id"].as_str().context("no job_id")?;
    let image = format!("lvp.image=sha256:{}", world.small.sha256);
    ensure!(world.tags("web-1")? == ["lvp", &image, &format!("lvp.job={id}")], "{:?}", world.tags("web-1")?);

    let fetched = world.minio.fetched(BUCKET, &world.small.name)?;
    let size = world.small.path.metadata()?.len();
    ensure!(fetched.bytes - before.bytes < size + size / 4, "{fetched:?} of {size} bytes, {before:?} before");
    let hit = daemon.completed(&published.onto("web-2", "80M"))?;
    ensure!(hit["cache_hit"] == true && hit["image_path"] == job["image_path"], "{hit:#}");
    ensure!(world.minio.fetched(BUCKET, &world.small.name)? == fetched, "a hit fetched the image");
    world.expect_image("/dev/vg0/web-2", &world.small)
}

fn a_new_thin_volume_takes_only_what_the_image_has(world: &World) -> Result<()> {
    let mut environment = world.environment("thin");
    set(&mut environment, "LVM_THIN_POOL", Some("pool0"));
    let daemon = world.serve_in("thin", &environment)?;
    let job = daemon.completed(&world.publish(&world.small)?.onto("thin-1", "256M"))?;
    ensure!(job["target"] == "lvm:vg0/pool0", "{job:#}");
    world.expect_image("/dev/vg0/thin-1", &world.small)?;
    ensure!(world.fact("thin-1", "lv_layout")? == "thin,sparse" && world.fact("thin-1", "pool_lv")? == "pool0");
    let percent: f64 = world.fact("thin-1", "data_percent")?.parse()?;
    // 8 MiB of files and the file system's own tables, in a volume of 256 MiB.
    ensure!(percent < 8.0, "{percent} % are allocated");
    Ok(())
}

fn a_thick_volume_on_used_extents_shows_nothing_old(world: &World) -> Result<()> {
    world.make_volume("old", "--size 96M")?;
    world.vm.run_ok("lvs --noheadings -o seg_pe_ranges vg0/old >/tmp/old; lvremove --yes vg0/old")?;
    let daemon = world.serve("used")?;
    daemon.completed(&world.publish(&world.small)?.onto("new", "96M"))?;
    ensure!(world.fact("new", "seg_pe_ranges")? == world.vm.run_ok("cat /tmp/old")?, "LVM took other extents");
    world.expect_image("/dev/vg0/new", &world.small)
}

fn a_configured_target_is_named_either_way(world: &World) -> Result<()> {
    let file = "[targets.fast]\nkind = \"lvm\"\nvolume_group = \"vg0\"\nthin_pool = \"pool0\"\n";
    world.vm.write("/var/lib/lvp-targets/config.toml", file.as_bytes())?;
    let mut environment = world.environment("targets");
    set(&mut environment, "LVP_CONFIG", Some("/var/lib/lvp-targets/config.toml"));
    let daemon = world.serve_in("targets", &environment)?;
    let published = world.publish(&world.small)?;
    for (volume, target, layout) in [
        ("by-name", "fast", "thin,sparse"),
        ("written-out", "lvm:vg0/pool0", "thin,sparse"),
        ("thick", "default", "linear"),
    ] {
        let mut request = published.onto(volume, "64M");
        request["target"] = json!(target);
        daemon.completed(&request)?;
        ensure!(world.fact(volume, "lv_layout")? == layout, "{volume}");
        world.expect_image(&format!("/dev/vg0/{volume}"), &world.small)?;
    }
    let mut elsewhere = published.onto("elsewhere", "64M");
    elsewhere["target"] = json!("dir:/etc");
    let refused = daemon.post("/api/v1/provision", &elsewhere)?;
    ensure!(refused.status == 403 && refused.json()?["error"] == "not_permitted", "{refused:?}");
    Ok(())
}

fn every_kind_of_image_is_written(world: &World) -> Result<()> {
    let daemon = world.serve("kinds")?;
    let kinds: [(&str, &str, &[&str]); 4] = [
        ("zstd", "qcow2", &["-c", "-o", "compression_type=zstd"]),
        ("wide", "qcow2", &["-o", "cluster_size=2M,extended_l2=on"]),
        ("old", "qcow2", &["-o", "compat=0.10,cluster_size=4k"]),
        ("plain", "raw", &[]),
    ];
    for (name, format, flags) in kinds {
        let image = Fixture::converted(name, 24, 4, format, flags)?;
        let published = world.publish(&image)?;
        daemon.completed(&published.onto(name, "32M"))?;
        world.expect_image(&format!("/dev/vg0/{name}"), &image)?;
    }
    Ok(())
}

fn the_curl_lines_of_the_readme_work(world: &World) -> Result<()> {
    curl_lines(world, ["/api/v1/provision", "/api/v1/status", "/api/v1/cancel"])
}

fn the_curl_lines_work_under_jobs(world: &World) -> Result<()> {
    curl_lines(world, ["/api/v1/jobs", "/api/v1/jobs", "/api/v1/jobs"])
}

/// The seed's own lines, unchanged but for scheme, host and certificates. 50 GiB are there because the pool is thin.
fn curl_lines(world: &World, [provision, status, cancel]: [&str; 3]) -> Result<()> {
    let image = Fixture::qcow2("ubuntu-20.04", 32, 4)?;
    let minio = world.publish(&image)?.url;
    let mut environment = world.environment("curl");
    set(&mut environment, "LVM_THIN_POOL", Some("pool0"));
    let _daemon = world.serve_in("curl", &environment)?;
    let submit = format!(
        r#"curl -sS -X POST http://127.0.0.1:8080{provision} \
  -H "Content-Type: application/json" \
  -d '{{
    "image_url": "{minio}",
    "volume_name": "vm-root-disk-1",
    "volume_size_gb": 50,
    "image_type": "qcow2",
    "correlation_id": "provision-vm-001"
  }}'"#
    );
    let asked = |line: &str| -> Result<Value> { Ok(serde_json::from_str(&world.vm.run_ok(line)?)?) };
    let id = job_id(&asked(&submit)?)?;
    let show = format!("curl -sS http://127.0.0.1:8080{status}/{id}");
    world.vm.run_ok(&format!("until {show} | grep -E '\"status\": ?\"(completed|failed)'; do sleep 0.1; done"))?;
    let done = asked(&show)?;
    ensure!(done["job_id"] == id && done["status"] == "completed", "{done:#}");
    ensure!(done["correlation_id"] == "provision-vm-001" && done["cache_hit"] == false, "{done:#}");
    ensure!(done["image_path"].as_str().is_some_and(|path| path.ends_with(".qcow2")), "{done:#}");
    let progress = &done["progress"];
    ensure!(progress["stage"] == "finalizing" && progress["percent"] == 100, "{done:#}");
    ensure!(progress["bytes_processed"] == 50_u64 << 30 && progress["bytes_total"] == 50_u64 << 30, "{done:#}");
    world.expect_content("/dev/vg0/vm-root-disk-1", &image)?;

    // Another image: of this one there is a base by now, and a copy of that is made too fast to be cancelled.
    let other = world.publish(&Fixture::qcow2("ubuntu-22.04", 32, 4)?)?.url;
    world.throttle(64 << 10)?;
    let id = job_id(&asked(&submit.replace("disk-1", "disk-2").replace(&minio, &other))?)?;
    asked(&format!("curl -sS -X DELETE http://127.0.0.1:8080{cancel}/{id}"))?;
    world.unthrottle()?;
    let show = format!("curl -sS http://127.0.0.1:8080{status}/{id}");
    world.vm.run_ok(&format!("until {show} | grep -E '\"status\": ?\"cancelled'; do sleep 0.1; done"))?;
    ensure!(world.volumes()? == ["vm-root-disk-1"], "{:?}", world.volumes()?);
    Ok(())
}

/// The id in the answer to a submission, which is nothing else.
fn job_id(answer: &Value) -> Result<String> {
    let id = answer["job_id"].as_str().with_context(|| format!("no job_id: {answer}"))?;
    ensure!(answer.as_object().is_some_and(|fields| fields.len() == 1), "{answer}");
    Ok(id.to_owned())
}
