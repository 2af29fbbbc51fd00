//! The configuration: flags over environment over the TOML file over defaults, each value with where it came from.
//!
//! It leaves out what the values do: [`Config::engine`] and [`Config::addresses`] hand them to those who know.

mod table;

use std::{
    collections::BTreeMap,
    env, fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use lvp_api::{ByteSize, DiskFormat, ErrorCode, TargetSpec, ZeroPolicy};
use lvp_engine::{
    CourtesySettings, Credentials, EngineSettings, Error, IoPriority, LEAST_RATE, LibvirtSetting, LockRetry, Recovery,
    Result, Secret, SourceSettings, TargetSettings, parse_endpoint,
};
use lvp_server::{Limits, listen::Addresses};

pub use self::table::SETTINGS;

/// The file that is read when `LVP_CONFIG` and `--config` name none. It need not exist.
const DEFAULT_FILE: &str = "/etc/libvirt-volume-provisioner/config.toml";
const NAME: &str = "libvirt-volume-provisioner";
/// Variables of the environment that begin with `LVP_` and are no settings.
const OTHER_VARIABLES: [&str; 2] = ["LVP_CONFIG", "LVP_SERVER"];
/// Settings of the seed that will come with access control; until then they must not seem to protect.
const NOT_YET: [&str; 6] =
    ["TLS_CERT_FILE", "TLS_KEY_FILE", "SERVER_CERT", "SERVER_KEY", "CLIENT_CA_CERT", "API_TOKENS_FILE"];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// The configuration file.
    File(PathBuf),
    /// This variable of the environment.
    Environment(&'static str),
    /// This flag of the command line.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::Flag(name) => write!(f, "--{name}"),
        }
    }
}

/// A value as text, and where it came from.
#[derive(Debug, Clone)]
pub struct Value {
    /// The text; `None`: not set.
    pub text: Option<String>,
    /// Where it came from.
    pub origin: Origin,
}

