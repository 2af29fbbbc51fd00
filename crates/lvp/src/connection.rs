//! How a command reaches an engine: the daemon at `--server`, the daemon of this machine at its socket, or an engine in
//! this very process.
//!
//! ```text
//!  --server URL ─────────────────────────► Client
//!  (nothing) and the socket answers ─────► Client
//!  --local, or no daemon ─► Engine ─► the same API on a private socket ─► Client
//! ```
//! So every command is written once, against the client, and behaves the same with and without a daemon.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use lvp_api::{ErrorBody, ErrorCode, client::Client};
use lvp_engine::{Engine, Error, Recovery};
use lvp_server::listen::{self, Addresses};
use tokio::{net::UnixStream, sync::watch, task::JoinHandle};

use crate::{cli::Global, config::Config};

/// A locked state is tried again after this long.
const LOCK_WAIT: Duration = Duration::from_millis(300);

/// A reachable engine.
pub struct Connection {
    /// The client to talk to it.
    pub client: Client,
    local: Option<LocalEngine>,
}

/// An engine in this process, and its private API.
struct LocalEngine {
    engine: Engine,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
    _directory: tempfile::TempDir,
}

impl Connection {
    /// Reaches an engine. `recovery`: what an engine of this process does with jobs that an earlier one left.
    pub async fn open(global: &Global, config: &Config, recovery: Recovery) -> Result<Self, Box<ErrorBody>> {
        if let Some(url) = global.server.as_ref().filter(|_| !global.local) {
            return Ok(Self { client: Client::at(url)?, local: None });
        }
        if let Some(socket) = daemon_socket(config).await.map_err(body)? {
            if global.local {
                let said = format!("a daemon runs on this machine and answers at {}", socket.display());
                let error = Error::new(ErrorCode::StateLocked, said).retry(false);
                return Err(body(error.hint("leave out --local: the command then has the daemon do it")));
            }
            return Ok(Self { client: Client::at_socket(&socket)?, local: None });
        }
        let local = LocalEngine::start_in_turn(config, recovery).await.map_err(body)?;
        Ok(Self { client: Client::at_socket(&socket_in(local._directory.path()))?, local: Some(local) })
    }

    /// Whether the engine ends with this process.
    pub fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// Ends the connection, and the engine if it is this process's.
    pub async fn close(self) {
        if let Some(local) = self.local {
            local.engine.shutdown().await;
            let _ = local.stop.send(true);
            let _ = local.server.await;
        }
    }
}

impl LocalEngine {
    /// Starts, after any other command that works without a daemon: two at once are two in a row. A command that only
    /// looks does not wait.
    async fn start_in_turn(config: &Config, recovery: Recovery) -> lvp_engine::Result<Self> {
        let mut told = false;
        loop {
            match Self::start(config, recovery).await {
                Err(error) if error.code() == ErrorCode::StateLocked && recovery == Recovery::Undo => {
                    if !told {
                        eprintln!("waiting: {}", error.chain());
                        told = true;
                    }
                    tokio::time::sleep(LOCK_WAIT).await;
                }
                result => return result,
            }
        }
    }

    async fn start(config: &Config, recovery: Recovery) -> lvp_engine::Result<Self> {
        let engine = Engine::open(config.engine(recovery)?).await?;
        // Made with mode 0700, so that nobody else reaches the socket in it.
        let directory = tempfile::Builder::new().prefix("lvp-").tempdir().map_err(|error| {
            Error::new(ErrorCode::InputOutput, "no temporary directory could be made")
                .source(error)
                .hint("check TMPDIR and its space")
        })?;
        let listeners = listen::bind(&Addresses { tcp: None, unix: Some(socket_in(directory.path())) }).await?;
        let (stop, stopped) = watch::channel(false);
        let limits = config.limits()?;
        let router = lvp_server::router(engine.clone(), limits);
        let server = tokio::spawn(listen::serve(listeners, router, limits, stopped));
        Ok(Self { engine, stop, server, _directory: directory })
    }
}

fn socket_in(directory: &Path) -> PathBuf {
    directory.join("lvp.sock")
}

/// The socket of this machine's daemon, if one answers there. One that answers but may not be talked to is an error,
/// because to work beside it would not do.
async fn daemon_socket(config: &Config) -> lvp_engine::Result<Option<PathBuf>> {
    let socket = config.socket()?;
    match UnixStream::connect(&socket).await {
        Ok(_) => Ok(Some(socket)),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Err(Error::new(
            ErrorCode::DaemonUnreachable,
            format!("the daemon's socket {} may not be opened by this user", socket.display()),
        )
        .source(error)
        .hint("run the command as root, or name a daemon with --server http://127.0.0.1:8080")
        .retry(false)),
        Err(_) => Ok(None),
    }
}

/// The engine's error as the command line prints it.
#[allow(clippy::needless_pass_by_value, reason = "it stands in map_err, which gives the error away")]
pub fn body(error: Error) -> Box<ErrorBody> {
    Box::new(error.to_body())
}
