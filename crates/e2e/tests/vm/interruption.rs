//! Jobs that end in the middle: cancelled, killed, told to stop, without power. Each is finished or taken back.

use anyhow::{Result, ensure};
use e2e::{bed::World, product::Product};
use serde_json::Value;

use crate::{JOB, Scenario, waiting::waiting_at};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("a_cancel_stops_the_writer_within_a_second_and_removes_the_volume", a_cancel_removes_the_new_volume),
    ("a_cancel_of_a_reused_volume_keeps_it_and_says_that_it_is_incomplete", a_cancel_keeps_the_reused_volume),
    ("a_cancel_of_a_download_leaves_nothing", a_cancel_of_a_download_leaves_nothing),
    ("a_killed_job_resumes_and_completes", a_killed_job_resumes_and_completes),
    ("a_killed_job_on_a_reused_volume_resumes_and_completes", a_killed_job_on_a_reused_volume_resumes),
    ("a_killed_download_resumes_and_completes", a_killed_download_resumes_and_completes),
    ("a_job_that_was_to_be_cancelled_when_killed_is_taken_back", a_job_to_be_cancelled_when_killed_is_taken_back),
    ("a_stopped_daemon_resumes_its_job", a_stopped_daemon_resumes_its_job),
    ("a_volume_that_an_attempt_before_wrote_to_is_said_to_be", a_volume_that_an_attempt_before_wrote_to_is_said_to_be),
    (
        "a_volume_of_the_name_of_one_that_was_begun_is_left_alone",
        a_volume_of_the_name_of_one_that_was_begun_is_left_alone,
    ),
    ("a_job_survives_a_power_cut", a_job_survives_a_power_cut),
];

/// Slow enough that a job on the large image takes many seconds.
const SLOW: u64 = 12 << 20;

/// A request for the large image on the volume `web`, which does not end before somebody ends it.
fn lasting(world: &World) -> Result<Value> {
    let mut request = world.publish(&world.large)?.onto("web", "96M");
    request["limit_rate"] = "4M".into();
    Ok(request)
}

/// A daemon with a job that is writing the large image to the volume `web`.
fn populating<'world>(world: &'world World, name: &str) -> Result<(Product<'world>, String)> {
    let request = world.publish(&world.large)?.onto("web", "96M");
    populating_by(world, name, &request)
}

fn populating_by<'world>(world: &'world World, name: &str, request: &Value) -> Result<(Product<'world>, String)> {
    let daemon = world.serve(name)?;
    world.throttle(SLOW)?;
    let id = daemon.provision(request)?;
    daemon.populating(&id)?;
    Ok((daemon, id))
}

/// Cancels, and gives how many milliseconds it took until the daemon had no device open any more.
fn milliseconds_to_stop(world: &World, daemon: &Product<'_>, id: &str) -> Result<u64> {
    let (process, url) = (daemon.process.id()?, daemon.url(&format!("/api/v1/jobs/{id}")));
    let open = format!("ls -l /proc/{process}/fd | grep -q /dev/dm-");
    let stopped = world.vm.run_ok(&format!(
        "{open}
         begun=$(date +%s%3N)
         curl -sS --fail -X DELETE {url} >/dev/null
         while {open}; do sleep 0.02; done
         echo $(($(date +%s%3N) - begun))"
    ))?;
    Ok(stopped.parse()?)
}

fn a_cancel_removes_the_new_volume(world: &World) -> Result<()> {
    let (daemon, id) = populating_by(world, "cancel", &lasting(world)?)?;
    let milliseconds = milliseconds_to_stop(world, &daemon, &id)?;
    let job = daemon.job_ended(&id, JOB)?;
    ensure!(job["status"] == "cancelled" && job["details"].get("not_undone").is_none(), "{job:#}");
    ensure!(milliseconds < 1000, "the writer went on for {milliseconds} ms");
    ensure!(world.volumes()?.is_empty(), "{:?}", world.volumes()?);
    ensure!(daemon.delete(&format!("/api/v1/cancel/{id}"))?.status == 200, "cancelling twice is no error");
    Ok(())
}

