//! Volumes: list, show, verify, adopt, release, delete.

use axum::{
    Extension, Json,
    extract::{Path, State},
    http::StatusCode,
};
use lvp_api::{ErrorBody, Volume, VolumeVerification};
use lvp_engine::{Caller, Engine};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{body::Query, error::Result};

pub fn routes() -> OpenApiRouter<Engine> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show, delete))
        .routes(routes!(verify))
        .routes(routes!(adopt))
        .routes(routes!(release))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct TargetQuery {
    /// The target that the volume lives in; without it, the default one.
    target: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct DeleteQuery {
    /// The target that the volume lives in; without it, the default one.
    target: Option<String>,
    /// Must be true: the volume's content is lost.
    #[serde(default)]
    force: bool,
}

#[utoipa::path(get, path = "/api/v1/volumes", tag = "volumes", summary = "List the volumes of a target",
    description = "All of them, made by lvp or not.", params(TargetQuery),
    responses((status = 200, body = Vec<Volume>), (status = 404, body = ErrorBody)))]
async fn list(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    Query(query): Query<TargetQuery>,
) -> Result<Json<Vec<Volume>>> {
    Ok(Json(engine.volumes(query.target.as_deref(), caller).await?))
}

#[utoipa::path(get, path = "/api/v1/volumes/{name}", tag = "volumes", summary = "Show a volume, and who uses it",
    params(("name" = String, Path), TargetQuery), responses((status = 200, body = Volume), (status = 404, body = ErrorBody)))]
async fn show(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    Query(query): Query<TargetQuery>,
) -> Result<Json<Volume>> {
    Ok(Json(engine.volume(&name, query.target.as_deref(), caller).await?))
}

#[utoipa::path(post, path = "/api/v1/volumes/{name}/verify", tag = "volumes", summary = "Check a volume against its receipt",
    description = "Reads all of it. Only a volume that nobody has used since its provision can be as it was.",
    params(("name" = String, Path), TargetQuery),
    responses((status = 200, body = VolumeVerification), (status = 404, body = ErrorBody), (status = 409, description = "In use", body = ErrorBody)))]
async fn verify(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    Query(query): Query<TargetQuery>,
) -> Result<Json<VolumeVerification>> {
    Ok(Json(engine.verify_volume(&name, query.target.as_deref(), caller).await?))
}

#[utoipa::path(post, path = "/api/v1/volumes/{name}/adopt", tag = "volumes", summary = "Take over a volume",
    description = "From then on it counts as made by lvp, so that `delete` removes it. One that a job left incomplete is not incomplete \
                   any more, so that it stays. Only for who administers this machine.",
    params(("name" = String, Path), TargetQuery),
    responses((status = 200, body = Volume), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, description = "A job works on it", body = ErrorBody)))]
async fn adopt(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    Query(query): Query<TargetQuery>,
) -> Result<Json<Volume>> {
    Ok(Json(engine.adopt_volume(&name, query.target.as_deref(), caller).await?))
}

#[utoipa::path(post, path = "/api/v1/volumes/{name}/release", tag = "volumes", summary = "Give up a volume",
    description = "lvp takes its marks off it and will not remove it any more. Only for who administers this machine.",
    params(("name" = String, Path), TargetQuery),
    responses((status = 200, body = Volume), (status = 403, body = ErrorBody), (status = 404, body = ErrorBody), (status = 409, description = "A job works on it", body = ErrorBody)))]
async fn release(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    Query(query): Query<TargetQuery>,
) -> Result<Json<Volume>> {
    Ok(Json(engine.release_volume(&name, query.target.as_deref(), caller).await?))
}

#[utoipa::path(delete, path = "/api/v1/volumes/{name}", tag = "volumes", summary = "Delete a volume that lvp made",
    params(("name" = String, Path), DeleteQuery),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, description = "In use, not made by lvp, or without force", body = ErrorBody)))]
async fn delete(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    Query(query): Query<DeleteQuery>,
) -> Result<StatusCode> {
    engine.delete_volume(&name, query.target.as_deref(), query.force, caller).await?;
    Ok(StatusCode::NO_CONTENT)
}