/// What the command line says: the setting's key, and the text.
pub type Flags = Vec<(&'static str, String)>;

/// The merged configuration.
#[derive(Debug)]
pub struct Config {
    values: BTreeMap<&'static str, Value>,
    targets: BTreeMap<String, (TargetSettings, Origin)>,
    warnings: Vec<String>,
}

impl Config {
    /// Merges flags, environment and file. `file`: from `--config`; it must exist then.
    ///
    /// # Errors
    /// `invalid_configuration`: an unknown key (with the nearest known one), a value that cannot be, a file that
    /// cannot be read.
    pub fn load(file: Option<PathBuf>, flags: Flags) -> Result<Self> {
        let variables: BTreeMap<String, String> = env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(_, value)| !value.is_empty())
            .collect();
        Self::merge(file, flags, &variables)
    }

    fn merge(file: Option<PathBuf>, flags: Flags, variables: &BTreeMap<String, String>) -> Result<Self> {
        let mut config = Self { values: BTreeMap::new(), targets: BTreeMap::new(), warnings: Vec::new() };
        for setting in SETTINGS {
            config
                .values
                .insert(setting.key, Value { text: setting.default.map(str::to_owned), origin: Origin::Default });
        }
        let named = file.or_else(|| variables.get("LVP_CONFIG").map(PathBuf::from));
        let path = named.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
        if named.is_some() || path.exists() {
            config.read_file(&path)?;
        }
        config.read_environment(variables)?;
        for (key, text) in flags {
            let setting = SETTINGS.iter().find(|setting| setting.key == key).expect("a flag has a setting");
            config.values.insert(
                setting.key,
                Value { text: Some(text), origin: Origin::Flag(setting.flag.unwrap_or(setting.key)) },
            );
        }
        config.add_default_target()?;
        Ok(config)
    }

    fn read_file(&mut self, path: &Path) -> Result<()> {
        let bad = |why: String| Error::new(ErrorCode::InvalidConfiguration, format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| bad("cannot be read".to_owned()).source(error))?;
        let mut document: toml::Table =
            text.parse().map_err(|error: toml::de::Error| bad(toml_error(&error, &text)))?;
        if let Some(targets) = document.remove("targets") {
            let targets = targets.as_table().ok_or_else(|| bad("targets is not a table".to_owned()))?;
            for (name, fields) in targets {
                let settings = target(fields).map_err(|why| bad(format!("targets.{name} {why}")))?;
                if settings.linked && settings.format != DiskFormat::Qcow2 {
                    let why = format!("targets.{name} is linked, which only a dir of format qcow2 can be");
                    return Err(bad(why).hint("write kind = \"dir\" and format = \"qcow2\", or leave linked out"));
                }
                self.targets.insert(name.clone(), (settings, Origin::File(path.to_owned())));
            }
        }
        for (key, value) in flatten("", document) {
            let setting = SETTINGS.iter().find(|setting| setting.key == key).ok_or_else(|| {
                let known = SETTINGS.iter().map(|setting| setting.key).chain(["targets"]);
                unknown(bad(format!("there is no setting '{key}'")), &key, known)
            })?;
            let text = plain(&value).ok_or_else(|| bad(format!("{key} is not a text, a number or a list of those")))?;
            self.values.insert(setting.key, Value { text: Some(text), origin: Origin::File(path.to_owned()) });
        }
        Ok(())
    }

    fn read_environment(&mut self, variables: &BTreeMap<String, String>) -> Result<()> {
        for setting in SETTINGS {
            // The first name that is set wins: it is the one in the documentation.
            if let Some((name, text)) =
                setting.variables.iter().find_map(|name| variables.get(*name).map(|text| (*name, text)))
            {
                self.values.insert(setting.key, Value { text: Some(text.clone()), origin: Origin::Environment(name) });
            }
        }
        let known = || SETTINGS.iter().flat_map(|setting| setting.variables).copied();
        for name in variables.keys().filter(|name| name.starts_with("LVP_")) {
            if !known().any(|known| known == name) && !OTHER_VARIABLES.contains(&name.as_str()) {
                let error = Error::new(
                    ErrorCode::InvalidConfiguration,
                    format!("there is no setting for the environment variable {name}"),
                );
                return Err(unknown(error, name, known().filter(|known| known.starts_with("LVP_"))));
            }
        }
        for name in NOT_YET.iter().filter(|name| variables.contains_key(**name)) {
            self.warnings.push(format!("{name} is set, but this version has no TLS and no authentication; only loopback and the Unix socket are served"));
        }
        Ok(())
    }

    /// The target that is meant when none is named: from the file, the volume group of the environment, or a directory.
    fn add_default_target(&mut self) -> Result<()> {
        let (group, pool) = (self.values["lvm.volume_group"].clone(), self.text("lvm.thin_pool"));
        if let Some(name) = &group.text {
            let written = pool.map_or(format!("lvm:{name}"), |pool| format!("lvm:{name}/{pool}"));
            let spec: TargetSpec = written.parse().map_err(|invalid: lvp_api::Invalid| {
                Error::new(ErrorCode::InvalidConfiguration, format!("lvm.volume_group: {invalid}"))
            })?;
            // What is said for this process outranks what stands in the file.
            if !self.targets.contains_key("default") || !matches!(group.origin, Origin::File(_)) {
                self.targets.insert("default".to_owned(), (spec.into(), group.origin));
            }
        } else if !self.targets.contains_key("default") {
            let path = self.state_directory()?.join("volumes");
            self.targets.insert("default".to_owned(), (TargetSpec::Directory { path }.into(), Origin::Default));
        }
        Ok(())
    }

    /// What deserves a word, but is no error.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Every setting with its value, for display: secrets are hidden.
    pub fn shown(&self) -> Vec<(String, String, String)> {
        let settings = SETTINGS.iter().map(|setting| {
            let value = &self.values[setting.key];
            let text = match &value.text {
                None => self.effective_default(setting.key).unwrap_or_default(),
                // A password in a URL is refused where it is used, and must not be shown before.
                Some(text) if setting.secret || text.contains('@') => "(hidden)".to_owned(),
                Some(text) => text.clone(),
            };
            (setting.key.to_owned(), text, value.origin.to_string())
        });
        let targets = self
            .targets
            .iter()
            .map(|(name, (settings, origin))| (format!("targets.{name}"), shown(settings), origin.to_string()));
        settings.chain(targets).collect()
    }

    /// The values that depend on who runs lvp and where.
    fn effective_default(&self, key: &str) -> Option<String> {
        match key {
            "state_dir" => Some(self.state_directory().ok()?.display().to_string()),
            "socket" => Some(self.socket().ok()?.display().to_string()),
            "database" => Some(self.state_directory().ok()?.join("jobs.db").display().to_string()),
            "cache_dir" => Some("(the directory of libvirt's pool 'images', or below state_dir)".to_owned()),
            "libvirt_uri" => Some("(qemu:///system where it is there)".to_owned()),
            "workers" => Some(default_workers().to_string()),
            _ => None,
        }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.values[key].text.as_deref()
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        let Some(text) = self.text(key) else { return Ok(None) };
        text.trim().parse().map(Some).map_err(|_| self.invalid(key, "is not a number that is possible here"))
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        let size = self.text(key).map(|text| {
            text.parse::<ByteSize>()
                .map(|size| size.0)
                .map_err(|invalid| self.invalid(key, &format!("is not a size: {invalid}")))
        });
        size.transpose()
    }

    /// Bytes a second.
    fn rate(&self, key: &str) -> Result<Option<u64>> {
        match self.size(key)? {
            Some(rate) if rate < LEAST_RATE => {
                Err(self.invalid(key, &format!("is less than {} a second", ByteSize(LEAST_RATE))))
            }
            rate => Ok(rate),
        }
    }

    /// A number that is not 0.
    fn some<T: Default + PartialEq>(&self, key: &str, number: T) -> Result<T> {
        if number == T::default() { Err(self.invalid(key, "must be at least 1")) } else { Ok(number) }
    }

    fn percent(&self, key: &str) -> Result<u8> {
        match self.number(key)?.unwrap_or_default() {
            percent @ 0..=100 => Ok(percent),
            _ => Err(self.invalid(key, "is not a number of percent from 0 to 100")),
        }
    }

    fn courtesy(&self) -> Result<Option<CourtesySettings>> {
        let file = self.text("io_pressure_file").map(PathBuf::from);
        match self.number("io_pressure_limit")? {
            None => Ok(None),
            Some(limit @ 1..=99) => Ok(Some(CourtesySettings { limit, file })),
            Some(_) => Err(self.invalid("io_pressure_limit", "is not a number of percent from 1 to 99")),
        }
    }

    fn io_priority(&self) -> Result<IoPriority> {
        let text = self.text("io_priority").unwrap_or_default();
        let found = IoPriority::ALL.into_iter().find(|priority| priority.name() == text);
        found.ok_or_else(|| self.invalid("io_priority", "is not one of normal, low and idle"))
    }

    /// A span of time such as `36h` or `1d 12h`.
    fn span(&self, key: &str) -> Result<Duration> {
        let invalid = || self.invalid(key, "is not a span of time such as 30s, 36h or 7d");
        let span: jiff::Span = self.text(key).unwrap_or_default().parse().map_err(|_| invalid())?;
        let span = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| invalid())?;
        Duration::try_from(span).map_err(|_| invalid())
    }

    /// As [`Config::span`], or `never`.
    fn span_or_never(&self, key: &str) -> Result<Option<Duration>> {
        if self.text(key) == Some("never") { Ok(None) } else { self.span(key).map(Some) }
    }

    fn milliseconds(&self, key: &str) -> Result<Vec<Duration>> {
        let text = self.text(key).unwrap_or_default();
        let numbers = text.split(',').map(|number| number.trim().parse().map(Duration::from_millis));
        numbers
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| self.invalid(key, "is not a list of milliseconds such as 100,1000"))
    }

    fn invalid(&self, key: &str, why: &str) -> Error {
        let value = &self.values[key];
        let text = value.text.as_deref().unwrap_or_default();
        Error::new(
            ErrorCode::InvalidConfiguration,
            format!("{key} = '{}' (from {}) {why}", text.escape_debug(), value.origin),
        )
    }

    /// Database, lock and socket.
    pub fn state_directory(&self) -> Result<PathBuf> {
        if let Some(path) = self.text("state_dir") {
            return Ok(PathBuf::from(path));
        }
        if rustix::process::geteuid().is_root() {
            return Ok(Path::new("/var/lib").join(NAME));
        }
        let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
        let base = env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute()).or_else(home);
        base.map(|base| base.join(NAME)).ok_or_else(|| {
            Error::new(ErrorCode::InvalidConfiguration, "there is no place for lvp's state: HOME is not set")
                .hint("set LVP_STATE_DIR")
        })
    }

    /// The daemon's Unix socket.
    pub fn socket(&self) -> Result<PathBuf> {
        match self.text("socket") {
            Some(path) => Ok(PathBuf::from(path)),
            None => Ok(self.state_directory()?.join("lvp.sock")),
        }
    }

    /// Where the daemon listens.
    pub fn addresses(&self) -> Result<Addresses> {
        let mut host = self.text("host").unwrap_or_default().to_owned();
        let mut port: u16 = self.number("port")?.unwrap_or_default();
        // The reference daemon's LISTEN_ADDR may carry the port.
        if let Some((name, digits)) =
            host.rsplit_once(':').filter(|(name, _)| !name.contains(':') || name.ends_with(']'))
        {
            port = digits.parse().map_err(|_| self.invalid("host", "ends with something that is not a port"))?;
            host = name.to_owned();
        }
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Addresses { tcp: Some((host, port)), unix: Some(self.socket()?) })
    }

    /// How much clients may have of the server.
    pub fn limits(&self) -> Result<Limits> {
        let connections = self.some("max_connections", self.number("max_connections")?.unwrap_or(1024))?;
        Ok(Limits::of_connections(connections))
    }

    /// What is logged: a level or `tracing`'s filter directives.
    pub fn log_level(&self) -> Option<&str> {
        self.text("log_level")
    }

    /// `json`, `text` or `auto`.
    pub fn log_format(&self) -> &str {
        self.text("log_format").unwrap_or("auto")
    }

    /// The engine's settings.
    pub fn engine(&self, recovery: Recovery) -> Result<EngineSettings> {
        Ok(EngineSettings {
            state_directory: self.state_directory()?,
            database: self.text("database").map(PathBuf::from),
            cache_directory: self.text("cache_dir").map(PathBuf::from),
            cache_max_bytes: self.size("cache_max_bytes")?,
            sources: self.sources()?,
            targets: self.targets.iter().map(|(name, (settings, _))| (name.clone(), settings.clone())).collect(),
            lock_retry: LockRetry {
                attempts: self.number("lvm.retry_attempts")?.unwrap_or_default(),
                backoff: self.milliseconds("lvm.retry_backoff_ms")?,
            },
            libvirt: match self.text("libvirt_uri") {
                None => LibvirtSetting::Automatic,
                Some("none") => LibvirtSetting::Off,
                Some(uri) => LibvirtSetting::Uri(uri.to_owned()),
            },
            max_concurrent_jobs: self.some("max_concurrent_jobs", self.number("max_concurrent_jobs")?.unwrap_or(2))?,
            max_queued_jobs: self.some("max_queued_jobs", self.number("max_queued_jobs")?.unwrap_or(1000))?,
            workers: self.some("workers", self.number("workers")?.unwrap_or_else(default_workers))?,
            download_limit: self.rate("download_limit")?,
            write_limit: self.rate("write_limit")?,
            courtesy: self.courtesy()?,
            io_priority: self.io_priority()?,
            leftover_grace: self.span_or_never("leftover_grace")?,
            stop_grace: self.span("stop_grace")?,
            // One at least: who follows a job reads its end after it has ended.
            job_history: self.some("job_history", self.number("job_history")?.unwrap_or(1000))?,
            thin_floor: self.percent("thin_floor")?,
            recovery,
        })
    }

    fn sources(&self) -> Result<SourceSettings> {
        let credentials = match (self.text("minio.access_key"), self.text("minio.secret_key")) {
            (Some(access_key), Some(secret_key)) => {
                Some(Credentials { access_key: Secret::new(access_key), secret_key: Secret::new(secret_key) })
            }
            (None, None) => None,
            (Some(_), None) => return Err(half_credentials("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY")),
            (None, Some(_)) => return Err(half_credentials("MINIO_SECRET_KEY", "MINIO_ACCESS_KEY")),
        };
        Ok(SourceSettings {
            endpoint: self.text("minio.endpoint").map(parse_endpoint).transpose()?,
            credentials,
            region: self.text("minio.region").unwrap_or_default().to_owned(),
            ca_file: self.text("ca_cert_file").map(PathBuf::from),
            retry_attempts: self.number("minio.retry_attempts")?.unwrap_or_default(),
            retry_backoff: self.milliseconds("minio.retry_backoff_ms")?,
            ..SourceSettings::default()
        })
    }
}

