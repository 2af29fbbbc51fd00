//! The steps of one job: done in order, each recorded before it acts, and taken back from the last to the first.
//!
//! ```text
//!  step 1 started ─► step 1 done, step 2 started ─► … ─► step n started ─► the job's end      forward: one record between two steps
//!  step n undone ─► … ─► step 1 undone ─► the job's end                                       backward: what began, whether it ended or not
//! ```
//! It leaves out when a job is run and how its end is recorded: `runner`.

use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use lvp_api::JobId;
use serde_json::Value;

use super::{Action, Step, store::Store};
use crate::{
    error::{Error, Result},
    fault,
    progress::Progress,
};

/// The steps of one job, and where what they did is recorded.
pub(super) struct Steps<'a, C: 'static> {
    pub id: JobId,
    pub steps: &'static [Step<C>],
    /// What of the context is kept with each step.
    pub record: fn(&C) -> Value,
    pub store: &'a Store,
}

impl<C: Send> Steps<'_, C> {
    /// Does the steps in order, with a word to others after each; gives how many were started.
    pub async fn forward(&self, context: &mut C, progress: &Progress, tell: impl Fn()) -> (Result<()>, usize) {
        for (position, step) in self.steps.iter().enumerate() {
            let record = (self.record)(context);
            // One flush of the database says that the step before is done and that this one begins.
            let begun = match progress.check() {
                Ok(()) => self.store.step(self.id, position, step.name, "started", record).await,
                Err(stop) => self.keep(&self.steps[..position], record).await.and(Err(stop)),
            };
            if let Err(error) = begun {
                return (Err(error), position);
            }
            tracing::debug!(job_id = %self.id, step = step.name, "step begins");
            let result = act(step.ensure, context, step.name, "").await;
            tell();
            if result.is_err() {
                return (result, position + 1);
            }
        }
        (Ok(()), self.steps.len())
    }

    /// Keeps what the steps that are done have found, for the next attempt.
    async fn keep(&self, done: &[Step<C>], record: Value) -> Result<()> {
        match done.last() {
            Some(step) => self.store.step(self.id, done.len() - 1, step.name, "done", record).await,
            None => Ok(()),
        }
    }

    /// Takes the first `reached` steps back, the last first. What cannot be taken back is named in the error.
    pub async fn backward(&self, context: &mut C, reached: usize, mut error: Error) -> Error {
        let mut leftovers = Vec::new();
        for (position, step) in self.steps.iter().enumerate().take(reached).rev() {
            if let Err(failure) = act(step.undo, context, step.name, "undo.").await {
                tracing::error!(job_id = %self.id, step = step.name, error = %failure.chain(), "step could not be undone");
                leftovers.push(Value::String(format!("{}: {}", step.name, failure.chain())));
                continue;
            }
            let recorded = self.store.step(self.id, position, step.name, "undone", (self.record)(context)).await;
            if let Err(failure) = recorded {
                tracing::error!(job_id = %self.id, step = step.name, error = %failure.chain(), "the undoing could not be recorded");
            }
        }
        if !leftovers.is_empty() {
            error = error.detail("not_undone", Value::Array(leftovers));
        }
        error
    }
}

/// Runs an action; a panic in it is an error of the job, not of the daemon.
async fn act<C>(action: Action<C>, context: &mut C, name: &str, undo: &str) -> Result<()> {
    let acted = async {
        fault::point(&format!("{undo}{name}.begin"))?;
        action(context).await?;
        fault::point(&format!("{undo}{name}.end"))
    };
    let acted = AssertUnwindSafe(acted).catch_unwind().await;
    acted.unwrap_or_else(|panic| Err(panicked(&format!("step {undo}{name}"), &*panic)))
}

/// A panic as an error, with what it said.
pub(super) fn panicked(what: &str, panic: &(dyn std::any::Any + Send)) -> Error {
    let said = panic.downcast_ref::<&str>().copied();
    let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("nothing");
    Error::internal(format!("{what} panicked and said: {said}"))
}