fn a_cancel_keeps_the_reused_volume(world: &World) -> Result<()> {
    world.make_volume("web", "--size 96M")?;
    world.vm.run_ok("lvchange --addtag backup vg0/web")?;
    let uuid = world.fact("web", "lv_uuid")?;
    let (daemon, id) = populating_by(world, "keep", &lasting(world)?)?;
    let milliseconds = milliseconds_to_stop(world, &daemon, &id)?;
    let job = daemon.job_ended(&id, JOB)?;
    ensure!(milliseconds < 1000, "the writer went on for {milliseconds} ms");
    ensure!(job["status"] == "cancelled", "{job:#}");
    let said = job["details"]["not_undone"].to_string();
    ensure!(said.contains("partly overwritten") && said.contains("web"), "{job:#}");
    ensure!(world.fact("web", "lv_uuid")? == uuid && world.tags("web")? == ["backup"], "{:?}", world.tags("web")?);
    ensure!(world.content("web")? == world.content("web")?, "something writes on");
    // It is complete after the next provision.
    world.unthrottle()?;
    daemon.completed(&world.publish(&world.large)?.onto("web", "96M"))?;
    world.expect_image("/dev/vg0/web", &world.large)
}

/// Waits until a job downloads.
fn downloading(daemon: &Product<'_>, id: &str) -> Result<()> {
    let begun = |job: &Value| {
        job["progress"]["stage"] == "downloading" && job["progress"]["bytes_processed"].as_u64() > Some(0)
    };
    daemon.job_when(id, JOB, begun).map(drop)
}

fn a_cancel_of_a_download_leaves_nothing(world: &World) -> Result<()> {
    let daemon = world.serve("unwanted")?;
    let id = daemon.provision(&lasting(world)?)?;
    downloading(&daemon, &id)?;
    ensure!(daemon.delete(&format!("/api/v1/jobs/{id}"))?.status == 200);
    ensure!(daemon.job_ended(&id, JOB)?["status"] == "cancelled");
    let (volumes, cached) = (world.volumes()?, world.cached("unwanted")?);
    ensure!(volumes.is_empty() && cached.is_empty(), "left: {volumes:?} {cached:?}");
    Ok(())
}

/// Its bytes are gone since the attempt before, whatever this one has done.
fn a_volume_that_an_attempt_before_wrote_to_is_said_to_be(world: &World) -> Result<()> {
    world.make_volume("web", "--size 80M")?;
    let (daemon, id) = waiting_at(world, "begun-before", "vg0", "populate.written")?;
    daemon.process.kill_9()?;
    drop(daemon);
    let environment = world.environment("begun-before");
    let daemon = world.serve_faulty("begun-before", &environment, "volume.untagged=1*return(error)")?;
    let job = daemon.job_ended(&id, JOB)?;
    ensure!(job["status"] == "failed" && job["error"].to_string().contains("a test made volume.untagged fail"));
    let left = job["details"]["not_undone"].to_string();
    ensure!(left.contains("volume web was there before and is partly overwritten"), "{job:#}");
    ensure!(world.fact("web", "lv_tags")?.is_empty(), "{}", world.fact("web", "lv_tags")?);
    Ok(())
}

/// It is another one than what the job began to overwrite, by the volume's own identifier.
fn a_volume_of_the_name_of_one_that_was_begun_is_left_alone(world: &World) -> Result<()> {
    world.make_volume("web", "--size 80M")?;
    let (daemon, id) = waiting_at(world, "begun-other", "vg0", "populate.written")?;
    daemon.process.kill_9()?;
    drop(daemon);
    world.vm.run_ok("udevadm settle; lvrename --quiet vg0 web web-old")?;
    world.make_volume("web", "--size 80M")?;
    let before = world.content("web")?;
    // One that is not active can be told from another only when it is.
    for state in ["y", "n"] {
        world.vm.run_ok(&format!("udevadm settle; lvchange --quiet --activate {state} vg0/web"))?;
        let daemon = world.serve("begun-other")?;
        let job = daemon.job_ended(&id, JOB)?;
        ensure!(job["status"] == "failed" && job["error_code"] == "file_in_the_way", "{job:#}");
        let left = job["details"]["not_undone"].to_string();
        ensure!(left.contains("volume web-old, which was called web when the job began"), "{job:#}");
        ensure!(world.fact("web", "lv_active")?.is_empty() == (state == "n"), "it is not as it was");
        daemon.process.stop()?;
        world.vm.run_ok(
            "sqlite3 /var/lib/lvp-begun-other/jobs.db \"UPDATE jobs SET status = 'running', finished_at = NULL, error = NULL\"",
        )?;
    }
    world.vm.run_ok("lvchange --quiet --activate y vg0/web")?;
    ensure!(world.content("web")? == before && world.fact("web", "lv_tags")?.is_empty(), "it was touched");
    Ok(())
}

