//! Jobs through the runner, on a real database: order, undo, cancel, shutdown, recovery.

use e2e::lines::Lines;
use serde_json::json;

use super::*;
use crate::host::cmd;

/// A job that keeps a list of what was done, in a file that outlives it.
struct Diary {
    path: std::path::PathBuf,
    fail_at: Option<String>,
    /// Steps that were done, as the record has it.
    done: u64,
    progress: Progress,
}

impl Diary {
    fn write(&self, line: &str) {
        use std::io::Write;
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(&self.path).unwrap();
        writeln!(file, "{line}").unwrap();
    }

    fn record(&self) -> serde_json::Value {
        let written = std::fs::read_to_string(&self.path).unwrap_or_default();
        if self.fail_at.as_deref() == Some("record") && written.contains("+one") && !written.contains('!') {
            self.write("!");
            panic!("no paper");
        }
        json!({ "done": self.done })
    }

    async fn ensure(&mut self, name: &str) -> Result<()> {
        self.write(&format!("+{name}"));
        match self.fail_at.as_deref() {
            Some(at) if at == name => return Err(Error::new(ErrorCode::InputOutput, "the disk is on fire")),
            Some("panic") if name == "two" => panic!("out of cheese"),
            Some("hang") if name == "two" => self.progress.until_stopped(std::future::pending::<()>()).await?,
            // As systemd does it: the program of the step gets the signal too.
            Some("signal") if self.done == 0 => {
                cmd::run("sh", &["-c", "kill -TERM $$"], Duration::from_secs(10)).map(drop)?;
            }
            Some("stop") if self.done == 0 => self.progress.stop(Stop::Shutdown),
            _ => {}
        }
        self.done += 1;
        Ok(())
    }
}

const STEPS: &[Step<Diary>] = &[
    Step {
        name: "one",
        ensure: |diary| Box::pin(diary.ensure("one")),
        undo: |diary| {
            Box::pin(async {
                diary.write("-one");
                Ok(())
            })
        },
    },
    Step {
        name: "two",
        ensure: |diary| Box::pin(diary.ensure("two")),
        undo: |diary| {
            Box::pin(async {
                diary.write("-two");
                Ok(())
            })
        },
    },
];

struct Bench {
    directory: tempfile::TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("jobs.db")).unwrap();
        Self { directory, store }
    }

    fn runner(&self, fail_at: Option<&str>) -> Runner<Diary> {
        let (path, fail_at) = (self.directory.path().join("diary"), fail_at.map(str::to_owned));
        let execution = Execution {
            context: Box::new(move |stored, progress| {
                let done = stored.record["done"].as_u64().unwrap_or_default();
                Ok(Diary { path: path.clone(), fail_at: fail_at.clone(), done, progress })
            }),
            steps: |_| STEPS,
            record: Diary::record,
        };
        Runner::new(self.store.clone(), execution, 2, 10)
    }

    /// Does something to the database beside the store.
    fn to_database(&self, sql: &str) {
        rusqlite::Connection::open(self.directory.path().join("jobs.db")).unwrap().execute_batch(sql).unwrap();
    }

    fn diary(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("diary")).unwrap_or_default().replace('\n', " ")
    }
}

fn job() -> NewJob {
    NewJob { kind: JobKind::Provision, request: json!({}), exclusive: "volume".into(), idempotency_key: None }
}

