//! Where log lines go: stderr, as text or as JSON lines.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::Config;

/// Begins logging. `usual`: the level when none is configured.
pub fn start(config: &Config, usual: &str) {
    let wanted = config.log_level().unwrap_or(usual);
    let filter = EnvFilter::try_new(wanted).unwrap_or_else(|error| {
        eprintln!("warning: log_level '{wanted}' cannot be read ({error}); using {usual}");
        EnvFilter::new(usual)
    });
    let json = match config.log_format() {
        "json" => true,
        "text" => false,
        _ => !stderr().is_terminal(),
    };
    let registry = tracing_subscriber::registry().with(filter);
    let lines = fmt::layer().with_writer(stderr);
    let started = if json {
        registry.with(lines.json().flatten_event(true)).try_init()
    } else {
        registry.with(lines.with_ansi(stderr().is_terminal())).try_init()
    };
    debug_assert!(started.is_ok(), "logging is started once");
}
