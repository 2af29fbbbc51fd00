//! The scenarios on real LVM, libvirt and MinIO: `make e2e`, or with a part of a name to run only those.
//!
//! One machine is booted for all of them and made as it was before each; they run one after the other. When one
//! fails, the machine's logs are in `target/e2e/NAME/`. A scenario is a function that gets the world and returns a
//! result, and a line in the table of its module. It leaves out the scenarios: one module per subject.

mod bases;
mod cache;
mod command;
mod conformance;
mod interruption;
mod linked;
mod provision;
mod queue;
mod refusal;
mod reuse;
mod smoke;
mod source;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::Result;
use e2e::bed::{self, World};
use libtest_mimic::{Arguments, Failed, Trial};

/// A name, which says what is so when it passes, and what it does.
type Scenario = (&'static str, fn(&World) -> Result<()>);

/// Every subject and its scenarios.
const SUBJECTS: &[(&str, &[Scenario])] = &[
    ("smoke", smoke::SCENARIOS),
    ("conformance", conformance::SCENARIOS),
    ("provision", provision::SCENARIOS),
    ("bases", bases::SCENARIOS),
    ("linked", linked::SCENARIOS),
    ("reuse", reuse::SCENARIOS),
    ("refusal", refusal::SCENARIOS),
    ("source", source::SCENARIOS),
    ("interruption", interruption::SCENARIOS),
    ("queue", queue::SCENARIOS),
    ("cache", cache::SCENARIOS),
    ("command", command::SCENARIOS),
];

/// What one job, or one command that waits for a job, may take in the emulated machine.
const JOB: Duration = Duration::from_secs(300);

/// Booted by the first scenario that runs, so that `--list` does not.
type Shared = Arc<OnceLock<Result<World>>>;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let world = Shared::default();
    let mut trials = Vec::new();
    for (subject, scenarios) in SUBJECTS {
        trials.extend(scenarios.iter().map(|(name, scenario)| trial(format!("{subject}::{name}"), *scenario, &world)));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Ends the machine and MinIO: nothing else holds the world now.
    drop(world);
    conclusion.exit_code()
}

fn trial(name: String, scenario: fn(&World) -> Result<()>, world: &Shared) -> Trial {
    let world = Arc::clone(world);
    Trial::test(name.clone(), move || {
        let world = match world.get_or_init(start) {
            Ok(world) => world,
            Err(error) => return Err(Failed::from(format!("the test bed does not stand: {error:#}"))),
        };
        let begun = Instant::now();
        let outcome = world.reset().and_then(|()| run(scenario, world));
        eprint!("[{:5.1} s] ", begun.elapsed().as_secs_f32());
        outcome.map_err(|error| Failed::from(format!("{error:#}\n{}", collect_logs(world, &name))))
    })
}

/// Runs a scenario; a panic in it is a failure like any other, so that its logs are collected too.
fn run(scenario: fn(&World) -> Result<()>, world: &World) -> Result<()> {
    let unwound = |panic: Box<dyn std::any::Any + Send>| {
        let words = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        anyhow::anyhow!("panicked: {}", words.unwrap_or("without words"))
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| scenario(world))).map_err(unwound)?
}

fn start() -> Result<World> {
    let begun = Instant::now();
    // Logs that are there afterwards are of this run.
    let _ = std::fs::remove_dir_all(logs());
    let world = World::start()?;
    eprintln!("test bed: {} in the machine after {} s", world.binary.display(), begun.elapsed().as_secs());
    Ok(world)
}

fn collect_logs(world: &World, name: &str) -> String {
    let directory = logs().join(name.replace("::", "-"));
    match world.vm.collect_logs(&directory) {
        Ok(()) => format!("logs: {}", directory.display()),
        Err(error) => format!("the logs could not be collected: {error:#}"),
    }
}

fn logs() -> PathBuf {
    bed::target_directory().join("e2e")
}
