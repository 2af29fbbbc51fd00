//! `lvp doctor`: looks at everything that provisioning needs on this host, and prints the fix for what is wrong.

use std::process::ExitCode;

use lvp_api::{Check, HealthStatus, exit};
use lvp_engine::{Recovery, doctor};

use super::Outcome;
use crate::{cli::Output, config::Config, connection::body, output};

/// Runs the command. It needs no daemon and disturbs none.
pub async fn run(config: &Config, output: Output) -> Outcome {
    let checks = doctor::examine(&config.engine(Recovery::Leave).map_err(body)?, &config.socket().map_err(body)?).await;
    output::print(&checks, output, |checks| show(checks))?;
    let broken = checks.iter().any(|check| check.status == HealthStatus::Unhealthy);
    Ok(if broken { ExitCode::from(exit::UNAVAILABLE) } else { ExitCode::SUCCESS })
}

fn show(checks: &[Check]) -> String {
    let mut text = String::new();
    for check in checks {
        let mark = match check.status {
            HealthStatus::Healthy => "ok  ",
            HealthStatus::Degraded => "warn",
            HealthStatus::Unhealthy => "FAIL",
        };
        text.push_str(&format!("{mark}  {:<18} {}\n", check.name, check.message));
        if let Some(hint) = check.hint.as_ref().filter(|_| check.status != HealthStatus::Healthy) {
            text.push_str(&format!("      {:<18} fix: {hint}\n", ""));
        }
    }
    text
}
