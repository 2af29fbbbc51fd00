//! The engine's own suite for volume backends, on LVM.

use std::{env, path::PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::bed::World;

use crate::{JOB, Scenario};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[("thick_and_thin_volumes_conform", thick_and_thin_volumes_conform)];

/// Where the engine's tests are in the machine.
const TESTS: &str = "/var/lib/bed/engine-tests";

fn thick_and_thin_volumes_conform(world: &World) -> Result<()> {
    let tests = env::var_os("TEST_BED_ENGINE_TESTS").map(PathBuf::from);
    let tests = tests.context("TEST_BED_ENGINE_TESTS does not name the engine's tests; scripts/e2e builds them")?;
    world.vm.copy_in(&tests, TESTS)?;
    let ran = world.vm.run_ok_within(
        JOB,
        &format!(
            "chmod 755 {TESTS}
             TEST_BED_TARGETS=vg0,vg0/pool0 {TESTS} volume::lvm::tests::conforms_on_real_lvm --exact
             rm {TESTS}"
        ),
    )?;
    ensure!(ran.contains("1 passed"), "the suite did not run: {ran}");
    ensure!(world.volumes()?.is_empty(), "left: {:?}", world.volumes()?);
    Ok(())
}
