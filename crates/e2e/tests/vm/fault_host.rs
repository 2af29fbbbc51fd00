//! Hosts that fail under a running job: libvirt that is away or hangs, memory that is used up, a clock that is set, power
//! that goes.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::{
    bed::{BINARY, World, set},
    product::Product,
};
use serde_json::Value;

use crate::{JOB, Scenario};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("without_libvirt_nothing_that_was_there_is_overwritten", without_libvirt_nothing_is_overwritten),
    ("a_libvirt_that_hangs_ends_the_job_and_not_the_daemon", a_libvirt_that_hangs_ends_the_job),
    ("a_libvirt_that_restarts_is_no_failure", a_libvirt_that_restarts_is_no_failure),
    ("a_job_is_resumed_after_memory_ran_out", a_job_is_resumed_after_memory_ran_out),
    ("a_clock_that_is_set_changes_nothing", a_clock_that_is_set_changes_nothing),
    ("a_binary_replaced_in_the_middle_of_jobs_loses_none", a_binary_replaced_in_the_middle_of_jobs),
    ("what_was_reported_complete_survives_a_power_cut", what_was_reported_complete_survives_a_power_cut),
];

fn request(world: &World, volume: &str) -> Result<Value> {
    Ok(world.publish(&world.small)?.onto(volume, "80M"))
}

/// A volume that was there, and a daemon; asked to overwrite it while libvirt cannot be asked, the job fails so.
fn expect_untouched(world: &World, name: &str) -> Result<()> {
    let before = world.content("web")?;
    let daemon = world.serve(name)?;
    let job = daemon.failed(&request(world, "web")?, "libvirt_unavailable")?;
    ensure!(job["retryable"] == true && world.content("web")? == before, "{job:#}");
    ensure!(daemon.get("/livez")?.status == 200);
    Ok(())
}

const LIBVIRT: &str = "libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket";

fn without_libvirt_nothing_is_overwritten(world: &World) -> Result<()> {
    world.make_volume("web", "--size 80M")?;
    world.vm.run_ok(&format!("systemctl stop {LIBVIRT}"))?;
    let outcome = expect_untouched(world, "away");
    world.vm.run_ok("systemctl start libvirtd.socket libvirtd.service")?;
    outcome
}

fn a_libvirt_that_hangs_ends_the_job(world: &World) -> Result<()> {
    world.make_volume("web", "--size 80M")?;
    let daemon = world.serve("hangs")?;
    let before = world.content("web")?;
    world.vm.run_ok("systemctl kill --signal=STOP libvirtd.service")?;
    let ended = daemon.provision(&request(world, "web")?).and_then(|id| daemon.job_ended(&id, JOB));
    let asked = asked_often(world, &daemon);
    world.vm.run_ok("systemctl kill --signal=CONT libvirtd.service")?;
    let (before_it, after_it) = asked?;
    ensure!(after_it <= before_it + 8, "descriptors of who is asked often: {before_it}, then {after_it}");
    let job = ended?;
    ensure!(job["error_code"] == "libvirt_unavailable" && job["retryable"] == true, "{job:#}");
    ensure!(world.content("web")? == before, "the volume was touched");
    daemon.completed(&request(world, "web")?)?;
    world.expect_image("/dev/vg0/web", &world.small)
}

/// How many descriptors the daemon has before many ask at once whether it is well, and after.
fn asked_often(world: &World, daemon: &Product<'_>) -> Result<(usize, usize)> {
    let count =
        || -> Result<usize> { Ok(world.vm.run_ok("ls /proc/$(pgrep --exact lvp)/fd | wc -l")?.trim().parse()?) };
    let before = count()?;
    let ask = format!("curl --silent --output /dev/null --max-time 50 {} || true", daemon.url("/health"));
    world.vm.run_ok_within(JOB, &format!("for number in $(seq 24); do ({ask}) & done; wait"))?;
    Ok((before, count()?))
}

fn a_libvirt_that_restarts_is_no_failure(world: &World) -> Result<()> {
    world.make_volume("web", "--size 80M")?;
    let daemon = world.serve("restarts")?;
    world.vm.run_ok("systemctl restart libvirtd.service")?;
    daemon.completed(&request(world, "web")?)?;
    world.expect_image("/dev/vg0/web", &world.small)
}

/// A daemon with a job that writes the large image to the volume `web`, slowly.
fn writing<'world>(world: &'world World, name: &str) -> Result<(Product<'world>, String)> {
    let mut request = world.publish(&world.large)?.onto("web", "96M");
    request["limit_rate"] = "4M".into();
    let daemon = world.serve(name)?;
    let id = daemon.provision(&request)?;
    daemon.job_when(&id, JOB, |job| job["progress"]["bytes_processed"].as_u64() > Some(0))?;
    Ok((daemon, id))
}

