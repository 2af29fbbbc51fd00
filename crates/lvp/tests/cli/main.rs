//! The binary as its user has it: commands without and with a daemon, exit codes, signals. One module per subject.

mod bed;
mod configuration;
mod daemon;
mod errors;
mod local;
