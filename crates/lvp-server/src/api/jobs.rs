//! Provisioning and jobs: submit, show, list, cancel, follow. Both path forms of the seed are the same handlers.

use std::{convert::Infallible, time::Duration};

use axum::{
    Extension, Json,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures::{Stream, StreamExt};
use lvp_api::{ErrorBody, ErrorCode, Job, JobId, JobList, JobStatus, Plan, ProvisionRequest, Submitted};
use lvp_engine::{Caller, Engine};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    body::{self, Query},
    error::{Failure, Result},
    limits::Followers,
};

/// An idempotency key is at most this long.
const LONGEST_KEY: usize = 128;

pub fn routes() -> OpenApiRouter<Engine> {
    OpenApiRouter::new()
        .routes(routes!(provision))
        .routes(routes!(list, submit))
        .routes(routes!(status))
        .routes(routes!(show, remove))
        .routes(routes!(cancel))
        .routes(routes!(events))
}

/// The id in a path.
pub(super) fn job_id(text: &str) -> Result<JobId> {
    text.parse().map_err(|invalid: lvp_api::Invalid| Failure::new(ErrorCode::InvalidJobId, invalid.0))
}

/// The key of the `Idempotency-Key` header.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    match value.to_str() {
        Ok(key) if (1..=LONGEST_KEY).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(Failure::new(
            ErrorCode::InvalidField,
            format!("the Idempotency-Key has not 1 to {LONGEST_KEY} visible characters"),
        )),
    }
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ProvisionQuery {
    /// Only answer what would be done; also as a field of the body.
    #[serde(default)]
    dry_run: bool,
}

#[utoipa::path(
    post, path = "/api/v1/provision", tag = "jobs",
    summary = "Provision a volume",
    params(ProvisionQuery, ("Idempotency-Key" = Option<String>, Header, description = "The same key and body give the same job")),
    request_body = ProvisionRequest,
    responses((status = 202, body = Submitted), (status = 200, description = "The plan of a dry run; what would be refused has no plan, but the error that the job would fail with", body = Plan), (status = "4XX", body = ErrorBody)),
)]
async fn provision(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<ProvisionQuery>,
    headers: HeaderMap,
    body::Json(request): body::Json<ProvisionRequest>,
) -> Result<Response> {
    accept(&engine, caller, &query, &headers, request).await
}

#[utoipa::path(
    post, path = "/api/v1/jobs", tag = "jobs",
    summary = "Provision a volume",
    params(ProvisionQuery, ("Idempotency-Key" = Option<String>, Header, description = "The same key and body give the same job")),
    request_body = ProvisionRequest,
    responses((status = 202, body = Submitted), (status = 200, description = "The plan of a dry run; what would be refused has no plan, but the error that the job would fail with", body = Plan), (status = "4XX", body = ErrorBody)),
)]
async fn submit(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<ProvisionQuery>,
    headers: HeaderMap,
    body::Json(request): body::Json<ProvisionRequest>,
) -> Result<Response> {
    accept(&engine, caller, &query, &headers, request).await
}

async fn accept(
    engine: &Engine,
    caller: Caller,
    query: &ProvisionQuery,
    headers: &HeaderMap,
    request: ProvisionRequest,
) -> Result<Response> {
    if request.dry_run || query.dry_run {
        return Ok(Json(engine.plan(&request, caller).await?).into_response());
    }
    let submitted = engine.provision(&request, caller, idempotency_key(headers)?).await?;
    Ok((StatusCode::ACCEPTED, Json(submitted)).into_response())
}

#[utoipa::path(get, path = "/api/v1/status/{id}", tag = "jobs", summary = "Show a job",
    params(("id" = String, Path)), responses((status = 200, body = Job), (status = 404, body = ErrorBody)))]
async fn status(State(engine): State<Engine>, Path(id): Path<String>) -> Result<Json<Job>> {
    Ok(Json(engine.job(job_id(&id)?).await?))
}

#[utoipa::path(get, path = "/api/v1/jobs/{id}", tag = "jobs", summary = "Show a job",
    params(("id" = String, Path)), responses((status = 200, body = Job), (status = 404, body = ErrorBody)))]
async fn show(State(engine): State<Engine>, Path(id): Path<String>) -> Result<Json<Job>> {
    Ok(Json(engine.job(job_id(&id)?).await?))
}

#[utoipa::path(delete, path = "/api/v1/cancel/{id}", tag = "jobs", summary = "Cancel a job",
    description = "Stops the writer and takes back what the job did. The answer may still say `running`: it has ended when its status says so.",
    params(("id" = String, Path)), responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn cancel(State(engine): State<Engine>, Path(id): Path<String>) -> Result<Json<Job>> {
    Ok(Json(engine.cancel(job_id(&id)?).await?))
}

#[utoipa::path(delete, path = "/api/v1/jobs/{id}", tag = "jobs", summary = "Cancel a job",
    description = "Stops the writer and takes back what the job did. The answer may still say `running`: it has ended when its status says so.",
    params(("id" = String, Path)), responses((status = 200, body = Job), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
async fn remove(State(engine): State<Engine>, Path(id): Path<String>) -> Result<Json<Job>> {
    Ok(Json(engine.cancel(job_id(&id)?).await?))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Only jobs with this status.
    status: Option<String>,
    /// Only jobs made before this one: the `next` of the page before.
    before: Option<String>,
    /// This many at most, 1 to 500; 50 when not given.
    limit: Option<u32>,
}

#[utoipa::path(get, path = "/api/v1/jobs", tag = "jobs", summary = "List jobs, newest first",
    params(ListQuery), responses((status = 200, body = JobList), (status = 400, body = ErrorBody)))]
async fn list(State(engine): State<Engine>, Query(query): Query<ListQuery>) -> Result<Json<JobList>> {
    let invalid = |invalid: lvp_api::Invalid| Failure::new(ErrorCode::InvalidField, invalid.0);
    let status = query.status.map(|status| status.parse::<JobStatus>()).transpose().map_err(invalid)?;
    let before = query.before.as_deref().map(job_id).transpose()?;
    let limit = query.limit.unwrap_or(50);
    if !(1..=500).contains(&limit) {
        return Err(Failure::new(ErrorCode::InvalidField, "limit is not between 1 and 500"));
    }
    Ok(Json(engine.jobs(status, before, limit).await?))
}

#[utoipa::path(get, path = "/api/v1/jobs/{id}/events", tag = "jobs", summary = "Follow a job",
    description = "Server-sent events: `progress` with the job as data while it goes on, then one event named after its end (`completed`, `failed`, `cancelled`), then the stream closes.",
    params(("id" = String, Path)),
    responses((status = 200, content_type = "text/event-stream", body = Job), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
async fn events(
    State(engine): State<Engine>,
    Extension(followers): Extension<Followers>,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = std::result::Result<Event, Infallible>>>> {
    let id = job_id(&id)?;
    engine.job(id).await?;
    let place = followers.join()?;
    let events = engine.watch(id).filter_map(move |job| {
        let _held = &place;
        async move {
            // An error here is a job that was pruned or a database that is gone: the stream ends, the client asks again.
            let job = job.ok()?;
            let name = if job.status.is_terminal() { job.status.name() } else { "progress" };
            Some(Ok(Event::default().event(name).json_data(&job).unwrap_or_default()))
        }
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(15))))
}
