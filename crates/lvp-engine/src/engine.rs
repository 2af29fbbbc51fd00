//! [`Engine`]: the only door for front ends. It puts the parts together at the start and turns each question into calls
//! of them; it decides nothing itself.

mod start;

use std::{path::Path, sync::Arc, time::Duration};

use futures::{Stream, stream};
use lvp_api::{
    BaseVolume, ErrorCode, Health, Image, ImageVerification, Job, JobId, JobKind, JobList, JobStatus, Plan,
    PrefetchRequest, ProvisionRequest, Receipt, Submitted, Volume, VolumeName, VolumeVerification,
};
use tokio::{
    sync::{Mutex, Semaphore, watch},
    task::AbortHandle,
    time,
};

pub use self::start::Prepared;
use crate::{
    db,
    error::{Error, Result},
    health,
    host::lock::Lock,
    job::{Filter, NewJob, Runner, Store, Stored},
    progress::{Progress, Stop},
    provision::{self, Context, Left, Order, Services},
    settings::{Caller, EngineSettings},
    task::blocking,
    volume::{Tags, Target},
};

/// A watched job's progress is looked at this often.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// Plans that are made at once: each may keep a thread waiting for a slow source.
const PLANS: usize = 8;
/// Running jobs have this long to stop where they are at a shutdown.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(20);

/// The engine. Clones are the same one.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    services: Arc<Services>,
    runner: Runner<Context>,
    store: Store,
    /// Held by who reads a whole image for a caller.
    verifying: Mutex<()>,
    /// Places of the plans that are made at once.
    planning: Arc<Semaphore>,
    /// libvirt was asked for, or a target needs it: without it the daemon is not ready.
    libvirt_required: bool,
    /// How long running jobs may go on when it stops.
    stop_grace: Duration,
    /// What looks for leftovers, at the start and then every hour.
    sweeper: Option<AbortHandle>,
    /// What looks after the guests' pressure, as long as a job may run.
    courtesy: Option<AbortHandle>,
    /// What the last look found and left.
    leftovers: watch::Receiver<Vec<Left>>,
    /// The looks at its health.
    looks: health::Looks,
    _locks: [Lock; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.sweeper.iter().chain(&self.courtesy).for_each(AbortHandle::abort);
    }
}

impl Engine {
    /// Opens everything and begins at once.
    ///
    /// # Errors
    /// As [`Prepared::open`].
    pub async fn open(settings: EngineSettings) -> Result<Self> {
        Prepared::open(settings).await?.begin().await
    }

    /// Has a volume provisioned. The same idempotency key and request give the same job.
    pub async fn provision(
        &self,
        request: &ProvisionRequest,
        caller: Caller,
        idempotency_key: Option<String>,
    ) -> Result<Submitted> {
        let order = self.order(request, caller)?;
        self.submit(JobKind::Provision, &order, idempotency_key).await
    }

    /// What a provision would do; found out no longer than somebody waits for it.
    ///
    /// # Errors
    /// What the job would fail with; `queue_full` while so many others are made already.
    pub async fn plan(&self, request: &ProvisionRequest, caller: Caller) -> Result<Plan> {
        let order = self.order(request, caller)?;
        let place = Arc::clone(&self.inner.planning).try_acquire_owned().map_err(|_| too_many_plans())?;
        self.exclusive(&order).await?;
        self.refuse_unrecordable().await?;
        let receipts = self.receipts_beside(&order).await?;
        let (services, progress) = (Arc::clone(&self.inner.services), Progress::default());
        let _ends_with_the_caller = StopOnDrop(progress.clone());
        // In a task of its own, so that a plan has its place until its threads have let go, whenever its caller goes.
        let planning = tokio::spawn(async move {
            let _place = place;
            provision::plan(&services, &order, &receipts, &progress).await
        });
        planning.await.unwrap_or_else(|error| Err(Error::internal("a plan broke off").source(error)))
    }

    /// What was done last in the place of an order.
    async fn receipts_beside(&self, order: &Order) -> Result<Vec<Receipt>> {
        let Some(volume) = &order.volume else { return Ok(Vec::new()) };
        let key = self.target(Some(&volume.target), Caller::Administrator)?.exclusive_key(&volume.name);
        let place = key.strip_suffix(volume.name.as_str()).unwrap_or(&key).to_owned();
        let stored = self.inner.store.newest_receipts(place, provision::RECEIPTS).await?;
        Ok(stored.into_iter().filter_map(|receipt| serde_json::from_value(receipt).ok()).collect())
    }

