//! `lvp job`: list, show, watch, cancel; and following a job for the commands that submit one.

use std::{process::ExitCode, time::Duration};

use lvp_api::{ByteSize, ErrorBody, ErrorCode, Job, JobId, JobKind, JobList, JobStatus, Submitted};

use super::Outcome;
use crate::{
    cli::{self, Output},
    connection::{Connection, body},
    output,
    progress_bar::ProgressDisplay,
};

/// After its events broke off, a job is followed again after this long.
const FOLLOW_AGAIN: Duration = Duration::from_millis(200);

/// Runs the command.
pub async fn run(connection: &Connection, command: cli::Job, output: Output) -> Outcome {
    let client = &connection.client;
    match command {
        cli::Job::List { status, limit } => output::print(&client.jobs(status, limit).await?, output, show_list)?,
        cli::Job::Show { id } => output::print(&client.job(id).await?, output, show)?,
        cli::Job::Watch { id } => {
            let job = watch(connection, id, output, false).await?;
            return end(&job, output);
        }
        cli::Job::Cancel { id } => {
            match client.cancel(id).await {
                // Without a daemon a command's job ended with its process, and was just now taken back.
                Err(error) if connection.is_local() && error.error == ErrorCode::JobFinished => {}
                cancelled => drop(cancelled?),
            }
            // Without a daemon the job is taken back in this process, which stays for that.
            let job = watch(connection, id, output, connection.is_local()).await?;
            output::print(&job, output, |job| format!("job {} {}", job.job_id, job.status))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// After a submission: prints the id, or follows the job to its end.
pub async fn follow_or_print(connection: &Connection, submitted: Submitted, detach: bool, output: Output) -> Outcome {
    if detach {
        output::print(&submitted, output, |submitted| submitted.job_id.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let job = watch(connection, submitted.job_id, output, true).await?;
    end(&job, output)
}

/// Shows a job's progress until it has ended. Ctrl-C cancels the job where `may_cancel` (a second one leaves it to the
/// daemon), and only ends the watching where not.
async fn watch(connection: &Connection, id: JobId, output: Output, may_cancel: bool) -> Result<Job, Box<ErrorBody>> {
    let client = &connection.client;
    let mut display = ProgressDisplay::new(output != Output::Table);
    let mut followed = client.follow(id).await?;
    let mut cancelled = false;
    loop {
        tokio::select! {
            job = followed.next() => {
                let job = match job {
                    Some(job) => job,
                    None => {
                        tokio::time::sleep(FOLLOW_AGAIN).await;
                        followed = client.follow(id).await?;
                        continue;
                    }
                };
                display.show(&job);
                if job.status.is_terminal() {
                    return Ok(job);
                }
                if connection.is_local() && !may_cancel {
                    display.finish();
                    return Err(not_under_way(&job));
                }
            }
            _ = tokio::signal::ctrl_c() => {
                display.finish();
                if !may_cancel || cancelled {
                    return client.job(id).await;
                }
                eprintln!("cancelling; what the job did is taken back");
                cancelled = true;
                // It may have ended by itself in this moment; then the next look says so.
                let _ = client.cancel(id).await;
            }
        }
    }
}

/// Nobody runs it: there is no daemon, and the process that ran it is gone.
fn not_under_way(job: &Job) -> Box<ErrorBody> {
    let said = format!("job {} was interrupted, and no daemon runs that would resume it", job.job_id);
    let error = lvp_engine::Error::new(ErrorCode::Interrupted, said);
    body(error.hint(format!("start `lvp serve` to resume it, or take it back with `lvp job cancel {}`", job.job_id)))
}

/// The result of a followed job: its summary, or its error as this command's.
fn end(job: &Job, output: Output) -> Outcome {
    let failed = job.error_code.filter(|_| job.status == JobStatus::Failed);
    if let Some(code) = failed {
        if output == Output::Table {
            return Err(failure(job, code));
        }
        output::print(job, output, show)?;
        return Ok(ExitCode::from(code.exit_code()));
    }
    if !job.status.is_terminal() {
        eprintln!("job {} goes on; `lvp job watch {}` follows it", job.job_id, job.job_id);
        return Ok(ExitCode::from(ErrorCode::Cancelled.exit_code()));
    }
    output::print(job, output, summary)?;
    match job.status {
        JobStatus::Cancelled => {
            output::left(&job.details).for_each(|left| eprintln!("left: {left}"));
            Ok(ExitCode::from(ErrorCode::Cancelled.exit_code()))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn failure(job: &Job, code: ErrorCode) -> Box<ErrorBody> {
    Box::new(ErrorBody {
        error: code,
        message: job.error.clone().unwrap_or_default(),
        code: code.http_status(),
        retryable: job.retryable.unwrap_or_default(),
        hint: job.hint.clone(),
        correlation_id: job.correlation_id.clone(),
        details: job.details.clone(),
    })
}

fn summary(job: &Job) -> String {
    let what = job.volume.as_ref().map_or_else(|| job.image_url.clone(), ToString::to_string);
    if job.status != JobStatus::Completed {
        return format!("job {} {}: {what}", job.job_id, job.status);
    }
    let seconds = job
        .finished_at
        .zip(job.started_at)
        .map(|(end, start)| end.duration_since(start).as_secs_f64())
        .unwrap_or_default();
    let image = if job.cache_hit == Some(true) { "from the cache" } else { "downloaded" };
    match (job.kind, &job.device_path) {
        (JobKind::Provision, Some(device)) => format!("{what} is ready at {device} (image {image}, {seconds:.1} s)"),
        _ => format!(
            "{} is cached at {} ({image}, {seconds:.1} s)",
            job.image_url,
            job.image_path.as_deref().unwrap_or_default()
        ),
    }
}

fn show_list(list: &JobList) -> String {
    let rows = list.jobs.iter().map(|job| {
        vec![
            job.job_id.to_string(),
            job.status.to_string(),
            format!("{}%", job.progress.percent),
            job.volume.as_ref().map(ToString::to_string).unwrap_or_default(),
            job.target.clone().unwrap_or_default(),
            output::moment(job.created_at),
            job.error_code.map(|code| code.to_string()).unwrap_or_default(),
        ]
    });
    output::table(&["job", "status", "done", "volume", "target", "created", "error"], rows.collect(), "no jobs")
}

fn show(job: &Job) -> String {
    let progress = &job.progress;
    output::facts(vec![
        ("job", Some(job.job_id.to_string())),
        ("kind", Some(job.kind.to_string())),
        ("status", Some(job.status.to_string())),
        (
            "progress",
            Some(format!(
                "{}% ({}, {} of {})",
                progress.percent,
                progress.stage,
                ByteSize(progress.bytes_processed),
                ByteSize(progress.bytes_total)
            )),
        ),
        ("image", Some(job.image_url.clone())),
        ("digest", job.image_digest.as_ref().map(ToString::to_string)),
        (
            "cached",
            job.image_path
                .as_ref()
                .map(|path| format!("{path}{}", if job.cache_hit == Some(true) { " (hit)" } else { "" })),
        ),
        ("volume", job.volume.as_ref().map(ToString::to_string)),
        ("target", job.target.clone()),
        ("device", job.device_path.clone()),
        ("correlation", job.correlation_id.clone()),
        ("created", Some(output::moment(job.created_at))),
        ("started", job.started_at.map(output::moment)),
        ("finished", job.finished_at.map(output::moment)),
        (
            "error",
            job.error
                .as_ref()
                .map(|error| format!("{error} [{}]", job.error_code.map(|code| code.to_string()).unwrap_or_default())),
        ),
        ("hint", job.hint.clone()),
        ("left", Some(output::left(&job.details).collect::<Vec<_>>().join("; ")).filter(|left| !left.is_empty())),
    ])
}
