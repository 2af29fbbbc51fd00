//! `lvp serve`: the daemon. It opens the engine, serves the API, and stops on SIGTERM or SIGINT, leaving running jobs
//! to be resumed by the next start.

use std::process::ExitCode;

use lvp_engine::{Engine, Error, Recovery};
use lvp_server::listen;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::Outcome;
use crate::{config::Config, connection::body};

/// Runs the command.
pub async fn run(config: &Config) -> Outcome {
    let addresses = config.addresses().map_err(body)?;
    listen::check(&addresses).map_err(body)?;
    let limits = config.limits().map_err(body)?;
    // From here on a signal is a wish to stop, not the end in the middle of a step.
    let signals = stop_signals().map_err(body)?;
    let engine = Engine::open(config.engine(Recovery::Resume).map_err(body)?).await.map_err(body)?;
    let listeners = listen::bind(&addresses).await.map_err(body)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        address = listeners.tcp_address().map(tracing::field::display),
        socket = addresses.unix.as_ref().map(|path| tracing::field::display(path.display())),
        "serving"
    );
    let (stop, stopped) = watch::channel(false);
    let router = lvp_server::router(engine.clone(), limits);
    let server = tokio::spawn(listen::serve(listeners, router, limits, stopped));
    let name = signals.await;
    tracing::info!(signal = name, "stopping; running jobs will be resumed at the next start");
    engine.shutdown().await;
    let _ = stop.send(true);
    let _ = server.await;
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// Listens for signals to stop, from now on; gives the name of the first one.
fn stop_signals() -> lvp_engine::Result<impl Future<Output = &'static str>> {
    let listen = |kind| signal(kind).map_err(|error| Error::internal("signals cannot be received").source(error));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}
