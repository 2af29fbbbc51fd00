//! The use case: an image from its source to a volume, as a list of steps. The only place where images, formats and
//! volumes meet.
//!
//! ```text
//!  resolve_image ─► check_image ─► claim_volume ─► fetch_image ─► ensure_volume ─► populate_volume ─► finish_volume
//!   source, hit?     gate, at        fits? free?     verified,      made with        image and zeros    fsync, tag
//!                    the source      in use?         gate again     its tags
//!
//!  a volume that was there before                   here                            copy
//!  a new volume                                     (nothing)                       fetched, verified and copied in one
//!                                                                                   pass: see `transfer`
//! ```
//! Everything that can refuse does so before anything is made. What is undone is only what this job made: the volume,
//! if its claim says that there was none before. A volume that was there before is overwritten only after the image is
//! verified, and never removed.

mod admission;
mod context;
mod dry_run;
mod estimate;
mod file_users;
mod in_use;
mod known;
mod new_volume;
mod order;
mod plan;
mod reuse;
mod services;
mod sharing;
mod sweep;
mod transfer;
mod verification;
mod view;

use lvp_api::JobKind;

pub use self::{
    context::Context,
    dry_run::plan,
    estimate::RECEIPTS,
    file_users::file_users,
    in_use::{find_settled, refuse_in_use, users},
    order::Order,
    services::{Keeping, STATE_KEPT, Services},
    sharing::{BaseLocks, all_bases, delete_image},
    sweep::{Left, sweep},
    verification::{valid_receipt, verify_volume},
    view::{view_job, view_volume},
};
#[cfg(feature = "bench")]
pub use self::{
    plan::{examine, resolve},
    transfer::{Transfer, Transferred},
};
use crate::job::Step;

macro_rules! step {
    ($name:literal, $ensure:ident, $undo:ident) => {
        Step { name: $name, ensure: |context| Box::pin(context.$ensure()), undo: |context| Box::pin(context.$undo()) }
    };
}

const PROVISION: &[Step<Context>] = &[
    step!("resolve_image", ensure_image_resolved, undo_nothing),
    step!("check_image", ensure_image_checked, undo_nothing),
    step!("claim_volume", ensure_volume_claimed, undo_nothing),
    step!("fetch_image", ensure_image_fetched, undo_nothing),
    step!("ensure_volume", ensure_volume, undo_volume),
    step!("populate_volume", ensure_volume_populated, undo_volume_populated),
    step!("finish_volume", ensure_volume_finished, undo_nothing),
];

const PREFETCH: &[Step<Context>] = &[
    step!("resolve_image", ensure_image_resolved, undo_nothing),
    step!("check_image", ensure_image_checked, undo_nothing),
    step!("fetch_image", ensure_image_fetched, undo_nothing),
];

/// The steps of a kind of job.
pub fn steps(kind: JobKind) -> &'static [Step<Context>] {
    match kind {
        JobKind::Provision => PROVISION,
        JobKind::Prefetch => PREFETCH,
    }
}