fn half_credentials(given: &str, missing: &str) -> Error {
    Error::new(ErrorCode::InvalidConfiguration, format!("{given} is set and {missing} is not"))
        .hint("set both, or none for public buckets")
}

/// Two threads for each processor, since a thread that waits for the disk decodes nothing; more than four rarely help one
/// disk.
fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(2, |count| (2 * count.get()).clamp(2, 4))
}

/// A target's table: `kind = "lvm"` with `volume_group` and maybe `thin_pool`, or `kind = "dir"` with `path`.
fn target(fields: &toml::Value) -> Result<TargetSettings, String> {
    const FIELDS: [&str; 7] = ["kind", "volume_group", "thin_pool", "path", "zero", "format", "linked"];
    let fields = fields.as_table().ok_or("is not a table")?;
    if let Some(other) = fields.keys().find(|field| !FIELDS.contains(&field.as_str())) {
        return Err(format!("has no setting '{other}'{}", suggestion(other, FIELDS.into_iter())));
    }
    let text = |field: &str| {
        fields
            .get(field)
            .map(|value| value.as_str().ok_or_else(|| format!("has a {field} that is not a text")))
            .transpose()
    };
    let written = match text("kind")? {
        Some("lvm") => {
            let group = text("volume_group")?.ok_or("is of kind lvm and has no volume_group")?;
            text("thin_pool")?.map_or(format!("lvm:{group}"), |pool| format!("lvm:{group}/{pool}"))
        }
        Some("dir") => format!("dir:{}", text("path")?.ok_or("is of kind dir and has no path")?),
        Some(kind) => return Err(format!("has kind '{kind}'; there are lvm and dir")),
        None => return Err("has no kind; there are lvm and dir".to_owned()),
    };
    let not_possible = |invalid: lvp_api::Invalid| format!("is not possible: {invalid}");
    let zero = text("zero")?.map_or(Ok(ZeroPolicy::Full), str::parse).map_err(not_possible)?;
    let format = text("format")?.map_or(Ok(DiskFormat::Raw), str::parse).map_err(not_possible)?;
    let linked = fields.get("linked").map_or(Some(false), toml::Value::as_bool);
    let linked = linked.ok_or("has a linked that is neither true nor false")?;
    let spec: TargetSpec = written.parse().map_err(not_possible)?;
    match (&spec, format, zero) {
        (TargetSpec::Lvm { .. }, DiskFormat::Qcow2, _) => {
            Err("is of kind lvm and has a format; only the files of a dir have one".to_owned())
        }
        (_, DiskFormat::Qcow2, ZeroPolicy::Image) => {
            Err("has format qcow2 and zero image; a qcow2 file has nothing of before to be left".to_owned())
        }
        _ => Ok(TargetSettings { spec, zero, format, linked }),
    }
}

