//! [`Engine`]: the only door for front ends. It puts the parts together at the start and turns each question into calls
//! of them; it decides nothing itself.

use std::{
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::{Stream, stream};
use lvp_api::{
    BaseVolume, ErrorCode, Health, Image, ImageVerification, Job, JobId, JobKind, JobList, JobStatus, Plan,
    PrefetchRequest, ProvisionRequest, Receipt, Submitted, Volume, VolumeName, VolumeVerification,
};
use tokio::{
    sync::{Mutex, watch},
    task::AbortHandle,
    time,
};

use crate::{
    courtesy::Courtesy,
    db,
    error::{Error, Result},
    health,
    host::{
        libvirt::{Libvirt, StoragePool},
        lock::Lock,
    },
    image::{ImageSettings, Images},
    job::{Execution, Filter, NewJob, RunBy, Runner, Store},
    limit::Limits,
    progress::{Progress, Stop},
    provision::{self, Context, Keeping, Left, Order, Services},
    settings::{Caller, EngineSettings, LIBVIRT_URI, LibvirtSetting, POOL, Recovery},
    space::{Ledger, Place},
    task::blocking,
    volume::{Tags, Target, Targets},
};

/// Where libvirt keeps images unless told otherwise.
const POOL_DIRECTORY: &str = "/var/lib/libvirt/images";
/// Sockets of the monolithic daemon and of the modular one.
const LIBVIRT_SOCKETS: [&str; 2] = ["/var/run/libvirt/libvirt-sock", "/var/run/libvirt/virtqemud-sock"];
/// A watched job's progress is looked at this often.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// Leftovers are looked for this often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3600);
/// And this often while there are some.
const SWEEP_AGAIN: Duration = Duration::from_secs(300);
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
    _lock: Lock,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.sweeper.iter().chain(&self.courtesy).for_each(AbortHandle::abort);
    }
}

