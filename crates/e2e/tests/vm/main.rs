//! The scenarios on real LVM, libvirt and MinIO: `make e2e`, or with a part of a name to run only those.
//!
//! A machine is made as it was before each of them. There are two where there are processors for them
//! (`TEST_BED_MACHINES` says otherwise), and each runs one scenario at a time: an emulated machine keeps hardly more than
//! one processor busy. When a scenario fails, its machine's logs are in `target/e2e/NAME/`. A scenario is a function that
//! gets the world and returns a result, and a line in the table of its module. It leaves out the scenarios: one module
//! per subject.

mod bases;
mod cache;
mod command;
mod conformance;
mod fault_host;
mod fault_lvm;
mod fault_matrix;
mod fault_people;
mod fault_pressure;
mod fault_soak;
mod fault_storage;
mod interruption;
mod linked;
mod provision;
mod queue;
mod refusal;
mod reuse;
mod smoke;
mod source;
mod waiting;

use std::{
    env,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
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
    ("fault_matrix", fault_matrix::SCENARIOS),
    ("fault_storage", fault_storage::SCENARIOS),
    ("fault_lvm", fault_lvm::SCENARIOS),
    ("fault_people", fault_people::SCENARIOS),
    ("fault_host", fault_host::SCENARIOS),
    ("fault_pressure", fault_pressure::SCENARIOS),
    ("fault_soak", fault_soak::SCENARIOS),
];

/// Those that `make faults` runs and CI does not: they take long, and what they show others show in part, or tests without the
/// machine.
const LONG: &[&str] = &[
    "smoke::a_paused_domain_holds_its_disk",
    "smoke::disks_survive_a_power_cut",
    "smoke::every_byte_of_a_volume_is_compared",
    "smoke::reset_takes_away_what_was_left",
    "provision::a_configured_target_is_named_either_way",
    "provision::every_kind_of_image_is_written",
    "provision::the_curl_lines_work_under_jobs",
    "conformance::volumes_and_bases_on_lvm",
    "bases::a_half_made_base_of_a_killed_job_is_never_used",
    "bases::a_pool_that_does_not_zero_has_no_base",
    "bases::volumes_stay_whole_when_their_base_goes",
    "reuse::a_thin_volume_is_left_alone_by_the_targets_of_other_pools",
    "reuse::a_volume_smaller_than_the_image_is_refused_and_untouched",
    "reuse::a_volume_within_five_percent_is_reused",
    "reuse::an_unverified_image_changes_no_byte_of_a_volume",
    "refusal::a_mounted_volume_is_in_use",
    "refusal::a_pool_is_no_volume",
    "refusal::a_volume_below_an_overlay_of_a_domain_is_in_use",
    "refusal::a_volume_that_a_program_has_open_is_in_use",
    "refusal::an_image_larger_than_its_thin_pool_is_refused",
    "interruption::a_cancel_of_a_reused_volume_keeps_it_and_says_that_it_is_incomplete",
    "interruption::a_job_survives_a_power_cut",
    "interruption::a_job_that_was_to_be_cancelled_when_killed_is_taken_back",
    "interruption::a_killed_download_resumes_and_completes",
    "queue::two_jobs_run_and_a_third_waits",
    "cache::a_cached_image_that_rotted_is_fetched_anew",
    "fault_matrix::a_reused_inactive_volume_is_complete_or_said_not_to_be",
    "fault_matrix::a_reused_thin_volume_is_complete_or_said_not_to_be",
    "source::a_store_that_restarts_during_the_download_is_no_failure",
    "interruption::a_killed_job_resumes_and_completes",
    "interruption::a_killed_job_on_a_reused_volume_resumes_and_completes",
    "cache::ten_requests_for_one_image_are_one_download",
    "fault_storage::a_write_error_on_the_last_block_leaves_nothing",
    "fault_storage::an_error_of_the_last_flush_leaves_nothing",
    "fault_storage::a_slow_device_only_takes_its_time",
    "fault_storage::a_read_error_in_the_cache_is_told_and_leaves_nothing",
    "fault_storage::a_cache_that_becomes_read_only_is_told",
    "fault_storage::a_cache_that_others_fill_at_any_stage_leaves_nothing",
    "fault_storage::a_file_system_that_others_fill_ends_the_job",
    "fault_lvm::a_lock_of_lvm_that_is_held_is_waited_for",
    "fault_lvm::a_thin_pool_without_metadata_left_ends_the_job_and_not_the_daemon",
    "fault_lvm::a_command_that_fails_on_a_lock_is_tried_again",
    "fault_lvm::a_thin_pool_that_waits_for_space_ends_the_job_and_not_the_daemon",
    "fault_lvm::an_lvcreate_that_hangs_is_ended_and_its_volume_removed",
    "fault_lvm::devices_that_appear_late_are_no_failure_and_without_udev_nothing_is_left",
    "fault_lvm::two_daemons_on_one_group_leave_each_others_volumes_alone",
    "fault_people::lvm_does_not_remove_a_volume_that_is_written",
    "fault_people::a_new_volume_that_is_renamed_under_its_job_is_removed",
    "fault_people::a_reused_volume_that_is_renamed_under_its_job_is_kept",
    "fault_host::a_binary_replaced_in_the_middle_of_jobs_loses_none",
    "fault_host::a_libvirt_that_hangs_ends_the_job_and_not_the_daemon",
    "fault_host::a_libvirt_that_restarts_is_no_failure",
    "fault_host::a_clock_that_is_set_changes_nothing",
    "fault_host::a_job_is_resumed_after_memory_ran_out",
    "fault_host::what_was_reported_complete_survives_a_power_cut",
    "fault_pressure::a_copy_goes_slower_while_guests_wait_for_their_disks",
];

