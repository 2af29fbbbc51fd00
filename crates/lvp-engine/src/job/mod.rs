//! Jobs: which may run next ([`queue`]), running them ([`runner`]) step by step ([`steps`]), keeping them ([`store`]) and
//! reading them ([`row`]), and who has what a job is about ([`hold`]).
//!
//! It knows nothing of images and volumes: a job is a request, a record and a list of [`Step`]s, all given by
//! `provision`.
//!
//! ```text
//!  step:   (absent) ─► started ─► done
//!                         │         │        undo runs backwards over everything started
//!                         └────┬────┘
//!                              ▼
//!                           undone
//! ```

mod hold;
mod queue;
mod row;
mod runner;
mod steps;
mod store;

use futures::future::BoxFuture;

pub use self::{
    row::unreadable,
    runner::{Execution, Recovery, Runner},
    store::{Filter, NewJob, RunBy, Store, Stored},
};
use crate::error::Result;

/// What a step does to its job's context.
pub type Action<C> = for<'a> fn(&'a mut C) -> BoxFuture<'a, Result<()>>;

/// One step of a job: an action that may be run again after an interruption, and what takes it back.
pub struct Step<C> {
    /// Its name in the database and in the log.
    pub name: &'static str,
    /// Makes it so; when it is so already, does nothing.
    pub ensure: Action<C>,
    /// Takes back what this job did here, and only that; run also when `ensure` failed half-way.
    pub undo: Action<C>,
}