/// A target as it is shown: what differs from the usual stands behind it.
fn shown(settings: &TargetSettings) -> String {
    let mut shown = settings.spec.to_string();
    if settings.zero != ZeroPolicy::Full {
        shown.push_str(&format!(" (zero = {})", settings.zero.name()));
    }
    if settings.format != DiskFormat::Raw {
        shown.push_str(&format!(" (format = {})", settings.format.name()));
    }
    if settings.linked {
        shown.push_str(" (linked)");
    }
    shown
}

/// What is wrong, and on which line; never the line itself, which may hold a key.
fn toml_error(error: &toml::de::Error, text: &str) -> String {
    let line = error.span().map(|span| text[..span.start.min(text.len())].lines().count().max(1));
    format!("line {}: {}", line.unwrap_or(1), error.message().trim().replace('\n', ", "))
}

/// A document as dotted keys.
fn flatten(prefix: &str, table: toml::Table) -> Vec<(String, toml::Value)> {
    let mut all = Vec::new();
    for (key, value) in table {
        let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(inner) => all.extend(flatten(&key, inner)),
            value => all.push((key, value)),
        }
    }
    all
}

fn plain(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(truth) => Some(truth.to_string()),
        toml::Value::Array(list) => list.iter().map(plain).collect::<Option<Vec<_>>>().map(|list| list.join(",")),
        _ => None,
    }
}

fn unknown<'a>(error: Error, name: &str, known: impl Iterator<Item = &'a str>) -> Error {
    match nearest(name, known) {
        Some(near) => error.hint(format!("did you mean {near}?")),
        None => error.hint("`lvp config show` lists all settings"),
    }
}

fn suggestion<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    nearest(name, known).map(|near| format!("; did you mean {near}?")).unwrap_or_default()
}

fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = known.map(|known| (strsim::jaro_winkler(name, known), known)).filter(|(score, _)| *score > 0.8);
    scored.max_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(_, known)| known)
}

#[cfg(test)]
mod tests;
