//! Looks at everything that jobs need, and says for each what was seen and what to do.

use std::sync::Arc;

use lvp_api::{ByteSize, Check, Health, HealthStatus};

use crate::{
    error::Result,
    host::libvirt::Libvirt,
    job::Store,
    provision::{Left, Services},
    task::blocking,
    volume::Target,
};

/// Less free space than this part of the whole deserves attention.
const LITTLE_SPACE: u64 = 20;

/// The health now.
pub async fn look(
    services: &Arc<Services>,
    store: &Store,
    libvirt_required: bool,
    active: usize,
    leftovers: &[Left],
) -> Health {
    let mut checks =
        vec![check("database", store.check().await.map(|()| (HealthStatus::Healthy, "usable".to_owned())))];
    checks.push(services.images.check().await);
    if let Some(libvirt) = services.libvirt.clone() {
        checks.push(libvirt_check(libvirt, libvirt_required).await);
    }
    match services.targets.all() {
        Ok(targets) if targets.is_empty() => checks.push(Check {
            name: "target:default".to_owned(),
            status: HealthStatus::Degraded,
            message: "no target is configured".to_owned(),
            hint: Some("set LVM_VOLUME_GROUP, or configure [targets.default]".to_owned()),
        }),
        Ok(targets) => {
            for (name, target) in targets {
                checks.push(target_check(&name, target).await);
            }
        }
        Err(error) => checks.push(check("targets", Err(error))),
    }
    checks.extend(leftovers_check(leftovers));
    let pending = store.count_pending().await;
    Health {
        status: checks.iter().map(|check| check.status).max().unwrap_or(HealthStatus::Healthy),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        active_jobs: active as u64,
        pending_jobs: pending.map_or(0, u64::from),
        checks,
    }
}

/// A check from what was seen.
pub fn check(name: &str, seen: Result<(HealthStatus, String)>) -> Check {
    match seen {
        Ok((status, message)) => Check { name: name.to_owned(), status, message, hint: None },
        Err(error) => {
            let body = error.to_body();
            Check { name: name.to_owned(), status: HealthStatus::Unhealthy, message: body.message, hint: body.hint }
        }
    }
}

async fn libvirt_check(libvirt: Libvirt, required: bool) -> Check {
    let seen = blocking(move || {
        libvirt.version().map(|version| (HealthStatus::Healthy, format!("libvirt {version} answers")))
    })
    .await;
    let mut check = check("libvirt", seen);
    if check.status == HealthStatus::Unhealthy && !required {
        check.status = HealthStatus::Degraded;
    }
    check
}

/// Nothing where nothing is left. What has its time yet may be what another daemon works on.
fn leftovers_check(leftovers: &[Left]) -> Option<Check> {
    let messages: Vec<&str> = leftovers.iter().map(|left| left.message.as_str()).collect();
    let is_due = leftovers.iter().any(|left| left.is_due);
    (!messages.is_empty()).then(|| Check {
        name: "leftovers".to_owned(),
        status: if is_due { HealthStatus::Degraded } else { HealthStatus::Healthy },
        message: messages.join("; "),
        hint: Some(
            "what nobody uses is removed, of an unknown job after leftover_grace; `lvp volume release` keeps a volume for good"
                .to_owned(),
        ),
    })
}

async fn target_check(name: &str, target: Target) -> Check {
    let label = target.backend.label();
    let seen = blocking(move || target.backend.space()).await.map(|space| {
        let status =
            if space.free < space.total / LITTLE_SPACE { HealthStatus::Degraded } else { HealthStatus::Healthy };
        (status, format!("{label}: {} of {} free", ByteSize(space.free), ByteSize(space.total)))
    });
    check(&format!("target:{name}"), seen)
}
