//! Courtesy to guests: a copy goes slower while they wait for their disks. It prints what that is worth to a guest, and what
//! it costs the copy.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use e2e::bed::{World, set};

use crate::Scenario;

/// The scenarios.
pub const SCENARIOS: &[Scenario] =
    &[("a_copy_goes_slower_while_guests_wait_for_their_disks", a_copy_goes_slower_while_guests_wait)];

/// What the disk of the volume group writes, in bytes a second, for guests and copies together.
const DISK: u64 = 8 << 20;
/// How long the guest is watched alone.
const ALONE: Duration = Duration::from_secs(5);

/// A program in the guests' slice that writes a block and waits for it, over and over, as a database in a guest does.
struct Guest<'world> {
    world: &'world World,
}

impl<'world> Guest<'world> {
    fn start(world: &'world World) -> Result<Self> {
        world.make_volume("guest", "--size 64M")?;
        world.vm.run_ok(
            "systemd-run --quiet --slice=machine.slice --unit=guest --property=IOAccounting=yes -- \
             sh -c 'while dd if=/dev/zero of=/dev/vg0/guest bs=64k count=1000 oflag=direct,dsync status=none; do :; done'",
        )?;
        Ok(Self { world })
    }

    /// What it wrote so far, in bytes.
    fn written(&self) -> Result<u64> {
        let told = self.world.vm.run_ok("systemctl show --property=IOWriteBytes --value guest")?;
        told.parse().with_context(|| format!("systemctl says {told}"))
    }

    /// What it writes in a second, while something is done.
    fn speed_while<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(f64, f64, T)> {
        let (begun, before) = (Instant::now(), self.written()?);
        let done = work()?;
        let (written, seconds) = (self.written()? - before, begun.elapsed().as_secs_f64());
        Ok((written as f64 / seconds, seconds, done))
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        let _ = self.world.vm.run("systemctl kill --signal=KILL guest; systemctl stop guest");
    }
}

/// What it writes in a second beside a copy, as a part of what it writes alone; and how long the copy took.
fn beside_a_copy(world: &World, guest: &Guest<'_>, name: &str, limit: Option<&str>, alone: f64) -> Result<(f64, f64)> {
    let published = world.publish(&world.large)?;
    let mut environment = world.environment(name);
    set(&mut environment, "LVP_IO_PRESSURE_LIMIT", limit);
    let daemon = world.serve_in(name, &environment)?;
    let (beside, seconds, _) = guest.speed_while(|| daemon.completed(&published.onto(name, "96M")))?;
    eprintln!("beside a copy, {name}: {:.2} of that; the copy took {seconds:.0} s", beside / alone);
    let slowed = daemon.process.log()?.contains("copies go slower");
    ensure!(slowed == limit.is_some(), "{}", daemon.process.log()?);
    Ok((beside / alone, seconds))
}

fn a_copy_goes_slower_while_guests_wait(world: &World) -> Result<()> {
    let guest = Guest::start(world)?;
    world.throttle(DISK)?;
    let (alone, ..) = guest.speed_while(|| {
        thread::sleep(ALONE);
        Ok(())
    })?;
    eprintln!("the guest alone: {:.0} KiB/s", alone / 1024.0);
    let (rude, fast) = beside_a_copy(world, &guest, "rude", None, alone)?;
    let (polite, slow) = beside_a_copy(world, &guest, "polite", Some("20"), alone)?;
    ensure!(
        polite > rude && slow > fast,
        "the guest had {rude:.2} and {polite:.2}, the copies {fast:.0} s and {slow:.0} s"
    );
    drop(guest);
    world.unthrottle()?;
    world.expect_image("/dev/vg0/polite", &world.large)
}
