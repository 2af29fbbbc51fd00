//! Linked volumes under libvirt: domains read their base as the user that libvirt runs them as, under its confinement.

use anyhow::{Context, Result, ensure};
use e2e::bed::{World, set};
use serde_json::Value;

use crate::Scenario;

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[("two_domains_start_from_one_base", two_domains_start_from_one_base)];

/// Where the volumes are; domains must get there, so it is in nobody's private directory.
const VOLUMES: &str = "/var/lib/lvp-linked-volumes";

fn two_domains_start_from_one_base(world: &World) -> Result<()> {
    let configuration = "/var/lib/lvp-linked.toml";
    let target = format!("[targets.linked]\nkind = 'dir'\npath = '{VOLUMES}'\nformat = 'qcow2'\nlinked = true\n");
    world.vm.write(configuration, target.as_bytes())?;
    let mut environment = world.environment("linked");
    set(&mut environment, "LVP_CONFIG", Some(configuration));
    let daemon = world.serve_in("linked", &environment)?;
    let published = world.publish(&world.small)?;
    for name in ["web-1", "web-2"] {
        let mut order = published.onto(name, "80M");
        order["target"] = "linked".into();
        let job = daemon.completed(&order)?;
        ensure!(job["receipt"]["linked_to"].is_string(), "{job:#}");
        world.paused_domain_on(name, &format!("{VOLUMES}/{name}.qcow2"), "qcow2")?;
        let state = world.vm.run_ok(&format!("virsh domstate {name}"))?;
        ensure!(state == "paused", "{state}");
    }
    let owner = world.vm.run_ok(&format!("stat --format='%U %a' {VOLUMES}/.lvp-*.base"))?;
    ensure!(owner == "libvirt-qemu 400", "the base has {owner}");

    let base = daemon.get("/api/v1/bases")?.json()?;
    let digest = base[0]["image_digest"].as_str().context("no base")?.to_owned();
    let refused = daemon.delete(&format!("/api/v1/images/{digest}"))?.json()?;
    ensure!(refused["error"] == "image_in_use" && base[0]["linked_volumes"] == 2, "{refused:#}");
    let volume = "/api/v1/volumes/web-1/verify?target=linked";
    let refused = daemon.post(volume, &Value::Null)?.json()?;
    ensure!(refused["error"] == "volume_in_use", "{refused:#}");
    world.vm.run_ok("virsh destroy web-1; virsh destroy web-2")?;
    let verified = daemon.post(volume, &Value::Null)?.json()?;
    ensure!(verified["intact"] == true, "{verified:#}");
    let raw = format!("{VOLUMES}/web-1.raw");
    world.vm.run_ok(&format!("qemu-img convert -O raw {VOLUMES}/web-1.qcow2 {raw}"))?;
    world.expect_image(&raw, &world.small)
}
