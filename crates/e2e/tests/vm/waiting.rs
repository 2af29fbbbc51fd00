//! Jobs that wait at a point of the code until a scenario has changed the world around them.
//!
//! It leaves out what is changed. The points are those of `fault.rs` of lvp's engine.

use anyhow::{Result, ensure};
use e2e::{
    bed::{World, set},
    product::Product,
};
use serde_json::Value;
use xtask::process::until;

use crate::JOB;

/// Where a job that waits at a point says so.
pub const WAIT: &str = "/run/lvp-wait";

/// A daemon on this group whose jobs wait at a point, and a job that waits there.
pub fn waiting_at<'world>(
    world: &'world World,
    name: &str,
    group: &str,
    point: &str,
) -> Result<(Product<'world>, String)> {
    let mut environment = world.environment(name);
    set(&mut environment, "LVM_VOLUME_GROUP", Some(group));
    let request = world.publish(&world.small)?.onto("web", "80M");
    waiting_in(world, name, &environment, point, &request)
}

pub fn waiting_in<'world>(
    world: &'world World,
    name: &str,
    environment: &[(String, String)],
    point: &str,
    request: &Value,
) -> Result<(Product<'world>, String)> {
    world.vm.run_ok(&format!("rm -f {WAIT}"))?;
    let daemon = world.serve_faulty(name, environment, &format!("{point}=1*return(wait:{WAIT})"))?;
    let id = daemon.provision(request)?;
    comes_to(world, &daemon, &id, point)?;
    Ok((daemon, id))
}

fn comes_to(world: &World, daemon: &Product<'_>, id: &str, point: &str) -> Result<()> {
    let waits =
        until(JOB, || world.vm.run(&format!("test -e {WAIT}")).is_ok_and(|found| found.code == 0).then_some(()));
    ensure!(waits.is_some(), "the job did not come to {point}: {:#}", daemon.job(id)?);
    Ok(())
}

/// A daemon whose job waits at `first`, and then, let go on by [`go_to_the_next`], at `second`.
pub fn waiting_twice<'world>(
    world: &'world World,
    name: &str,
    first: &str,
    second: &str,
) -> Result<(Product<'world>, String)> {
    let request = world.publish(&world.small)?.onto("web", "80M");
    let points = format!("{first}=1*return(wait:{WAIT});{second}");
    waiting_in(world, name, &world.environment(name), &points, &request)
}

/// Lets the job go on until it waits at this point.
pub fn go_to_the_next(world: &World, daemon: &Product<'_>, id: &str, point: &str) -> Result<()> {
    world.vm.run_ok(&format!("rm {WAIT}"))?;
    comes_to(world, daemon, id, point)
}

/// Lets the job go on; gives it as it ended.
pub fn go_on(world: &World, daemon: &Product<'_>, id: &str) -> Result<Value> {
    world.vm.run_ok(&format!("rm {WAIT}"))?;
    let job = daemon.job_ended(id, JOB)?;
    ensure!(daemon.get("/livez")?.status == 200, "the daemon does not answer");
    Ok(job)
}
