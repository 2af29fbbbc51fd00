//! How an engine comes to be: it takes its places and holds them against other processes, puts the parts together, settles
//! what an earlier process left, and begins. It leaves out what it is asked then.

use std::{
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use lvp_api::ErrorCode;
use tokio::{
    sync::{Mutex, Semaphore, watch},
    time,
};

use super::{Engine, Inner, PLANS};
use crate::{
    courtesy::Courtesy,
    error::{Error, Result},
    health::Looks,
    host::{
        libvirt::{Libvirt, StoragePool},
        lock::Lock,
    },
    image::{ImageSettings, Images},
    job::{Execution, RunBy, Runner, Store},
    limit::Limits,
    provision::{self, Context, Keeping, Left, Services},
    settings::{EngineSettings, LIBVIRT_URI, LibvirtSetting, POOL, Recovery},
    space::{Ledger, Place},
    task::blocking,
    volume::Targets,
};

/// Where libvirt keeps images unless told otherwise.
const POOL_DIRECTORY: &str = "/var/lib/libvirt/images";
/// Sockets of the monolithic daemon and of the modular one.
const LIBVIRT_SOCKETS: [&str; 2] = ["/var/run/libvirt/libvirt-sock", "/var/run/libvirt/virtqemud-sock"];
/// Leftovers are looked for this often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3600);
/// And this often while there are some.
const SWEEP_AGAIN: Duration = Duration::from_secs(300);

/// An engine that has everything in its hands and has begun nothing: for who may still find that he cannot serve, and must
/// not use up the attempts of jobs in that.
pub struct Prepared {
    services: Arc<Services>,
    runner: Runner<Context>,
    store: Store,
    libvirt_required: bool,
    courtesy: Option<Courtesy>,
    recovery: Recovery,
    leftover_grace: Option<Duration>,
    stop_grace: Duration,
    locks: [Lock; 2],
}

impl Prepared {
    /// Opens state, database, cache and targets, and holds them against other processes.
    ///
    /// # Errors
    /// `state_locked` when another process has the state, the database or the cache; `database_unavailable`; anything that
    /// the directories' file systems say. A target or libvirt that is not usable is no error here: health tells.
    pub async fn open(settings: EngineSettings) -> Result<Self> {
        let database = settings.database();
        let locks = [lock_state(&settings.state_directory)?, lock_database(&database)?];
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
        Ok(Self {
            services,
            runner,
            store,
            libvirt_required,
            courtesy,
            recovery: settings.recovery,
            leftover_grace: settings.leftover_grace,
            stop_grace: settings.stop_grace,
            locks,
        })
    }

    /// Settles what an earlier process left, and begins to run jobs.
    ///
    /// # Errors
    /// `database_unavailable`.
    pub async fn begin(self) -> Result<Engine> {
        let Self { services, runner, store, libvirt_required, courtesy, stop_grace, locks, .. } = self;
        runner.begin(self.recovery).await?;
        // Only a daemon is there for long enough to look after what others left.
        let (found, leftovers) = watch::channel(Vec::new());
        let sweeper = (self.recovery == Recovery::Resume)
            .then(|| tokio::spawn(sweep_always(Arc::clone(&services), runner.clone(), self.leftover_grace, found)));
        let courtesy = courtesy.map(|courtesy| tokio::spawn(courtesy.look_always()));
        Ok(Engine {
            inner: Arc::new(Inner {
                services,
                runner,
                store,
                verifying: Mutex::new(()),
                planning: Arc::new(Semaphore::new(PLANS)),
                libvirt_required,
                stop_grace,
                sweeper: sweeper.map(|task| task.abort_handle()),
                courtesy: courtesy.map(|task| task.abort_handle()),
                leftovers,
                looks: Looks::default(),
                _locks: locks,
            }),
        })
    }
}

/// Makes the state directory, where there is none, and holds it against other processes.
fn lock_state(state: &Path) -> Result<Lock> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state).map_err(|error| {
        Error::io("creating", state, error).hint("set LVP_STATE_DIR to a directory that this user may write to")
    })?;
    Lock::acquire(&state.join("lock"), &format!("the state directory {}", state.display()))
}

/// Holds the database against other processes, wherever their state is: `DB_PATH` may name one outside of the state
/// directory. The lock stands beside the file itself, whatever it is called on the way there.
fn lock_database(path: &Path) -> Result<Lock> {
    let failed = |error| {
        let hint = "check that its directory is there and may be written, or name another database with DB_PATH";
        Error::new(ErrorCode::DatabaseUnavailable, format!("database {} cannot be locked", path.display()))
            .source(error)
            .hint(hint)
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = match path.canonicalize() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            parent.canonicalize().map_err(failed)?.join(path.file_name().unwrap_or_default())
        }
        found => found.map_err(failed)?,
    };
    let mut name = file.into_os_string();
    name.push(".lock");
    Lock::acquire(Path::new(&name), &format!("the database {}", path.display()))
}

/// How the runner runs provisions.
fn execution(services: Arc<Services>) -> Execution<Context> {
    Execution {
        context: Box::new(move |stored, progress| Context::new(Arc::clone(&services), stored, progress)),
        steps: provision::steps,
        record: Context::record,
    }
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
