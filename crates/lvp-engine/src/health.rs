//! Looks at everything that jobs need, and says for each what was seen and what to do.

use std::{sync::Arc, time::Instant};

use lvp_api::{ByteSize, Check, Health, HealthStatus};
use tokio::sync::Mutex;

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

/// The last look at everything, and when it was begun.
#[derive(Debug, Clone, Default)]
pub struct Looks(Arc<Mutex<Option<(Instant, Health)>>>);

impl Looks {
    /// What a look sees that begins after this is called. However many ask, and however long something does not answer, one is
    /// under way at a time, and all who came meanwhile share the next. It goes on when who asked is gone.
    pub async fn share(&self, look: impl Future<Output = Health> + Send + 'static) -> Health {
        let asked = Instant::now();
        let mut last = Arc::clone(&self.0).lock_owned().await;
        if let Some((begun, seen)) = &*last
            && *begun >= asked
        {
            return seen.clone();
        }
        let begun = Instant::now();
        let looking = tokio::spawn(async move {
            let seen = look.await;
            *last = Some((begun, seen.clone()));
            seen
        });
        looking.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }
}

/// The health now.
pub async fn look(
    services: Arc<Services>,
    store: Store,
    libvirt_required: bool,
    active: usize,
    leftovers: Vec<Left>,
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
    checks.extend(leftovers_check(&leftovers));
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn probes_of_a_host_that_does_not_answer_are_few_questions() {
        let (looks, begun, answers) = (Looks::default(), Arc::<AtomicUsize>::default(), Arc::new(Semaphore::new(0)));
        let probe = || {
            let (looks, begun, answers) = (looks.clone(), Arc::clone(&begun), Arc::clone(&answers));
            tokio::spawn(async move {
                let look = async move {
                    begun.fetch_add(1, Ordering::SeqCst);
                    answers.acquire().await.unwrap().forget();
                    Health {
                        status: HealthStatus::Healthy,
                        version: String::new(),
                        active_jobs: 0,
                        pending_jobs: 0,
                        checks: Vec::new(),
                    }
                };
                looks.share(look).await
            })
        };
        // A balancer that gives up, again and again.
        for _ in 0..100 {
            let probe = probe();
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            probe.abort();
        }
        let probes: Vec<_> = (0..100).map(|_| probe()).collect();
        tokio::task::yield_now().await;
        assert_eq!(begun.load(Ordering::SeqCst), 1);
        // An answer for the one that is gone, and one for all who ask since.
        answers.add_permits(2);
        for probe in probes {
            assert_eq!(probe.await.unwrap().status, HealthStatus::Healthy);
        }
        assert_eq!(begun.load(Ordering::SeqCst), 2);
    }
}