impl Engine {
    /// Opens state, cache and targets, settles what an earlier process left, and begins to run jobs.
    ///
    /// # Errors
    /// `state_locked` when another process has the state or the cache; `database_unavailable`; anything that the
    /// directories' file systems say. A target or libvirt that is not usable is no error here: health tells.
    pub async fn open(settings: EngineSettings) -> Result<Self> {
        let lock = lock_state(&settings.state_directory)?;
        let database = settings.database();
        let recorded_in = database.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let own = if settings.recovery == Recovery::Resume { RunBy::Daemon } else { RunBy::Command };
        let store = Store::open(&database)?.bounded(settings.max_queued_jobs).run_by(own);
        let (libvirt, libvirt_required) = libvirt(&settings);
        let (directory, pool) = cache_directory(&settings, libvirt.clone()).await;
        let ledger = Ledger::default();
        ledger.keep(&Place::of(recorded_in)?, provision::STATE_KEPT);
        let images = Images::open(ImageSettings {
            directory,
            max_bytes: settings.cache_max_bytes,
            pool,
            source: settings.sources.clone(),
            ledger: ledger.clone(),
            users: provision::file_users(libvirt.clone()),
        })
        .await?;
        let mut limits = Limits::new(settings.download_limit, settings.write_limit);
        let courtesy = settings.courtesy.map(Courtesy::new).transpose()?;
        if let Some(courtesy) = &courtesy {
            limits = limits.and(&courtesy.limits());
        }
        let services = Arc::new(Services {
            images,
            sources: settings.sources,
            targets: Targets::new(settings.targets, settings.lock_retry),
            libvirt,
            base_locks: provision::BaseLocks::default(),
            workers: settings.workers,
            limits,
            io_priority: settings.io_priority,
            ledger,
            keeping: Keeping { thin_floor: settings.thin_floor, database: recorded_in.to_owned() },
        });
        let execution = execution(Arc::clone(&services));
        let runner = Runner::new(store.clone(), execution, settings.max_concurrent_jobs, settings.job_history);
        runner.begin(settings.recovery).await?;
        // Only a daemon is there for long enough to look after what others left.
        let (found, leftovers) = watch::channel(Vec::new());
        let sweeper = (settings.recovery == Recovery::Resume)
            .then(|| tokio::spawn(sweep_always(Arc::clone(&services), runner.clone(), settings.leftover_grace, found)));
        let courtesy = courtesy.map(|courtesy| tokio::spawn(courtesy.look_always()));
        Ok(Self {
            inner: Arc::new(Inner {
                services,
                runner,
                store,
                verifying: Mutex::new(()),
                libvirt_required,
                stop_grace: settings.stop_grace,
                sweeper: sweeper.map(|task| task.abort_handle()),
                courtesy: courtesy.map(|task| task.abort_handle()),
                leftovers,
                looks: health::Looks::default(),
                _lock: lock,
            }),
        })
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

    /// What a provision would do.
    pub async fn plan(&self, request: &ProvisionRequest, caller: Caller) -> Result<Plan> {
        let order = self.order(request, caller)?;
        self.exclusive(&order).await?;
        self.refuse_unrecordable().await?;
        let receipts = self.receipts_beside(&order).await?;
        provision::plan(&self.inner.services, &order, &receipts).await
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

    /// Jobs, newest first.
    pub async fn jobs(&self, status: Option<JobStatus>, before: Option<JobId>, limit: u32) -> Result<JobList> {
        let stored = self.inner.runner.list(Filter { status, before, limit: limit + 1 }).await?;
        let mut jobs = stored.into_iter().map(provision::view_job).collect::<Result<Vec<_>>>()?;
        let more = jobs.len() > limit as usize;
        jobs.truncate(limit as usize);
        let next = if more { jobs.last().map(|job| job.job_id) } else { None };
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

/// Makes the state directory, where there is none, and holds it against other processes.
fn lock_state(state: &Path) -> Result<Lock> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state).map_err(|error| {
        Error::io("creating", state, error).hint("set LVP_STATE_DIR to a directory that this user may write to")
    })?;
    Lock::acquire(&state.join("lock"), &format!("the state directory {}", state.display()))
}

/// How the runner runs provisions.
fn execution(services: Arc<Services>) -> Execution<Context> {
    Execution {
        context: Box::new(move |stored, progress| Context::new(Arc::clone(&services), stored, progress)),
        steps: provision::steps,
        record: Context::record,
    }
}

/// Copies a job database to a new file, also while a daemon uses it; gives how many jobs are in it.
///
/// # Errors
/// `database_unavailable`; `file_in_the_way` when there is something at `to`.
pub fn backup_database(from: &Path, to: &Path) -> Result<u64> {
    db::backup(from, to).map(|facts| facts.jobs)
}

/// Looks for leftovers as long as the daemon is there.
async fn sweep_always(
    services: Arc<Services>,
    runner: Runner<Context>,
    grace: Option<Duration>,
    found: watch::Sender<Vec<Left>>,
) {
    loop {
        if let Err(error) = services.images.sweep().await {
            tracing::warn!(error = %error.chain(), "what downloads left in the cache was not looked for");
        }
        let left = provision::sweep(&services, &runner, grace).await;
        let interval = if left.is_empty() { SWEEP_INTERVAL } else { SWEEP_AGAIN };
        found.send_replace(left);
        time::sleep(interval).await;
    }
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

/// libvirt as the settings want it, and whether the daemon is ready only with it.
fn libvirt(settings: &EngineSettings) -> (Option<Libvirt>, bool) {
    match &settings.libvirt {
        LibvirtSetting::Off => (None, false),
        LibvirtSetting::Uri(uri) => (Some(Libvirt::new(uri.clone())), true),
        LibvirtSetting::Automatic => {
            let required =
                settings.targets.values().any(|target| matches!(target.spec, lvp_api::TargetSpec::Lvm { .. }));
            let there =
                LIBVIRT_SOCKETS.iter().any(|socket| rustix::fs::access(*socket, rustix::fs::Access::WRITE_OK).is_ok());
            ((required || there).then(|| Libvirt::new(LIBVIRT_URI)), required)
        }
    }
}

/// The cache's directory, and the libvirt pool that it is, if it is one.
async fn cache_directory(settings: &EngineSettings, libvirt: Option<Libvirt>) -> (PathBuf, Option<StoragePool>) {
    let wanted = settings.cache_directory.clone().unwrap_or_else(|| PathBuf::from(POOL_DIRECTORY));
    let fallback = settings.cache_directory.clone().unwrap_or_else(|| settings.state_directory.join("images"));
    let Some(libvirt) = libvirt else { return (fallback, None) };
    let path = wanted.clone();
    let pool = blocking(move || {
        std::fs::create_dir_all(&path).map_err(|error| Error::io("creating", &path, error))?;
        libvirt.ensure_pool(POOL, &path)
    });
    match pool.await {
        Ok(pool) if !is_writable(&pool.path) => {
            tracing::info!(pool = pool.name, path = %pool.path.display(), "the storage pool is not writable; images are cached elsewhere");
            (fallback, None)
        }
        Ok(pool) if settings.cache_directory.is_none() || pool.path == wanted => (pool.path.clone(), Some(pool)),
        Ok(pool) => {
            tracing::info!(pool = pool.name, path = %pool.path.display(), "the storage pool is elsewhere; the configured cache directory is used as it is");
            (fallback, None)
        }
        Err(error) => {
            tracing::warn!(error = %error.chain(), directory = %fallback.display(), "no storage pool for the image cache; a plain directory is used");
            (fallback, None)
        }
    }
}

fn is_writable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK).is_ok()
}
