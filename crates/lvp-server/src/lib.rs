//! The HTTP API of lvp over its engine: routes, bodies, errors, events, metrics, listeners.
//!
//! ```text
//!  listen ─► layers (request id, log, metrics, limits) ─► api/* ─► lvp_engine::Engine
//! ```
//! It holds no state of its own and knows only [`Engine`]. It leaves out authentication: until there is some, it
//! serves loopback and the Unix socket only, and refuses anything else ([`listen::bind`]).

mod api;
mod body;
mod error;
mod layers;
mod limits;
pub mod listen;
mod metrics;

pub use api::openapi;
use axum::Router;
use lvp_engine::Engine;

pub use crate::limits::Limits;

/// The whole API over this engine, ready to be served by [`listen::serve`].
pub fn router(engine: Engine, limits: Limits) -> Router {
    metrics::install();
    layers::apply(api::router(engine), limits)
}
