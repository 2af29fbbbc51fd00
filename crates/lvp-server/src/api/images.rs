//! The image cache: list, show, prefetch, verify, pin, delete.

use axum::{
    Extension, Json,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
};
use lvp_api::{BaseVolume, ErrorBody, Image, ImageVerification, PinRequest, PrefetchRequest, Submitted};
use lvp_engine::{Caller, Engine};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::jobs::idempotency_key;
use crate::{body, error::Result};

pub fn routes() -> OpenApiRouter<Engine> {
    OpenApiRouter::new()
        .routes(routes!(list, prefetch))
        .routes(routes!(show, delete))
        .routes(routes!(verify))
        .routes(routes!(pin))
        .routes(routes!(bases))
}

#[utoipa::path(get, path = "/api/v1/images", tag = "images", summary = "List cached images",
    responses((status = 200, body = Vec<Image>)))]
async fn list(State(engine): State<Engine>) -> Result<Json<Vec<Image>>> {
    Ok(Json(engine.images().await?))
}

#[utoipa::path(post, path = "/api/v1/images", tag = "images", summary = "Fetch an image into the cache",
    request_body = PrefetchRequest, responses((status = 202, body = Submitted), (status = "4XX", body = ErrorBody)))]
async fn prefetch(
    State(engine): State<Engine>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body::Json(request): body::Json<PrefetchRequest>,
) -> Result<(StatusCode, Json<Submitted>)> {
    let submitted = engine.prefetch(&request, caller, idempotency_key(&headers)?).await?;
    Ok((StatusCode::ACCEPTED, Json(submitted)))
}

#[utoipa::path(get, path = "/api/v1/images/{image}", tag = "images", summary = "Show a cached image",
    params(("image" = String, Path, description = "Its name, or its digest (12 hexadecimal digits or more)")),
    responses((status = 200, body = Image), (status = 404, body = ErrorBody)))]
async fn show(State(engine): State<Engine>, Path(image): Path<String>) -> Result<Json<Image>> {
    Ok(Json(engine.image(&image).await?))
}

#[utoipa::path(post, path = "/api/v1/images/{image}/verify", tag = "images", summary = "Check a cached image against its digest",
    params(("image" = String, Path)), responses((status = 200, body = ImageVerification), (status = 404, body = ErrorBody)))]
async fn verify(State(engine): State<Engine>, Path(image): Path<String>) -> Result<Json<ImageVerification>> {
    Ok(Json(engine.verify_image(&image).await?))
}

#[utoipa::path(put, path = "/api/v1/images/{image}/pin", tag = "images", summary = "Pin or unpin a cached image",
    params(("image" = String, Path)), request_body = PinRequest,
    responses((status = 200, body = Image), (status = 404, body = ErrorBody)))]
async fn pin(
    State(engine): State<Engine>,
    Path(image): Path<String>,
    body::Json(request): body::Json<PinRequest>,
) -> Result<Json<Image>> {
    Ok(Json(engine.pin_image(&image, request.pinned).await?))
}

#[utoipa::path(get, path = "/api/v1/bases", tag = "images", summary = "List the base volumes of all targets",
    description = "A base holds a decoded image, and volumes made of it share its blocks. It goes with its image.",
    responses((status = 200, body = Vec<BaseVolume>)))]
async fn bases(State(engine): State<Engine>) -> Result<Json<Vec<BaseVolume>>> {
    Ok(Json(engine.bases().await?))
}

#[utoipa::path(delete, path = "/api/v1/images/{image}", tag = "images", summary = "Delete a cached image, and its base volumes",
    params(("image" = String, Path)),
    responses((status = 204), (status = 404, body = ErrorBody), (status = 409, description = "Pinned or in use; or somebody changed its file, which stays", body = ErrorBody)))]
async fn delete(State(engine): State<Engine>, Path(image): Path<String>) -> Result<StatusCode> {
    engine.delete_image(&image).await?;
    Ok(StatusCode::NO_CONTENT)
}
