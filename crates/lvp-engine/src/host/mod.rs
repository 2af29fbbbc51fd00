//! The only code that starts programs ([`cmd`]), touches block devices ([`block`]) or speaks to libvirt ([`libvirt`]).
//! It leaves out every decision: it does one thing to the host and says what came of it.

pub mod block;
pub mod cmd;
pub mod confine;
pub mod libvirt;
pub mod lock;
mod outstanding;
pub mod pressure;
pub mod priority;
