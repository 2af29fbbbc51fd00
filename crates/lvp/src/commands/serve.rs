//! `lvp serve`: the daemon. It opens the engine, listens, begins to run jobs and serves the API, and stops on SIGTERM or
//! SIGINT: running jobs have their time to end, and are then left to be resumed by the next start. A second signal ends that
//! time.

use std::process::ExitCode;

use lvp_engine::{Error, Prepared, Recovery};
use lvp_server::{Limits, listen};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

use super::Outcome;
use crate::{config::Config, connection::body, open_files};

/// Runs the command.
pub async fn run(config: &Config) -> Outcome {
    let addresses = config.addresses().map_err(body)?;
    listen::check(&addresses).map_err(body)?;
    let (settings, wanted) = (config.engine(Recovery::Resume).map_err(body)?, config.limits().map_err(body)?);
    let connections = open_files::connections(wanted.connections, settings.max_concurrent_jobs, open_files::raise());
    let limits = Limits::of_connections(connections);
    // From here on a signal is a wish to stop, not the end in the middle of a step.
    let mut signals = StopSignals::listen().map_err(body)?;
    let engine = Prepared::open(settings).await.map_err(body)?;
    // Before any job begins: a start that fails here, again and again, must not use up the attempts of jobs.
    let listeners = listen::bind(&addresses).await.map_err(body)?;
    let engine = engine.begin().await.map_err(body)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        address = listeners.tcp_address().map(tracing::field::display),
        socket = addresses.unix.as_ref().map(|path| tracing::field::display(path.display())),
        "serving"
    );
    let (stop, stopped) = watch::channel(false);
    let router = lvp_server::router(engine.clone(), limits);
    let server = tokio::spawn(listen::serve(listeners, router, limits, stopped));
    let name = signals.next().await;
    tracing::info!(signal = name, "stopping; what does not end in its time will be resumed at the next start");
    let hurry = async {
        let name = signals.next().await;
        tracing::info!(signal = name, "stopping at once");
    };
    engine.shutdown_unless(hurry).await;
    let _ = stop.send(true);
    let _ = server.await;
    tracing::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

/// The signals to stop.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Listens for them from now on.
    fn listen() -> lvp_engine::Result<Self> {
        let listen = |kind| signal(kind).map_err(|error| Error::internal("signals cannot be received").source(error));
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// Waits for the next; gives its name.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
