//! Health and metrics.
//!
//! `/healthz` and `/livez` say that the process answers; `/readyz` and `/health` look at what it needs, and answer 503
//! when something it needs is not usable. `/health` gives the reasons.

use axum::{Json, extract::State, http::StatusCode, response::IntoResponse};
use lvp_api::{Health, HealthStatus};
use lvp_engine::Engine;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::metrics;

pub fn routes() -> OpenApiRouter<Engine> {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(readyz))
        .routes(routes!(healthz))
        .routes(routes!(livez))
        .routes(routes!(page))
}

fn code(health: &Health) -> StatusCode {
    if health.status == HealthStatus::Unhealthy { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

#[utoipa::path(get, path = "/health", tag = "health", summary = "Health, with reasons",
    responses((status = 200, body = Health), (status = 503, body = Health)))]
async fn health(State(engine): State<Engine>) -> (StatusCode, Json<Health>) {
    let health = engine.health().await;
    (code(&health), Json(health))
}

#[utoipa::path(get, path = "/readyz", tag = "health", summary = "Whether jobs can run",
    responses((status = 200, body = Health), (status = 503, body = Health)))]
async fn readyz(State(engine): State<Engine>) -> (StatusCode, Json<Health>) {
    let health = engine.health().await;
    (code(&health), Json(health))
}

#[utoipa::path(get, path = "/healthz", tag = "health", summary = "Whether the process answers", responses((status = 200, body = String)))]
async fn healthz() -> &'static str {
    "ok"
}

#[utoipa::path(get, path = "/livez", tag = "health", summary = "Whether the process answers", responses((status = 200, body = String)))]
async fn livez() -> &'static str {
    "ok"
}

#[utoipa::path(get, path = "/metrics", tag = "health", summary = "Metrics in Prometheus' text form",
    responses((status = 200, content_type = "text/plain", body = String)))]
async fn page() -> impl IntoResponse {
    ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], metrics::render())
}
