//! Listens and serves: loopback TCP and the Unix socket, both with limits on slow clients, until told to stop.
//!
//! It speaks HTTP/1.1 only: nothing that talks to it needs HTTP/2, whose clients say themselves how much of an answer may be
//! sent, and so could keep answers here for as long as they like; who reads nothing of an answer over HTTP/1.1 is found out
//! by the kernel.
//!
//! It fails closed: there is no authentication yet, so an address that others can reach is refused. Over the Unix
//! socket, whose file only its owner may open, the caller is the administrator; over TCP anybody on this machine may
//! call, so requests that read local files or name arbitrary places are refused there.

use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    extract::Request,
    http::header::{HOST, ORIGIN},
    response::{IntoResponse, Response},
};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use lvp_api::ErrorCode;
use lvp_engine::{Caller, Error};
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tower::ServiceExt;

use crate::{error::Failure, limits::Limits};

/// The head of a request is at most this long: more than any client sends.
const LONGEST_HEAD: usize = 64 << 10;
/// After a connection could not be accepted, the next one is waited for so long: descriptors are out, most likely.
const AFTER_ERROR: Duration = Duration::from_millis(100);
/// Connections that are open when the server stops have this long to end.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Where to listen.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// Host and port; `None`: no TCP.
    pub tcp: Option<(String, u16)>,
    /// The Unix socket's file; `None`: no Unix socket.
    pub unix: Option<PathBuf>,
}

/// Open listeners.
#[derive(Debug)]
pub struct Listeners {
    tcp: Option<TcpListener>,
    unix: Option<(UnixListener, PathBuf)>,
}

/// Opens the listeners.
///
/// # Errors
/// `not_permitted` for a TCP address that is not loopback; `state_locked` when the socket or port is served already.
pub async fn bind(addresses: &Addresses) -> lvp_engine::Result<Listeners> {
    let tcp = match &addresses.tcp {
        Some((host, port)) => Some(bind_tcp(host, *port).await?),
        None => None,
    };
    let unix = match &addresses.unix {
        Some(path) => Some((bind_unix(path).await?, path.clone())),
        None => None,
    };
    Ok(Listeners { tcp, unix })
}

impl Listeners {
    /// The TCP address in use; tells the port when 0 was asked for.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|listener| listener.local_addr().ok())
    }
}

/// Refuses addresses that must not be served, before anything is opened.
///
/// # Errors
/// `not_permitted` for a TCP address that is not loopback; `invalid_configuration` for one that is none.
pub fn check(addresses: &Addresses) -> lvp_engine::Result<()> {
    addresses.tcp.as_ref().map_or(Ok(()), |(host, port)| loopback(host, *port).map(drop))
}

fn cannot_listen(host: &str, port: u16, why: &std::io::Error) -> Error {
    Error::new(ErrorCode::InvalidConfiguration, format!("cannot listen on {host} port {port}: {why}"))
        .hint("set HOST to 127.0.0.1")
}

/// The addresses of a host, all of which must be loopback.
fn loopback(host: &str, port: u16) -> lvp_engine::Result<Vec<SocketAddr>> {
    let addresses: Vec<SocketAddr> =
        (host, port).to_socket_addrs().map_err(|error| cannot_listen(host, port, &error))?.collect();
    if let Some(open) = addresses.iter().find(|address| !address.ip().is_loopback()) {
        return Err(Error::new(
            ErrorCode::NotPermitted,
            format!(
                "HOST={host} ({}) can be reached from other machines, and this lvp has no authentication yet",
                open.ip()
            ),
        )
        .hint("set HOST=127.0.0.1 and reach it through ssh or a proxy that authenticates"));
    }
    Ok(addresses)
}

async fn bind_tcp(host: &str, port: u16) -> lvp_engine::Result<TcpListener> {
    let addresses = loopback(host, port)?;
    TcpListener::bind(addresses.as_slice()).await.map_err(|error| {
        if error.kind() == std::io::ErrorKind::AddrInUse {
            return Error::new(ErrorCode::StateLocked, format!("{host} port {port} is served by another program"))
                .hint("set PORT to a free one, or stop the other program");
        }
        cannot_listen(host, port, &error)
    })
}

