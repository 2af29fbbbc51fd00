//! The metrics page: the engine's series, the request counter, and the process's own figures, in Prometheus' text form.

use std::sync::OnceLock;

use metrics::{counter, describe_counter};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;

const REQUESTS: &str = "libvirt_volume_provisioner_requests_total";

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the process's recorder, once.
pub fn install() {
    HANDLE.get_or_init(|| {
        // Another recorder in the process would be a defect of the binary; the page is then empty, not the daemon down.
        let handle = PrometheusBuilder::new().install_recorder().unwrap_or_else(|error| {
            tracing::error!(%error, "metrics cannot be recorded");
            PrometheusBuilder::new().build_recorder().handle()
        });
        describe_counter!(REQUESTS, "HTTP requests by endpoint, method and status");
        lvp_engine::describe_metrics();
        Collector::default().describe();
        handle
    });
}

/// Counts an answered request. The endpoint is the route's pattern, so that ids make no series.
pub fn request_answered(endpoint: &str, method: &str, status: u16) {
    let labels = [("endpoint", endpoint.to_owned()), ("method", method.to_owned()), ("status", status.to_string())];
    counter!(REQUESTS, &labels).increment(1);
}

/// The page.
pub fn render() -> String {
    Collector::default().collect();
    HANDLE.get().map(PrometheusHandle::render).unwrap_or_default()
}