    /// Has an image fetched into the cache.
    pub async fn prefetch(
        &self,
        request: &PrefetchRequest,
        caller: Caller,
        idempotency_key: Option<String>,
    ) -> Result<Submitted> {
        let order = Order::prefetch(request, &self.inner.services.sources, caller == Caller::Administrator)?;
        self.submit(JobKind::Prefetch, &order, idempotency_key).await
    }

    fn order(&self, request: &ProvisionRequest, caller: Caller) -> Result<Order> {
        let services = &self.inner.services;
        Order::provision(request, &services.sources, &services.targets, caller == Caller::Administrator)
    }

    async fn submit(&self, kind: JobKind, order: &Order, idempotency_key: Option<String>) -> Result<Submitted> {
        let exclusive = self.exclusive(order).await?;
        self.refuse_unrecordable().await?;
        let new = NewJob { kind, request: order.to_stored(), exclusive, idempotency_key };
        let (job_id, _) = self.inner.runner.submit(new).await?;
        Ok(Submitted { job_id })
    }

    /// What no two running jobs of this order's kind may share.
    ///
    /// # Errors
    /// `volume_in_use` in a command, when a job of the daemon is about the volume.
    async fn exclusive(&self, order: &Order) -> Result<String> {
        let Some(volume) = &order.volume else {
            // The cache itself sees to it that an image is fetched once.
            return Ok(format!("image:{}", uuid::Uuid::new_v4()));
        };
        let key = self.target(Some(&volume.target), Caller::Administrator)?.exclusive_key(&volume.name);
        self.inner.runner.refuse_left(&key, &format!("volume {}", volume.name)).await?;
        Ok(key)
    }

    async fn refuse_unrecordable(&self) -> Result<()> {
        let services = Arc::clone(&self.inner.services);
        blocking(move || services.keeping.refuse_unrecordable()).await
    }

    /// A job.
    pub async fn job(&self, id: JobId) -> Result<Job> {
        provision::view_job(self.inner.runner.get(id).await?)
    }

    /// Jobs, newest first, without those that cannot be read.
    pub async fn jobs(&self, status: Option<JobStatus>, before: Option<JobId>, limit: u32) -> Result<JobList> {
        let mut stored = self.inner.runner.list(Filter { status, before, limit: limit + 1 }).await?;
        let more = stored.len() > limit as usize;
        stored.truncate(limit as usize);
        let next = if more { stored.last().map(|stored| stored.id) } else { None };
        let view = |stored: Stored| {
            let id = stored.id;
            let told = |error: &Error| tracing::warn!(job_id = %id, error = %error.chain(), "a job cannot be shown");
            provision::view_job(stored).inspect_err(told).ok()
        };
        let jobs = stored.into_iter().filter_map(view).collect();
        Ok(JobList { jobs, next })
    }

    /// Cancels a job.
    pub async fn cancel(&self, id: JobId) -> Result<Job> {
        provision::view_job(self.inner.runner.cancel(id).await?)
    }

    /// A job whenever it changes, until it has ended.
    pub fn watch(&self, id: JobId) -> impl Stream<Item = Result<Job>> + Send + use<> {
        let engine = self.clone();
        let changes = self.inner.runner.changes();
        stream::unfold((engine, changes, None::<Job>, false), move |(engine, mut changes, last, ended)| async move {
            if ended {
                return None;
            }
            loop {
                if last.is_some() {
                    let _ = time::timeout(WATCH_INTERVAL, changes.changed()).await;
                }
                changes.mark_unchanged();
                match engine.job(id).await {
                    Ok(job) if last.as_ref() == Some(&job) => {}
                    Ok(job) => {
                        let ended = job.status.is_terminal();
                        return Some((Ok(job.clone()), (engine, changes, Some(job), ended)));
                    }
                    Err(error) => return Some((Err(error), (engine, changes, last, true))),
                }
            }
        })
    }

    /// The cached images.
    pub async fn images(&self) -> Result<Vec<Image>> {
        self.inner.services.images.list().await
    }

    /// A cached image, by name or digest.
    pub async fn image(&self, name: &str) -> Result<Image> {
        self.inner.services.images.show(name).await
    }

    /// Checks a cached image against its digest; one at a time, and no longer than somebody waits for it.
    pub async fn verify_image(&self, name: &str) -> Result<ImageVerification> {
        let _turn = self.inner.verifying.lock().await;
        let progress = Progress::default();
        let _ends_with_the_caller = StopOnDrop(progress.clone());
        let images = &self.inner.services.images;
        images.verify(&images.find(name).await?, &progress).await
    }

    /// Pins or unpins a cached image.
    pub async fn pin_image(&self, name: &str, pinned: bool) -> Result<Image> {
        self.inner.services.images.pin(name, pinned).await
    }