/// After the daemon ended in the middle: the same job goes on after its start, and the volume is right.
fn expect_resumed(world: &World, daemon: &Product<'_>, id: &str) -> Result<()> {
    world.unthrottle()?;
    daemon.start_again()?;
    let job = daemon.job_completed(id, JOB)?;
    ensure!(job["cache_hit"] == false, "the job as a whole had to download: {job:#}");
    ensure!(world.volumes()? == ["web"], "{:?}", world.volumes()?);
    world.expect_image("/dev/vg0/web", &world.large)
}

fn a_killed_job_resumes_and_completes(world: &World) -> Result<()> {
    let (daemon, id) = populating(world, "killed")?;
    daemon.process.kill_9()?;
    expect_resumed(world, &daemon, &id)?;
    ensure!(world.tags("web")?.contains(&format!("lvp.job={id}")), "{:?}", world.tags("web")?);
    Ok(())
}

fn a_killed_job_on_a_reused_volume_resumes(world: &World) -> Result<()> {
    world.make_volume("web", "--size 96M")?;
    let uuid = world.fact("web", "lv_uuid")?;
    let (daemon, id) = populating(world, "again")?;
    daemon.process.kill_9()?;
    expect_resumed(world, &daemon, &id)?;
    ensure!(world.fact("web", "lv_uuid")? == uuid, "the volume was made anew");
    Ok(())
}

fn a_killed_download_resumes_and_completes(world: &World) -> Result<()> {
    let daemon = world.serve("broken")?;
    let id = daemon.provision(&lasting(world)?)?;
    downloading(&daemon, &id)?;
    daemon.process.kill_9()?;
    expect_resumed(world, &daemon, &id)?;
    let left = world.cached("broken")?;
    ensure!(!left.iter().any(|file| file.ends_with(".partial")), "{left:?}");
    Ok(())
}

fn a_job_to_be_cancelled_when_killed_is_taken_back(world: &World) -> Result<()> {
    let (daemon, id) = populating_by(world, "both", &lasting(world)?)?;
    let (process, url) = (daemon.process.id()?, daemon.url(&format!("/api/v1/jobs/{id}")));
    world.vm.run_ok(&format!("curl -sS --fail -X DELETE {url} >/dev/null; kill -KILL {process}"))?;
    world.vm.run_ok(&format!("while systemctl is-active --quiet {}; do sleep 0.05; done", daemon.process.unit()))?;
    ensure!(world.volumes()? == ["web"], "it was taken back before the daemon was killed");
    world.unthrottle()?;
    daemon.start_again()?;
    let job = daemon.job_ended(&id, JOB)?;
    ensure!(job["status"] == "cancelled", "{job:#}");
    ensure!(world.volumes()?.is_empty(), "{:?}", world.volumes()?);
    Ok(())
}

fn a_stopped_daemon_resumes_its_job(world: &World) -> Result<()> {
    let (daemon, id) = populating(world, "stopped")?;
    // The second signal ends the time that running jobs have.
    let process = daemon.process.id()?;
    world.vm.run_ok(&format!("kill -TERM {process}; sleep 0.2; kill -TERM {process}"))?;
    world.vm.run_ok(&format!("while systemctl is-active --quiet {}; do sleep 0.05; done", daemon.process.unit()))?;
    ensure!(daemon.process.log()?.contains("will be resumed"), "{}", daemon.process.log()?);
    expect_resumed(world, &daemon, &id)
}

fn a_job_survives_a_power_cut(world: &World) -> Result<()> {
    let (daemon, id) = populating(world, "power")?;
    world.vm.kill_power()?;
    world.vm.boot_again()?;
    expect_resumed(world, &daemon, &id)
}