/// What one job, or one command that waits for a job, may take in the emulated machine.
const JOB: Duration = Duration::from_secs(300);

/// The machines of this run. Each is booted when a scenario finds none free, so that `--list` boots none.
#[derive(Default)]
struct Worlds {
    free: Mutex<Vec<World>>,
    /// Why one did not come up: then no further one is tried.
    broken: OnceLock<String>,
}

impl Worlds {
    fn take(&self) -> Result<World, String> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match (free, self.broken.get()) {
            (Some(world), _) => Ok(world),
            (None, Some(why)) => Err(why.clone()),
            (None, None) => start().map_err(|error| {
                let why = format!("the test bed does not stand: {error:#}");
                self.broken.get_or_init(|| why).clone()
            }),
        }
    }

    fn give_back(&self, world: World) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(world);
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(machines());
    if !arguments.list {
        // Logs that are there afterwards are of this run.
        let _ = std::fs::remove_dir_all(logs());
    }
    let worlds = Arc::<Worlds>::default();
    let mut trials = Vec::new();
    for (subject, scenarios) in SUBJECTS {
        trials.extend(scenarios.iter().map(|(name, scenario)| trial(format!("{subject}::{name}"), *scenario, &worlds)));
    }
    let unknown: Vec<_> = LONG.iter().filter(|name| !trials.iter().any(|trial| trial.name() == **name)).collect();
    assert!(unknown.is_empty(), "no scenario has these names: {unknown:?}");
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Ends the machines and their MinIO: nothing else holds them now.
    drop(worlds);
    match fault_matrix::never_passed() {
        Ok(points) if points.is_empty() => conclusion.exit_code(),
        other => {
            eprintln!("points of the fault matrix that nothing passed: {other:?}");
            ExitCode::FAILURE
        }
    }
}

fn machines() -> usize {
    let wanted = env::var("TEST_BED_MACHINES").ok().and_then(|number| number.parse().ok());
    wanted.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from).min(2)).max(1)
}

/// Whether this run has the scenario of this name, if it is asked for.
fn is_run(name: &str) -> bool {
    !LONG.contains(&name) || ["FAULTS_ALL", "FAULTS_AT"].iter().any(|wish| env::var_os(wish).is_some())
}

fn trial(name: String, scenario: fn(&World) -> Result<()>, worlds: &Arc<Worlds>) -> Trial {
    let worlds = Arc::clone(worlds);
    let left_out = !is_run(&name);
    Trial::test(name.clone(), move || {
        let world = worlds.take()?;
        let begun = Instant::now();
        let outcome = world.reset().and_then(|()| run(scenario, &world));
        eprintln!("{name}: {:.1} s", begun.elapsed().as_secs_f32());
        // At once: the summary comes when all others have ended.
        let words = outcome.map_err(|error| format!("{error:#}\n{}", collect_logs(&world, &name)));
        let outcome = words.map_err(|words| {
            eprintln!("{name}: {words}");
            Failed::from(words)
        });
        worlds.give_back(world);
        outcome
    })
    .with_ignored_flag(left_out)
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