fn a_job_is_resumed_after_memory_ran_out(world: &World) -> Result<()> {
    let (daemon, id) = writing(world, "memory")?;
    // Less than it has: the kernel ends it, as it does when the host has no more.
    let unit = daemon.process.unit();
    world.vm.run_ok(&format!(
        "systemctl set-property --runtime {unit} MemoryMax=1M MemorySwapMax=0 || true
         while systemctl is-active --quiet {unit}; do sleep 0.1; done; dmesg | tail -n 100 | grep -qi 'killed process'"
    ))?;
    daemon.start_again()?;
    daemon.job_completed(&id, JOB)?;
    world.expect_image("/dev/vg0/web", &world.large)
}

fn a_clock_that_is_set_changes_nothing(world: &World) -> Result<()> {
    let (daemon, id) = writing(world, "clock")?;
    world.vm.run_ok("date --set '+3 minutes' >/dev/null")?;
    let job = daemon.job_ended(&id, JOB);
    world.vm.run_ok("date --set '-3 minutes' >/dev/null")?;
    let job = job?;
    ensure!(job["status"] == "completed" && job["started_at"].as_str() < job["finished_at"].as_str(), "{job:#}");
    world.expect_image("/dev/vg0/web", &world.large)?;
    // What was made in the future is no leftover of the past.
    daemon.process.kill_9()?;
    daemon.start_again()?;
    daemon.completed(&request(world, "web-2")?)?;
    ensure!(world.volumes()? == ["web", "web-2"], "{:?}", world.volumes()?);
    Ok(())
}

fn a_binary_replaced_in_the_middle_of_jobs(world: &World) -> Result<()> {
    const PROGRAM: &str = "/opt/upgraded/lvp";
    // Another build, as an older version is.
    let older = world.faulty_binary()?;
    world.vm.run_ok(&format!("install -D -m 755 {older} {PROGRAM}"))?;
    let mut environment = world.environment("upgraded");
    set(&mut environment, "LVP_STOP_GRACE", Some("1s"));
    let daemon = Product::start_program(&world.vm, "upgraded", &environment, PROGRAM)?;
    let published = world.publish(&world.small)?;
    let mut ids = Vec::new();
    for number in 0..3 {
        let mut request = published.onto(&format!("web-{number}"), "80M");
        request["limit_rate"] = "1M".into();
        ids.push(daemon.provision(&request)?);
    }
    daemon.job_when(&ids[0], JOB, |job| job["progress"]["bytes_processed"].as_u64() > Some(0))?;
    // As a package does it: the file is replaced under the running daemon, which is then started again.
    world.vm.run_ok(&format!("install -m 755 {BINARY} {PROGRAM}.new; mv {PROGRAM}.new {PROGRAM}"))?;
    daemon.process.stop()?;
    daemon.start_again()?;
    for (number, id) in ids.iter().enumerate() {
        daemon.job_completed(id, JOB)?;
        world.expect_image(&format!("/dev/vg0/web-{number}"), &world.small)?;
    }
    world.vm.run_ok("rm -r /opt/upgraded").map(drop)
}

/// How often the power is cut.
const CUTS: u64 = 20;

/// At moments that a generator chooses, and says: from the submission to a while after a usual job's end.
fn what_was_reported_complete_survives_a_power_cut(world: &World) -> Result<()> {
    let seed = std::env::var("FAULTS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
    let mut random = fastrand::Rng::with_seed(seed);
    let published = world.publish(&world.small)?;
    for cut in 0..CUTS {
        let volume = format!("web-{cut}");
        let daemon = world.serve("cut")?;
        let id = daemon.provision(&published.onto(&volume, "80M"))?;
        let moment = Duration::from_millis(random.u64(0..8000));
        let begun = Instant::now();
        let mut reported = Value::Null;
        while begun.elapsed() < moment && reported["status"] != "completed" {
            reported = daemon.job(&id)?;
        }
        world.vm.kill_power()?;
        world.vm.boot_again()?;
        eprintln!("cut {cut}: {} ms, {}", begun.elapsed().as_millis(), reported["status"]);
        if reported["status"] == "completed" {
            world.expect_image(&format!("/dev/vg0/{volume}"), &world.small)?;
        }
        let daemon = world.serve("cut")?;
        let job = daemon.job_completed(&id, JOB)?;
        ensure!(reported["status"] != "completed" || reported["finished_at"] == job["finished_at"], "{job:#}");
        world.expect_image(&format!("/dev/vg0/{volume}"), &world.small)?;
        let cached = world.cached("cut")?;
        ensure!(cached.iter().all(|file| !file.contains(".partial")), "{cached:?}");
        daemon.process.stop()?;
    }
    Ok(())
}
