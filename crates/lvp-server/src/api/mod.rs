//! The routes, by subject, and the OpenAPI document that is made from them.

mod health;
mod images;
mod jobs;
mod volumes;

use axum::{Json, Router, response::IntoResponse, routing::get};
use lvp_api::{ErrorBody, ErrorCode};
use lvp_engine::Engine;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::error::Failure;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "libvirt-volume-provisioner",
        description = "From a VM image in an object store to a volume on this host. Every error has the body `ErrorBody`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    components(schemas(ErrorBody))
)]
struct Document;

fn described() -> OpenApiRouter<Engine> {
    OpenApiRouter::with_openapi(Document::openapi())
        .merge(jobs::routes())
        .merge(images::routes())
        .merge(volumes::routes())
        .merge(health::routes())
}

/// The OpenAPI document of the API.
pub fn openapi() -> utoipa::openapi::OpenApi {
    described().to_openapi()
}

/// All routes over this engine.
pub fn router(engine: Engine) -> Router {
    let (router, document) = described().split_for_parts();
    router
        .route("/api/openapi.json", get(move || async move { Json(document) }))
        .fallback(|| async {
            Failure::new(ErrorCode::RouteNotFound, "there is no such path in the API; see /api/openapi.json")
                .into_response()
        })
        .method_not_allowed_fallback(|| async {
            Failure::new(ErrorCode::MethodNotAllowed, "this path does not take this method; see /api/openapi.json")
                .into_response()
        })
        .with_state(engine)
}