async fn until(runner: &Runner<Diary>, id: JobId, wanted: impl Fn(&Stored) -> bool) -> Stored {
    for _ in 0..1000 {
        let stored = runner.get(id).await.unwrap();
        if wanted(&stored) {
            return stored;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the job did not come so far in 10 s: {}", runner.get(id).await.unwrap().status);
}

#[tokio::test]
async fn steps_run_in_order() {
    let bench = Bench::new();
    let runner = bench.runner(None);
    runner.begin(Recovery::Resume).await.unwrap();
    let (id, _) = runner.submit(job()).await.unwrap();
    let stored = until(&runner, id, |stored| stored.status.is_terminal()).await;
    assert_eq!((stored.status, stored.progress.percent), (JobStatus::Completed, 100));
    assert_eq!(bench.diary(), "+one +two ");
}

#[tokio::test]
async fn what_breaks_off_outside_of_a_step_is_run_again_and_holds_nothing() {
    let bench = Bench::new();
    let runner = bench.runner(Some("record"));
    runner.begin(Recovery::Resume).await.unwrap();
    let (id, _) = runner.submit(job()).await.unwrap();
    let (next, _) = runner.submit(job()).await.unwrap();
    for id in [id, next] {
        let stored = until(&runner, id, |stored| stored.status.is_terminal()).await;
        assert_eq!(stored.status, JobStatus::Completed);
    }
    assert_eq!(bench.diary(), "+one ! +one +two +one +two ");
}

/// How many lines are logged while a job breaks off, from the first one on for a while: each is an attempt.
async fn lines_of_a_while(lines: &Lines) -> usize {
    while lines.count() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    lines.count()
}

#[tokio::test]
async fn a_database_that_takes_nothing_is_not_asked_without_a_pause_and_nothing_is_lost() {
    let (bench, lines) = (Bench::new(), Lines::begin());
    let runner = bench.runner(None);
    runner.begin(Recovery::Resume).await.unwrap();
    // As SQLite says it of a disk that is full: what is there can be read.
    bench.to_database(
        "CREATE TRIGGER full BEFORE UPDATE ON jobs BEGIN SELECT RAISE(FAIL, 'database or disk is full'); END",
    );
    let (id, _) = runner.submit(job()).await.unwrap();
    let (other, _) = runner.submit(NewJob { exclusive: "other".into(), ..job() }).await.unwrap();
    let count = lines_of_a_while(&lines).await;
    assert!(count <= 4, "{count} attempts of two jobs");
    for id in [id, other] {
        assert_eq!(runner.get(id).await.unwrap().status, JobStatus::Pending);
    }
    bench.to_database("DROP TRIGGER full");
    for id in [id, other] {
        let stored = until(&runner, id, |stored| stored.status.is_terminal()).await;
        assert_eq!((stored.status, stored.attempts), (JobStatus::Completed, 1));
    }
}

#[tokio::test]
async fn a_job_that_is_recorded_as_running_keeps_its_key_until_it_is_run_again() {
    let (bench, lines) = (Bench::new(), Lines::begin());
    let runner = bench.runner(None);
    runner.begin(Recovery::Resume).await.unwrap();
    // The job is recorded as running, and then its steps cannot be read.
    bench.to_database("ALTER TABLE steps RENAME TO away");
    let (id, _) = runner.submit(job()).await.unwrap();
    let count = lines_of_a_while(&lines).await;
    assert!(count <= 2, "{count} attempts");
    assert_eq!(runner.get(id).await.unwrap().status, JobStatus::Running);
    let refused = runner.hold("volume", "volume web").await.err().unwrap();
    assert_eq!(refused.code(), ErrorCode::VolumeInUse);
    let (next, _) = runner.submit(job()).await.unwrap();
    bench.to_database("ALTER TABLE away RENAME TO steps");
    for id in [id, next] {
        let stored = until(&runner, id, |stored| stored.status.is_terminal()).await;
        assert_eq!((stored.status, stored.attempts), (JobStatus::Completed, 1));
    }
    assert_eq!(bench.diary(), "+one +two +one +two ");
}

#[tokio::test]
async fn a_failed_step_and_those_before_it_are_undone_backwards() {
    for (fail_at, diary, code) in [
        ("two", "+one +two -two -one ", ErrorCode::InputOutput),
        ("one", "+one -one ", ErrorCode::InputOutput),
        ("panic", "+one +two -two -one ", ErrorCode::Internal),
    ] {
        let bench = Bench::new();
        let runner = bench.runner(Some(fail_at));
        runner.begin(Recovery::Resume).await.unwrap();
        let (id, _) = runner.submit(job()).await.unwrap();
        let stored = until(&runner, id, |stored| stored.status.is_terminal()).await;
        assert_eq!(stored.status, JobStatus::Failed);
        assert_eq!(stored.error.unwrap().error, code, "{fail_at}");
        assert_eq!(bench.diary(), diary, "{fail_at}");
    }
}

#[tokio::test]
async fn a_cancelled_job_is_undone_and_stays_cancelled() {
    let bench = Bench::new();
    let runner = bench.runner(Some("hang"));
    runner.begin(Recovery::Resume).await.unwrap();
    let (id, _) = runner.submit(job()).await.unwrap();
    until(&runner, id, |_| bench.diary().contains("+two")).await;
    runner.cancel(id).await.unwrap();
    let stored = until(&runner, id, |stored| stored.status.is_terminal()).await;
    assert_eq!(stored.status, JobStatus::Cancelled);
    assert_eq!(bench.diary(), "+one +two -two -one ");
    assert_eq!(runner.cancel(id).await.unwrap().status, JobStatus::Cancelled);
}

#[tokio::test]
async fn a_shutdown_undoes_nothing_and_the_next_start_resumes() {
    let bench = Bench::new();
    let runner = bench.runner(Some("hang"));
    runner.begin(Recovery::Resume).await.unwrap();
    let (id, _) = runner.submit(job()).await.unwrap();
    until(&runner, id, |_| bench.diary().contains("+two")).await;
    runner.shutdown(Duration::from_secs(10)).await;
    assert_eq!(bench.diary(), "+one +two ");
    assert_eq!(runner.submit(job()).await.unwrap_err().code(), ErrorCode::ShuttingDown);
    let next = bench.runner(None);
    next.begin(Recovery::Resume).await.unwrap();
    let stored = until(&next, id, |stored| stored.status.is_terminal()).await;
    // To be told to stop is no failed attempt.
    assert_eq!((stored.status, stored.attempts), (JobStatus::Completed, 1));
    assert_eq!(bench.diary(), "+one +two +one +two ");
}

#[tokio::test]
async fn a_program_that_is_stopped_with_the_daemon_fails_no_job() {
    let bench = Bench::new();
    let runner = bench.runner(Some("signal"));
    runner.begin(Recovery::Resume).await.unwrap();
    let (id, _) = runner.submit(job()).await.unwrap();
    until(&runner, id, |_| bench.diary().contains("+one")).await;
    runner.shutdown(Duration::from_secs(10)).await;
    assert_eq!(runner.get(id).await.unwrap().status, JobStatus::Pending);
    // Without a stop of the daemon it is a failure.
    let next = bench.runner(Some("signal"));
    next.begin(Recovery::Resume).await.unwrap();
    let stored = until(&next, id, |stored| stored.status.is_terminal()).await;
    assert_eq!(stored.error.unwrap().message, "sh was ended by signal 15");
    assert_eq!(bench.diary(), "+one +one -one ");
}

#[tokio::test]
async fn what_a_step_found_is_kept_when_the_daemon_stops_behind_it() {
    let bench = Bench::new();
    let runner = bench.runner(Some("stop"));
    runner.begin(Recovery::Resume).await.unwrap();
    let (id, _) = runner.submit(job()).await.unwrap();
    let stored = until(&runner, id, |stored| stored.status.is_terminal()).await;
    assert_eq!(bench.diary(), "+one +one +two ");
    assert_eq!(stored.record, json!({ "done": 3 }), "the first attempt's is among them");
}

#[tokio::test]
async fn a_command_with_work_of_its_own_takes_back_what_a_crash_left_of_another() {
    let mut bench = Bench::new();
    bench.store = bench.store.clone().run_by(RunBy::Command);
    let (id, _) = bench.store.insert(job()).await.unwrap();
    bench.store.start(id).await.unwrap();
    bench.store.step(id, 0, "one", "done", json!({})).await.unwrap();
    let runner = bench.runner(None);
    runner.begin(Recovery::Leave).await.unwrap();
    assert_eq!(runner.get(id).await.unwrap().status, JobStatus::Running);
    runner.begin(Recovery::Undo).await.unwrap();
    assert_eq!(runner.get(id).await.unwrap().error.unwrap().error, ErrorCode::Interrupted);
    assert_eq!(bench.diary(), "-one ");
}

#[tokio::test]
async fn a_command_leaves_the_jobs_of_a_daemon_to_it_unless_it_is_told_to_cancel_them() {
    let mut bench = Bench::new();
    let named = |volume: &str| NewJob { exclusive: volume.into(), ..job() };
    let mut ids = Vec::new();
    for volume in ["begun", "killed", "waiting"] {
        ids.push(bench.store.insert(named(volume)).await.unwrap().0);
    }
    for id in &ids[..2] {
        bench.store.start(*id).await.unwrap();
        bench.store.step(*id, 0, "one", "done", json!({})).await.unwrap();
    }
    bench.store.requeue_stopped(ids[0]).await.unwrap();
    let daemon = bench.store.clone();
    bench.store = bench.store.clone().run_by(RunBy::Command);
    let command = bench.runner(None);
    command.begin(Recovery::Undo).await.unwrap();
    let (own, _) = command.submit(named("own")).await.unwrap();
    until(&command, own, |stored| stored.status == JobStatus::Completed).await;
    for (volume, id) in ["begun", "killed", "waiting"].into_iter().zip(&ids) {
        assert!(!command.get(*id).await.unwrap().status.is_terminal(), "{volume}");
        for error in [command.hold(volume, "it").await.err(), command.refuse_left(volume, "it").await.err()] {
            assert!(error.unwrap().to_string().contains(&id.to_string()), "{volume}");
        }
    }
    assert_eq!(bench.diary(), "+one +two ");
    for id in &ids[1..] {
        command.cancel(*id).await.unwrap();
        until(&command, *id, |stored| stored.status == JobStatus::Cancelled).await;
    }
    assert_eq!(bench.diary(), "+one +two -one ", "only what began is taken back");
    drop(command.hold("killed", "it").await.unwrap());
    command.shutdown(Duration::from_secs(10)).await;
    bench.store = daemon;
    let next = bench.runner(None);
    next.begin(Recovery::Resume).await.unwrap();
    until(&next, ids[0], |stored| stored.status == JobStatus::Completed).await;
}

#[tokio::test]
async fn a_job_that_is_interrupted_again_and_again_is_given_up() {
    let bench = Bench::new();
    let (id, _) = bench.store.insert(job()).await.unwrap();
    for _ in 0..MOST_ATTEMPTS {
        bench.store.start(id).await.unwrap();
        bench.store.step(id, 0, "one", "started", json!({})).await.unwrap();
        bench.store.requeue(id).await.unwrap();
    }
    let runner = bench.runner(None);
    runner.begin(Recovery::Resume).await.unwrap();
    let stored = until(&runner, id, |stored| stored.status.is_terminal()).await;
    assert_eq!(stored.error.unwrap().error, ErrorCode::Interrupted);
    assert_eq!(bench.diary(), "-one ");
}

#[tokio::test]
async fn no_job_begins_with_a_key_that_somebody_holds() {
    let bench = Bench::new();
    let runner = bench.runner(None);
    runner.begin(Recovery::Resume).await.unwrap();
    let held = runner.hold("volume", "it").await.unwrap();
    assert_eq!(runner.hold("volume", "it").await.err().unwrap().code(), ErrorCode::VolumeInUse);
    let (waiting, _) = runner.submit(job()).await.unwrap();
    // One that was submitted later is run to its end meanwhile.
    let (other, _) = runner.submit(NewJob { exclusive: "other".into(), ..job() }).await.unwrap();
    until(&runner, other, |stored| stored.status == JobStatus::Completed).await;
    assert_eq!(runner.get(waiting).await.unwrap().status, JobStatus::Pending);
    drop(held);
    until(&runner, waiting, |stored| stored.status == JobStatus::Completed).await;
    drop(runner.hold("volume", "it").await.unwrap());
}

#[tokio::test]
async fn a_key_that_a_job_has_cannot_be_held() {
    let bench = Bench::new();
    let runner = bench.runner(Some("hang"));
    runner.begin(Recovery::Resume).await.unwrap();
    let (id, _) = runner.submit(job()).await.unwrap();
    until(&runner, id, |stored| stored.status == JobStatus::Running).await;
    let error = runner.hold("volume", "volume web").await.err().unwrap();
    assert!(error.to_string().contains(&id.to_string()), "{error:?}");
    runner.cancel(id).await.unwrap();
    until(&runner, id, |stored| stored.status == JobStatus::Cancelled).await;
    drop(runner.hold("volume", "volume web").await.unwrap());
}