    /// The bases of all configured targets.
    pub async fn bases(&self) -> Result<Vec<BaseVolume>> {
        let services = Arc::clone(&self.inner.services);
        blocking(move || provision::all_bases(&services.targets)).await
    }

    /// Deletes a cached image and its bases; or the bases alone, of an image that is not cached any more.
    pub async fn delete_image(&self, name: &str) -> Result<()> {
        provision::delete_image(&self.inner.services, name).await
    }

    fn target(&self, text: Option<&str>, caller: Caller) -> Result<Target> {
        self.inner.services.targets.find(text, caller == Caller::Administrator)
    }

    /// The volumes of a target.
    pub async fn volumes(&self, target: Option<&str>, caller: Caller) -> Result<Vec<Volume>> {
        let target = self.target(target, caller)?;
        blocking(move || {
            let volumes = target.backend.list()?;
            Ok(volumes.into_iter().map(|volume| provision::view_volume(volume, &target)).collect())
        })
        .await
    }

    /// A volume, its receipt, and who uses it.
    pub async fn volume(&self, name: &str, target: Option<&str>, caller: Caller) -> Result<Volume> {
        let (name, target) = (volume_name(name)?, self.target(target, caller)?);
        let receipt = self.receipt(&target, &name).await?;
        let (libvirt, holder) =
            (self.inner.services.libvirt.clone(), self.inner.runner.holder(&target.exclusive_key(&name)).await?);
        blocking(move || {
            let volume = target.backend.find(&name)?.ok_or_else(|| no_volume(&name, &target))?;
            let mut users = holder.map(|holder| holder.to_string()).into_iter().collect::<Vec<_>>();
            match provision::users(&volume, libvirt.as_ref()) {
                Ok(found) => users.extend(found.iter().map(ToString::to_string)),
                Err(error) => users.push(format!("not known, because {}", error.chain())),
            }
            let in_use = (!users.is_empty()).then(|| users.join("; "));
            let receipt = provision::valid_receipt(&volume, receipt);
            Ok(Volume { in_use, receipt, ..provision::view_volume(volume, &target) })
        })
        .await
    }

    async fn receipt(&self, target: &Target, name: &VolumeName) -> Result<Option<Receipt>> {
        let stored = self.inner.store.receipt(target.exclusive_key(name)).await?;
        // One of a version that cannot be read any more is none.
        Ok(stored.and_then(|receipt| serde_json::from_value(receipt).ok()))
    }

    /// Checks a volume against its receipt; one at a time, and no longer than somebody waits for it.
    pub async fn verify_volume(&self, name: &str, target: Option<&str>, caller: Caller) -> Result<VolumeVerification> {
        let (name, target) = (volume_name(name)?, self.target(target, caller)?);
        self.refuse_held(&name, &target).await?;
        let _turn = self.inner.verifying.lock().await;
        // Who waits to write it waits for the verification under way, and not for all that are asked for.
        self.inner.runner.refuse_awaited(&target.exclusive_key(&name), &format!("volume {name}")).await?;
        // From here on no job changes what is compared: neither the volume nor its receipt.
        let _held = self.inner.runner.hold(&target.exclusive_key(&name), &format!("volume {name}")).await?;
        let receipt = self.receipt(&target, &name).await?;
        let progress = Progress::default();
        let _ends_with_the_caller = StopOnDrop(progress.clone());
        let format = target.format;
        let volume = blocking(move || {
            provision::find_settled(&*target.backend, &name)?.ok_or_else(|| no_volume(&name, &target))
        });
        provision::verify_volume(&self.inner.services, volume.await?, format, receipt, &progress).await
    }

    /// Refuses a volume that a job works on.
    async fn refuse_held(&self, name: &VolumeName, target: &Target) -> Result<()> {
        let holder = self.inner.runner.holder(&target.exclusive_key(name)).await?;
        holder.map_or(Ok(()), |holder| Err(holder.refusal(&format!("volume {name}"))))
    }

    /// Takes a volume over, which counts as made by lvp from then on. Once more is no error. One that a job left incomplete is
    /// the job's no more, and no leftover: who takes it over says that it is to stay.
    pub async fn adopt_volume(&self, name: &str, target: Option<&str>, caller: Caller) -> Result<Volume> {
        let adopted = |tags: Tags| {
            let job = tags.job.filter(|_| !tags.incomplete);
            Tags { made_by_lvp: true, job, incomplete: false, image: tags.image }
        };
        self.tag_volume(name, target, caller, adopted).await
    }

