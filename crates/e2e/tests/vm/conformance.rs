//! The engine's own tests of volumes and bases, on LVM.

use std::{env, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use e2e::bed::World;

use crate::Scenario;

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[("volumes_and_bases_on_lvm", volumes_and_bases_on_lvm)];

/// Where the engine's tests are in the machine.
const TESTS: &str = "/var/lib/bed/engine-tests";

/// The module of them that needs LVM, and how many there are at least, so that a changed name cannot leave them out.
const MODULE: &str = "volume::lvm::tests::real::";
const AT_LEAST: usize = 10;
/// What all of them may take in the emulated machine.
const ALL: Duration = Duration::from_secs(900);

fn volumes_and_bases_on_lvm(world: &World) -> Result<()> {
    let tests = env::var_os("TEST_BED_ENGINE_TESTS").map(PathBuf::from);
    let tests = tests.context("TEST_BED_ENGINE_TESTS does not name the engine's tests; scripts/e2e builds them")?;
    world.vm.copy_in(&tests, TESTS)?;
    let ran = world.vm.run_within(ALL, &format!("chmod 755 {TESTS}; {TESTS} {MODULE} --test-threads 1 2>&1"))?;
    world.vm.run_ok(&format!("rm {TESTS}"))?;
    ensure!(ran.code == 0, "{}{}", ran.stdout, ran.stderr);
    let passed = ran.stdout.matches(" ... ok").count();
    ensure!(passed >= AT_LEAST, "only {passed} tests ran: {}", ran.stdout);
    ensure!(world.volumes()?.is_empty(), "left: {:?}", world.volumes()?);
    Ok(())
}
