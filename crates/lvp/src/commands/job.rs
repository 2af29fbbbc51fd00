//! `lvp job`: list, show, watch, cancel; and following a job for the commands that submit one.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use lvp_api::{
    ByteSize, ErrorBody, ErrorCode, Job, JobId, JobKind, JobList, JobStatus, Submitted,
    client::{Client, Followed},
};

use super::Outcome;
use crate::{
    cli::{self, Output},
    connection::{Connection, body},
    output,
    progress_bar::ProgressDisplay,
};

/// After its events broke off, a job is followed again after this long.
const FOLLOW_AGAIN: Duration = Duration::from_millis(200);
/// And asked for so often while no more followers are let in.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// A daemon that has the job may be away for so long, as when it is upgraded.
const AWAY: Duration = Duration::from_secs(60);

/// Runs the command.
pub async fn run(connection: &Connection, command: cli::Job, output: Output) -> Outcome {
    let client = &connection.client;
    match command {
        cli::Job::List { status, limit } => output::print(&client.jobs(status, limit).await?, output, show_list)?,
        cli::Job::Show { id } => output::print(&client.job(id).await?, output, show)?,
        cli::Job::Watch { id } => {
            let job = watch(connection, Following::new(&connection.client, id, false), output, false).await?;
            return end(&job, output);
        }
        cli::Job::Cancel { id } => {
            match client.cancel(id).await {
                // Without a daemon a command's job ended with its process, and was just now taken back.
                Err(error) if connection.is_local() && error.error == ErrorCode::JobFinished => {}
                cancelled => drop(cancelled?),
            }
            // Without a daemon the job is taken back in this process, which stays for that.
            let following = Following::new(&connection.client, id, true);
            let job = watch(connection, following, output, connection.is_local()).await?;
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
    let id = submitted.job_id;
    let followed = watch(connection, Following::new(&connection.client, id, true), output, true).await;
    end(&followed.map_err(|error| accepted(error, id))?, output)
}

/// An error of following, and not of the job: that is to be found again, and not to be submitted once more.
fn accepted(mut error: Box<ErrorBody>, id: JobId) -> Box<ErrorBody> {
    let fate = if error.error == ErrorCode::JobNotFound { "is not remembered any more" } else { "goes on" };
    error.message = format!("job {id} was accepted and {fate}, but cannot be followed: {}", error.message);
    error.hint = Some(format!("`lvp job watch {id}` follows it; to submit it again would write the volume once more"));
    error.retryable = false;
    error.details.insert("job_id".to_owned(), id.to_string().into());
    error
}

/// A job that is followed, however often that breaks off. Its `next` may be dropped while it waits and loses nothing.
struct Following<'a> {
    client: &'a Client,
    id: JobId,
    events: Option<Followed>,
    /// The daemon knows the job, so that it is worth waiting for.
    is_known: bool,
    /// Since when nothing was heard of it.
    away: Option<Instant>,
}

impl<'a> Following<'a> {
    fn new(client: &'a Client, id: JobId, is_known: bool) -> Self {
        Self { client, id, events: None, is_known, away: None }
    }

    /// The job, when it has changed; or when it was asked for, because no more followers are let in.
    async fn next(&mut self) -> Result<Job, Box<ErrorBody>> {
        loop {
            if let Some(events) = &mut self.events {
                if let Some(job) = events.next().await {
                    (self.is_known, self.away) = (true, None);
                    return Ok(job);
                }
                self.events = None;
                tokio::time::sleep(FOLLOW_AGAIN).await;
            }
            let asked = match self.client.follow(self.id).await {
                Ok(events) => {
                    self.events = Some(events);
                    continue;
                }
                Err(error) if error.error == ErrorCode::TooManyFollowers => {
                    tokio::time::sleep(ASK_AGAIN).await;
                    self.client.job(self.id).await
                }
                Err(error) => Err(error),
            };
            match asked {
                Ok(job) => {
                    (self.is_known, self.away) = (true, None);
                    return Ok(job);
                }
                Err(error) => self.bear(error).await?,
            }
        }
    }

    /// Waits a moment where the daemon is only away, and has not been for too long.
    async fn bear(&mut self, error: Box<ErrorBody>) -> Result<(), Box<ErrorBody>> {
        let is_passing = error.code == ErrorCode::DaemonUnreachable.http_status() && error.retryable;
        if !self.is_known || !is_passing {
            return Err(error);
        }
        match self.away {
            None => {
                eprintln!("job {} is asked for again until the daemon is back: {}", self.id, error.message);
                self.away = Some(Instant::now());
            }
            Some(since) if since.elapsed() > AWAY => return Err(error),
            Some(_) => {}
        }
        tokio::time::sleep(FOLLOW_AGAIN).await;
        Ok(())
    }
}

/// Shows a job's progress until it has ended. Ctrl-C cancels the job where `may_cancel` (a second one leaves it to the
/// daemon), and only ends the watching where not.
async fn watch(
    connection: &Connection,
    mut following: Following<'_>,
    output: Output,
    may_cancel: bool,
) -> Result<Job, Box<ErrorBody>> {
    let (client, id) = (&connection.client, following.id);
    let mut display = ProgressDisplay::new(output != Output::Table);
    let mut cancelled = false;
    loop {
        tokio::select! {
            job = following.next() => {
                let job = job?;
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
                match client.cancel(id).await {
                    // It may have ended by itself in this moment; then the next look says so.
                    Err(error) if error.error != ErrorCode::JobFinished => eprintln!("not cancelled: {}", error.message),
                    _ => {}
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_following_names_the_job_that_was_accepted() {
        let id: JobId = "0193f2b0-0000-7000-8000-000000000001".parse().unwrap();
        let away = body(lvp_engine::Error::new(ErrorCode::DaemonUnreachable, "nobody answers").hint("--local"));
        let said = accepted(away, id);
        assert_eq!((said.error, said.retryable), (ErrorCode::DaemonUnreachable, false));
        assert!(said.message.contains(&format!("job {id} was accepted and goes on")), "{}", said.message);
        assert!(said.message.ends_with("nobody answers"), "{}", said.message);
        let hint = said.hint.unwrap();
        assert!(hint.contains(&format!("lvp job watch {id}")) && !hint.contains("--local"), "{hint}");
        assert_eq!(said.details["job_id"], id.to_string());
    }
}