    /// Gives a volume up: takes off it what lvp wrote, so that lvp will not remove it.
    pub async fn release_volume(&self, name: &str, target: Option<&str>, caller: Caller) -> Result<Volume> {
        self.tag_volume(name, target, caller, |_| Tags::default()).await
    }

    /// Changes whose a volume is, which only an administrator may.
    async fn tag_volume(
        &self,
        name: &str,
        target: Option<&str>,
        caller: Caller,
        change: fn(Tags) -> Tags,
    ) -> Result<Volume> {
        if caller != Caller::Administrator {
            let error =
                Error::new(ErrorCode::NotPermitted, "whose a volume is may be changed by an administrator only");
            return Err(error.hint("use the Unix socket, as `lvp volume` does on the host itself"));
        }
        let (name, target) = (volume_name(name)?, self.target(target, caller)?);
        let held = self.inner.runner.hold(&target.exclusive_key(&name), &format!("volume {name}")).await?;
        blocking(move || {
            let _held = held;
            // What is no volume of its own, as a thin pool or a base, is not in the list.
            let found = target.backend.list()?.into_iter().find(|volume| volume.name == name);
            let volume = found.ok_or_else(|| no_volume(&name, &target))?;
            target.backend.set_tags(&volume, &change(volume.tags.clone()))?;
            let volume = target.backend.find(&name)?.ok_or_else(|| no_volume(&name, &target))?;
            Ok(provision::view_volume(volume, &target))
        })
        .await
    }

    /// Deletes a volume that lvp made and nothing uses.
    pub async fn delete_volume(&self, name: &str, target: Option<&str>, force: bool, caller: Caller) -> Result<()> {
        let (name, target) = (volume_name(name)?, self.target(target, caller)?);
        let held = self.inner.runner.hold(&target.exclusive_key(&name), &format!("volume {name}")).await?;
        let libvirt = self.inner.services.libvirt.clone();
        blocking(move || {
            // No job begins with it before this has ended, also when the caller has gone.
            let _held = held;
            let volume = provision::find_settled(&*target.backend, &name)?.ok_or_else(|| no_volume(&name, &target))?;
            if volume.tags.made_by_lvp {
                if !force {
                    return Err(Error::new(
                        ErrorCode::ForceRequired,
                        format!("deleting volume {name} loses its content"),
                    )
                    .hint("say force=true (on the command line: --force)"));
                }
                provision::refuse_in_use(&volume, libvirt.as_ref())?;
            }
            // Refuses what lvp did not make, whoever uses it: a thin pool has no device to be asked about.
            target.backend.remove(&name)
        })
        .await
    }

    /// The health of everything that jobs need.
    pub async fn health(&self) -> Health {
        let Inner { services, store, runner, leftovers, libvirt_required, looks, .. } = &*self.inner;
        let (services, store, leftovers) = (Arc::clone(services), store.clone(), leftovers.borrow().clone());
        looks.share(health::look(services, store, *libvirt_required, runner.running(), leftovers)).await
    }

    /// Stops: no new jobs; running ones have their time to end, and then stop where they are, as recorded.
    pub async fn shutdown(&self) {
        self.shutdown_unless(std::future::pending()).await;
    }

    /// As [`Engine::shutdown`]; when `hurry` is there, running jobs stop at once.
    pub async fn shutdown_unless(&self, hurry: impl Future<Output = ()>) {
        self.inner.sweeper.iter().for_each(AbortHandle::abort);
        self.inner.runner.retire();
        tokio::select! {
            () = self.inner.runner.idle(self.inner.stop_grace) => {}
            () = hurry => {}
        }
        self.inner.runner.shutdown(SHUTDOWN_PATIENCE).await;
    }
}

fn too_many_plans() -> Error {
    Error::new(ErrorCode::QueueFull, format!("{PLANS} dry runs are under way, and no more are taken"))
        .hint("try again when one has ended")
}

/// Copies a job database to a new file, also while a daemon uses it; gives how many jobs are in it.
///
/// # Errors
/// `database_unavailable`; `file_in_the_way` when there is something at `to`.
pub fn backup_database(from: &Path, to: &Path) -> Result<u64> {
    db::backup(from, to).map(|facts| facts.jobs)
}

/// Stops work whose caller has gone.
struct StopOnDrop(Progress);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop(Stop::Cancel);
    }
}

fn volume_name(text: &str) -> Result<VolumeName> {
    text.parse().map_err(|invalid| Error::invalid(ErrorCode::InvalidVolumeName, &invalid))
}

fn no_volume(name: &VolumeName, target: &Target) -> Error {
    Error::new(ErrorCode::VolumeNotFound, format!("there is no volume {name} in {}", target.backend.label()))
}