async fn bind_unix(path: &Path) -> lvp_engine::Result<UnixListener> {
    let failed = |error: std::io::Error| {
        Error::new(ErrorCode::InvalidConfiguration, format!("cannot listen on {}", path.display()))
            .source(error)
            .hint("set LVP_SOCKET to a path (of at most 107 characters) in a directory that this user may write to")
    };
    if UnixStream::connect(path).await.is_ok() {
        return Err(Error::new(ErrorCode::StateLocked, format!("{} is served by another process", path.display())));
    }
    // Nobody answers: the file is what a process left that was killed.
    let is_socket = std::fs::symlink_metadata(path)
        .is_ok_and(|metadata| std::os::unix::fs::FileTypeExt::is_socket(&metadata.file_type()));
    if is_socket {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// Serves until `stop` turns true, then lets open requests end, for a while.
pub async fn serve(listeners: Listeners, router: Router, limits: Limits, mut stop: watch::Receiver<bool>) {
    let graceful = GracefulShutdown::new();
    let over_tcp = router.clone().layer(axum::Extension(Caller::Anybody));
    let over_unix = router.layer(axum::Extension(Caller::Administrator));
    let slots = || Arc::new(Semaphore::new(limits.connections));
    let (tcp_slots, unix_slots) = (slots(), slots());
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            (stream, slot) = accept_tcp(listeners.tcp.as_ref(), &tcp_slots) => {
                end_when_nothing_is_taken(&stream, limits.patience);
                connect(stream, &over_tcp, limits, slot, &graceful);
            }
            (stream, slot) = accept_unix(listeners.unix.as_ref(), &unix_slots) => {
                connect(stream, &over_unix, limits, slot, &graceful);
            }
        }
    }
    if let Some((_, path)) = &listeners.unix {
        let _ = std::fs::remove_file(path);
    }
    drop(listeners);
    if tokio::time::timeout(STOP_LIMIT, graceful.shutdown()).await.is_err() {
        tracing::info!("connections still open are cut");
    }
}

async fn accept_tcp(listener: Option<&TcpListener>, slots: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    let Some(listener) = listener else { return std::future::pending().await };
    accept(slots, || async { listener.accept().await.map(|(stream, _)| stream) }).await
}

/// Has the kernel end a connection whose client takes nothing of what was sent for so long: it is gone, or does not read
/// (`TCP_USER_TIMEOUT` of tcp(7)). Who uses the Unix socket may let an answer wait: it is the administrator.
fn end_when_nothing_is_taken(stream: &TcpStream, patience: Duration) {
    let milliseconds = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    if let Err(error) = set_tcp_user_timeout(stream, milliseconds) {
        tracing::debug!(%error, "a client that does not read is waited for");
    }
}

async fn accept_unix(
    listener: Option<&(UnixListener, PathBuf)>,
    slots: &Arc<Semaphore>,
) -> (UnixStream, OwnedSemaphorePermit) {
    let Some((listener, _)) = listener else { return std::future::pending().await };
    accept(slots, || async { listener.accept().await.map(|(stream, _)| stream) }).await
}

/// The next connection, once there is a slot for it: until then it waits where the kernel keeps it.
async fn accept<T, F: Future<Output = std::io::Result<T>>>(
    slots: &Arc<Semaphore>,
    next: impl Fn() -> F,
) -> (T, OwnedSemaphorePermit) {
    let slot = match slots.clone().acquire_owned().await {
        Ok(slot) => slot,
        // Nobody closes it.
        Err(_) => return std::future::pending().await,
    };
    loop {
        match next().await {
            Ok(stream) => return (stream, slot),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(AFTER_ERROR).await;
            }
        }
    }
}

fn connect(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: &Router,
    limits: Limits,
    slot: OwnedSemaphorePermit,
    graceful: &GracefulShutdown,
) {
    let router = router.clone();
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        router.clone().oneshot(request.map(axum::body::Body::new))
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(limits.patience).max_buf_size(LONGEST_HEAD);
    let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
    tokio::spawn(async move {
        let _slot = slot;
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection broke off");
        }
    });
}

/// Refuses requests over TCP that a web page could make a browser send here: under a name of its own (DNS rebinding: the
/// `Host` is then not this machine's), or from its own place (the `Origin` is then not this machine's).
pub(crate) async fn local_host_only(request: Request) -> Result<Request, Response> {
    if request.extensions().get::<Caller>() == Some(&Caller::Administrator) {
        return Ok(request);
    }
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    let host = header(HOST).or(request.uri().authority().map(|authority| authority.as_str()));
    let origin = header(ORIGIN).map(|origin| origin.split_once("://").map_or(origin, |(_, host)| host));
    let stranger = [host, origin].into_iter().flatten().find(|host| !is_this_machine(host)).map(str::to_owned);
    match stranger {
        None => Ok(request),
        Some(host) => {
            let said = format!("this daemon serves localhost only, not '{}'", host.escape_debug());
            Err(Failure::new(ErrorCode::NotPermitted, said).into_response())
        }
    }
}

/// Whether a host, maybe with a port, is loopback.
fn is_this_machine(host: &str) -> bool {
    let port = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let name = port.map_or(host, |(name, _)| name);
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_this_machine() {
        for host in ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]", "[::1]:80", "127.9.9.9"] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in ["example.com", "localhost.example.com:80", "10.0.0.1", "null", "", "[fe80::1]:80"] {
            assert!(!is_this_machine(host), "{host}");
        }
    }
}
