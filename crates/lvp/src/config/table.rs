//! Every setting: its key in the file, its names in the environment, its flag, its default. One table, from which the
//! reference in `docs/reference/configuration.md` is written too.

/// A setting.
#[derive(Debug)]
pub struct Setting {
    /// Its key in the TOML file, dotted.
    pub key: &'static str,
    /// Its names in the environment; the first one is the one to use.
    pub variables: &'static [&'static str],
    /// Its flag on the command line.
    pub flag: Option<&'static str>,
    /// What it is when nobody says anything; `None`: not set, or found out at the start.
    pub default: Option<&'static str>,
    /// Whether its value is never shown.
    pub secret: bool,
    /// What it does.
    pub meaning: &'static str,
}

const fn setting(
    key: &'static str,
    variables: &'static [&'static str],
    default: Option<&'static str>,
    meaning: &'static str,
) -> Setting {
    Setting { key, variables, flag: None, default, secret: false, meaning }
}

impl Setting {
    const fn flag(mut self, flag: &'static str) -> Self {
        self.flag = Some(flag);
        self
    }

    const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }
}

/// All settings.
pub const SETTINGS: &[Setting] = &[
    setting("state_dir", &["LVP_STATE_DIR"], None, "Directory of the database, the lock and the socket; not set: /var/lib/libvirt-volume-provisioner for root, else below `~/.local/state`")
        .flag("state-dir"),
    setting("database", &["DB_PATH", "DATABASE_PATH"], None, "The job database's file; not set: `jobs.db` in `state_dir`"),
    setting("cache_dir", &["LVP_CACHE_DIR"], None, "Directory of the image cache; not set: that of libvirt's storage pool `images`, or `images` in `state_dir`").flag("cache-dir"),
    setting(
        "cache_max_bytes",
        &["LVP_CACHE_MAX_BYTES"],
        None,
        "The cache's largest size, such as 100G; not set: what the file system has",
    ),
    setting("host", &["HOST", "LISTEN_ADDR"], Some("127.0.0.1"), "Address that the daemon listens on; loopback only")
        .flag("host"),
    setting("port", &["PORT"], Some("8080"), "Port that the daemon listens on").flag("port"),
    setting("socket", &["LVP_SOCKET"], None, "The daemon's Unix socket; not set: `lvp.sock` in `state_dir`").flag("socket"),
    setting(
        "max_connections",
        &["LVP_MAX_CONNECTIONS"],
        Some("1024"),
        "Connections open at once, over TCP and as many over the socket, as far as the limit of open files allows; half as many may follow a job's events",
    ),
    setting("minio.endpoint", &["MINIO_ENDPOINT"], None, "The object store: scheme, host and port"),
    setting("minio.access_key", &["MINIO_ACCESS_KEY", "MINIO_ACCESS_KEY_ID"], None, "Its access key").secret(),
    setting("minio.secret_key", &["MINIO_SECRET_KEY", "MINIO_SECRET_ACCESS_KEY"], None, "Its secret key").secret(),
    setting("minio.region", &["MINIO_REGION"], Some("us-east-1"), "Its region"),
    setting(
        "minio.retry_attempts",
        &["MINIO_RETRY_ATTEMPTS"],
        Some("3"),
        "How often a request is sent again after a failure that can pass",
    ),
    setting(
        "minio.retry_backoff_ms",
        &["MINIO_RETRY_BACKOFF_MS"],
        Some("100,1000,10000"),
        "How long is waited before each of those, in milliseconds; the last wait holds for all further ones",
    ),
    setting(
        "ca_cert_file",
        &["LVP_CA_CERT_FILE"],
        None,
        "PEM file of certificate authorities to trust beside the system's",
    ),
    setting("lvm.volume_group", &["LVM_VOLUME_GROUP"], None, "Volume group of the target `default`"),
    setting("lvm.thin_pool", &["LVM_THIN_POOL"], None, "Thin pool of the target `default`"),
    setting(
        "lvm.retry_attempts",
        &["LVM_RETRY_ATTEMPTS"],
        Some("2"),
        "How often an LVM command is tried again while LVM is locked",
    ),
    setting(
        "lvm.retry_backoff_ms",
        &["LVM_RETRY_BACKOFF_MS"],
        Some("100,1000"),
        "How long is waited before each of those, in milliseconds; the last wait holds for all further ones",
    ),
    setting("libvirt_uri", &["LVP_LIBVIRT_URI"], None, "libvirt's connection URI, or `none`; not set: `qemu:///system`"),
    setting("max_concurrent_jobs", &["MAX_CONCURRENT_JOBS"], Some("2"), "Jobs that run at once"),
    setting(
        "max_queued_jobs",
        &["LVP_MAX_QUEUED_JOBS"],
        Some("1000"),
        "Jobs that wait for their turn; a request beyond is answered with 429 and `queue_full`",
    ),
    setting("workers", &["LVP_WORKERS"], None, "Threads that decode and write, for one job; not set: two for each processor, four at most"),
    setting(
        "download_limit",
        &["LVP_DOWNLOAD_LIMIT"],
        None,
        "Bytes a second that all jobs together may fetch, such as 100M; not set: no limit",
    ),
    setting(
        "write_limit",
        &["LVP_WRITE_LIMIT"],
        None,
        "Bytes a second that all jobs together may write to volumes, such as 200M; not set: no limit",
    ),
    setting(
        "io_pressure_limit",
        &["LVP_IO_PRESSURE_LIMIT"],
        None,
        "Percent of the time in which the host's guests may wait for their disks (those with `io='threads'`) before jobs go slower, \
         such as 20; not set: jobs do not heed it",
    ),
    setting(
        "io_pressure_file",
        &["LVP_IO_PRESSURE_FILE"],
        None,
        "File of the kernel's I/O pressure (PSI) that `io_pressure_limit` is held against; not set: the guests', \
         /sys/fs/cgroup/machine.slice/io.pressure",
    ),
    setting(
        "io_priority",
        &["LVP_IO_PRIORITY"],
        Some("normal"),
        "I/O priority of what copies to volumes: normal, low, or idle; heeded by the I/O schedulers bfq and mq-deadline",
    ),
    setting(
        "stop_grace",
        &["LVP_STOP_GRACE"],
        Some("10s"),
        "How long running jobs may go on when the daemon is told to stop; then they are resumed at the next start",
    ),
    setting(
        "leftover_grace",
        &["LVP_LEFTOVER_GRACE"],
        Some("24h"),
        "How long the daemon keeps what a job that it does not know left incomplete, such as 36h or 7d; `never`: for ever",
    ),
    setting(
        "thin_floor",
        &["LVP_THIN_FLOOR"],
        Some("5"),
        "Percent of a thin pool's data that jobs leave free for the volumes in it",
    ),
    setting("job_history", &["LVP_JOB_HISTORY"], Some("1000"), "Ended jobs that are remembered, at least 1"),
    setting("log_level", &["LOG_LEVEL"], None, "error, warn, info, debug, trace, or filter directives; not set: info for the daemon, error for commands")
        .flag("log-level"),
    setting("log_format", &["LOG_FORMAT"], Some("auto"), "text, json, or auto: text on a terminal"),
];
