//! The daemon: reached through its socket, one per state directory, stopped by signals, counted and logged as promised.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpStream,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    process::Stdio,
    time::Duration,
};

use e2e::{
    gate::Gate,
    images,
    server::{Page, Server},
};
use serde_json::Value;

use crate::bed::{Bed, MIB, Process, until};

/// A stop ends within this.
const SOON: Duration = Duration::from_secs(8);

fn counted(bed: &Bed, series: &str) -> u64 {
    let page = bed.get("/metrics");
    let line =
        page.lines().find_map(|line| line.strip_prefix(series)).unwrap_or_else(|| panic!("no {series} in {page}"));
    line.trim().parse().unwrap()
}

/// 64 MiB of the byte 7 as a small image, to be served as slowly as a test wants.
fn page() -> Page {
    let image = images::qcow2_of_sevens(Path::new(env!("CARGO_TARGET_TMPDIR")), 64).unwrap();
    Page::new(fs::read(image).unwrap()).etag(Some("\"1\""))
}

fn jobs(bed: &Bed, status: &str) -> u64 {
    counted(bed, &format!("libvirt_volume_provisioner_jobs_total{{status=\"{status}\"}}"))
}

#[test]
fn commands_use_the_daemon_of_this_machine_through_its_socket() {
    let bed = Bed::new();
    let image = bed.publish("good.qcow2");
    let mut daemon = bed.serve();
    assert_eq!(fs::metadata(bed.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    let words = ["provision", "s3://images/good.qcow2", "web-1", "--size", "8M", "--detach"];
    let id = bed.lvp(&words).exits(0).stdout.trim().to_owned();
    let watched = bed.lvp(&["job", "watch", &id, "-o", "json"]).exits(0).json();
    assert_eq!(watched["status"], "completed");
    bed.assert_holds("web-1", &image);
    // The daemon did it: it answers the same, and its log tells of the job.
    assert!(bed.get(&format!("/api/v1/status/{id}")).contains("\"completed\""));
    assert!(bed.log().contains(&id));
    // A file of this machine may be named: the caller is its administrator.
    bed.lvp(&["provision", image.to_str().unwrap(), "web-2", "--size", "8M"]).exits(0);

    // The address over TCP stands in the log; files may not be named there.
    let log = bed.log();
    let line = log.lines().find(|line| line.contains("\"serving\"")).unwrap();
    let serving: Value = serde_json::from_str(line).unwrap();
    let url = format!("http://{}", serving["address"].as_str().unwrap());
    assert_eq!(bed.lvp(&["--server", &url, "job", "show", &id, "-o", "json"]).exits(0).json(), watched);
    let refused = bed.lvp(&["--server", &url, "provision", image.to_str().unwrap(), "web-3", "--size", "8M"]).exits(2);
    assert!(refused.stderr.contains("not_permitted"), "{refused:?}");

    daemon.signal("TERM");
    assert!(daemon.ends_within(SOON).success());
    assert!(!bed.socket().exists());
    // Without it, the same commands do their own work on the same state.
    assert_eq!(bed.lvp(&["job", "show", &id, "-o", "json"]).exits(0).json(), watched);
    bed.lvp(&["--server", &url, "job", "list"]).exits(8);
}

#[test]
fn jobs_are_counted_by_their_end() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    bed.publish_heavy(2048);
    let _daemon = bed.serve();
    for status in ["started", "completed", "failed", "cancelled"] {
        assert_eq!(jobs(&bed, status), 0, "{status}");
    }
    for volume in ["web-1", "web-2"] {
        bed.lvp(&["provision", "s3://images/good.qcow2", volume, "--size", "8M"]).exits(0);
    }
    bed.lvp(&["provision", "s3://images/missing.qcow2", "web-3", "--size", "8M"]).exits(6);
    let words = ["provision", "s3://images/heavy.qcow2", "web-4", "--size", "2G", "--detach"];
    let id = bed.lvp(&words).exits(0).stdout.trim().to_owned();
    until(|| bed.get(&format!("/api/v1/jobs/{id}")).contains("\"populating\""));
    assert_eq!(counted(&bed, "libvirt_volume_provisioner_active_jobs"), 1);
    let cancelled = bed.lvp(&["job", "cancel", &id]).exits(0);
    assert!(cancelled.stdout.contains("cancelled"), "{cancelled:?}");
    // A request that never became a job is none.
    bed.lvp(&["provision", "s3://images/good.qcow2", "web-5", "--size", "8M", "--target", "nowhere"]).exits(3);
    until(|| counted(&bed, "libvirt_volume_provisioner_active_jobs") == 0);
    let counts = ["started", "completed", "failed", "cancelled"].map(|status| jobs(&bed, status));
    assert_eq!(counts, [4, 2, 1, 1]);
    let submitted = "libvirt_volume_provisioner_requests_total{endpoint=\"/api/v1/jobs\",method=\"POST\",status=";
    assert_eq!(counted(&bed, &format!("{submitted}\"202\"}}")), 4);
    assert_eq!(counted(&bed, &format!("{submitted}\"404\"}}")), 1);
}

#[test]
fn a_second_daemon_on_the_same_state_is_refused_with_the_first_ones_pid() {
    let bed = Bed::new();
    let daemon = bed.serve();
    let other = bed.path("other.sock");
    let second = bed.lvp(&["serve", "--socket", other.to_str().unwrap()]).exits(8);
    assert!(second.stderr.contains(&format!("process {}", daemon.0.id())), "{second:?}");
    assert!(second.stderr.contains("state_locked") && second.stderr.contains("hint:"), "{second:?}");
    assert!(bed.get("/livez").ends_with("ok"), "the first one still serves");
}

#[test]
fn a_second_daemon_with_other_state_on_the_same_database_is_refused_with_the_first_ones_pid() {
    let bed = Bed::new();
    let web = Server::start();
    let gate = Gate::default();
    web.serve("/held.qcow2", page().hold(400_000, &gate));
    let database = bed.path("jobs.db");
    let daemon = bed.serve_with(&[("DB_PATH", database.to_str().unwrap())]);
    let words = ["provision", &web.url("/held.qcow2"), "web-1", "--size", "64M", "--detach"];
    let id = bed.lvp(&words).exits(0).stdout.trim().to_owned();
    until(|| bed.volume("web-1").exists());
    // The same file by another name, and below another directory.
    let link = bed.path("link.db");
    std::os::unix::fs::symlink(&database, &link).unwrap();
    for name in [&database, &link] {
        let mut second = bed.command(&["serve"]);
        second.env("DB_PATH", name).env("LVP_STATE_DIR", bed.path("other")).env("LVP_CACHE_DIR", bed.path("others"));
        let mut second = Process(second.stderr(Stdio::piped()).spawn().unwrap());
        assert_eq!(second.ends_within(SOON).code(), Some(8));
        let refused = std::io::read_to_string(second.0.stderr.take().unwrap()).unwrap();
        assert!(refused.contains("state_locked"), "{refused}");
        assert!(refused.contains(&format!("process {}", daemon.0.id())), "{refused}");
        assert!(refused.contains(&name.display().to_string()), "{refused}");
    }
    assert!(bed.get(&format!("/api/v1/jobs/{id}")).contains("\"running\""), "the job is the first one's");
    gate.open();
    assert_eq!(bed.lvp(&["job", "watch", &id, "-o", "json"]).exits(0).json()["status"], "completed");
    let content = fs::read(bed.volume("web-1")).unwrap();
    assert!(content.len() as u64 == 64 * MIB && content.iter().all(|byte| *byte == 7));
}

#[test]
fn a_port_that_is_taken_uses_up_no_attempt_of_a_job() {
    let bed = Bed::new();
    let web = Server::start();
    let gate = Gate::default();
    web.serve("/held.qcow2", page().hold(400_000, &gate));
    let mut daemon = bed.serve();
    let words = ["provision", &web.url("/held.qcow2"), "web-1", "--size", "64M", "--detach"];
    let id = bed.lvp(&words).exits(0).stdout.trim().to_owned();
    until(|| bed.volume("web-1").exists());
    daemon.signal("KILL");
    daemon.ends_within(SOON);
    // A supervisor starts it again and again.
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port().to_string();
    for _ in 0..7 {
        let refused = crate::bed::run(bed.command(&["serve"]).env("PORT", &port)).exits(8);
        assert!(refused.stderr.contains("is served by another program"), "{refused:?}");
        assert!(!refused.stderr.contains(&id), "the job was begun: {refused:?}");
    }
    gate.open();
    let _daemon = bed.serve();
    assert_eq!(bed.lvp(&["job", "watch", &id, "-o", "json"]).exits(0).json()["status"], "completed");
}

#[test]
fn who_submitted_a_job_follows_it_through_a_restart_of_the_daemon() {
    let bed = Bed::new();
    let web = Server::start();
    let gate = Gate::default();
    web.serve("/held.qcow2", page().hold(400_000, &gate));
    let mut daemon = bed.serve();
    let words = ["provision", &web.url("/held.qcow2"), "web-1", "--size", "64M"];
    let mut submitter = Process(bed.command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    until(|| bed.volume("web-1").exists());
    daemon.signal("TERM");
    until(|| bed.log().contains("waiting for running jobs to end"));
    daemon.signal("TERM");
    assert!(daemon.ends_within(SOON).success());
    // It has found that the daemon is away, and stays.
    let lines = BufReader::new(submitter.0.stderr.take().unwrap()).lines();
    let mut said = lines.map(Result::unwrap);
    assert!(said.any(|line| line.contains("is asked for again until the daemon is back")), "it gave up");
    let _daemon = bed.serve();
    gate.open();
    assert_eq!(submitter.ends_within(SOON * 4).code(), Some(0), "{:?}", said.collect::<Vec<_>>());
    let content = fs::read(bed.volume("web-1")).unwrap();
    assert!(content.len() as u64 == 64 * MIB && content.iter().all(|byte| *byte == 7));
    assert_eq!(bed.lvp(&["job", "list", "-o", "json"]).exits(0).json()["jobs"].as_array().unwrap().len(), 1);
}

#[test]
fn who_may_not_follow_a_job_asks_for_it_until_it_has_ended() {
    let bed = Bed::new();
    let image = bed.publish("good.qcow2");
    let web = Server::start();
    let gate = Gate::default();
    web.serve("/held.qcow2", page().hold(400_000, &gate));
    // Half of them may follow.
    let _daemon = bed.serve_with(&[("LVP_MAX_CONNECTIONS", "2")]);
    let words = ["provision", &web.url("/held.qcow2"), "held", "--size", "64M", "--detach"];
    let held = bed.lvp(&words).exits(0).stdout.trim().to_owned();
    let mut follower = Process(bed.command(&["job", "watch", &held]).stderr(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(follower.0.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    bed.lvp(&["provision", "s3://images/good.qcow2", "web-1", "--size", "8M"]).exits(0);
    bed.assert_holds("web-1", &image);
    assert!(follower.0.try_wait().unwrap().is_none(), "the place was free");
    gate.open();
}

#[test]
fn a_stopped_daemon_leaves_a_running_job_to_the_next() {
    let bed = Bed::new();
    let web = Server::start();
    web.serve("/slow.qcow2", page().pace(512, Duration::from_millis(50)));
    let mut daemon = bed.serve();
    let url = web.url("/slow.qcow2");
    let id = bed.lvp(&["provision", &url, "web-1", "--size", "64M", "--detach"]).exits(0).stdout.trim().to_owned();
    until(|| bed.get(&format!("/api/v1/jobs/{id}")).contains("\"downloading\"") && web.count("GET", "/slow.qcow2") > 0);
    daemon.signal("TERM");
    until(|| bed.log().contains("waiting for running jobs to end"));
    // The second one ends the time that the job has.
    daemon.signal("TERM");
    assert!(daemon.ends_within(SOON).success());
    // One who only looks finds it as it was left.
    assert_eq!(bed.lvp(&["job", "show", &id, "-o", "json"]).exits(0).json()["status"], "pending");
    web.serve("/slow.qcow2", page());
    let _daemon = bed.serve();
    assert_eq!(bed.lvp(&["job", "watch", &id, "-o", "json"]).exits(0).json()["status"], "completed");
    let content = fs::read(bed.volume("web-1")).unwrap();
    assert!(content.len() as u64 == 64 * MIB && content.iter().all(|byte| *byte == 7));
}

#[test]
fn a_command_between_two_daemons_leaves_their_jobs_to_them() {
    let bed = Bed::new();
    let web = Server::start();
    bed.publish("good.qcow2");
    let images = ["/one.qcow2", "/two.qcow2", "/three.qcow2"];
    // Never opened: each stops short of its end.
    let gate = Gate::default();
    images.iter().for_each(|path| web.serve(path, page().hold(400_000, &gate)));
    let mut daemon = bed.serve();
    let submit = |(path, volume): (&&str, &str)| {
        let words = ["provision", &web.url(path), volume, "--size", "64M", "--detach"];
        bed.lvp(&words).exits(0).stdout.trim().to_owned()
    };
    let ids: Vec<String> = images.iter().zip(["web-1", "web-2", "web-3"]).map(submit).collect();
    // Two are under way, one waits.
    until(|| bed.volume("web-1").exists() && bed.volume("web-2").exists());
    daemon.signal("TERM");
    until(|| bed.log().contains("waiting for running jobs to end"));
    daemon.signal("TERM");
    assert!(daemon.ends_within(SOON).success());

    bed.lvp(&["provision", "s3://images/good.qcow2", "own", "--size", "8M"]).exits(0);
    bed.lvp(&["image", "prefetch", "s3://images/good.qcow2"]).exits(0);
    let again = ["provision", "s3://images/good.qcow2", "web-1", "--size", "64M"];
    for words in [&again[..], &[&again[..], &["--dry-run"]].concat(), &["volume", "delete", "web-1", "--force"]] {
        let refused = bed.lvp(words).exits(4).stderr;
        assert!(refused.contains("volume_in_use") && refused.contains(&ids[0]), "{refused}");
        assert!(refused.contains(&format!("lvp job cancel {}", ids[0])), "{refused}");
    }
    let cancelled = bed.lvp(&["job", "cancel", &ids[1]]).exits(0);
    assert!(cancelled.stdout.contains("cancelled") && !bed.volume("web-2").exists(), "{cancelled:?}");
    for id in [&ids[0], &ids[2]] {
        assert_eq!(bed.lvp(&["job", "show", id, "-o", "json"]).exits(0).json()["status"], "pending");
    }

    images.iter().for_each(|path| web.serve(path, page()));
    let _daemon = bed.serve();
    for (id, status) in ids.iter().zip(["completed", "cancelled", "completed"]) {
        let watched = bed.lvp(&["job", "watch", id, "-o", "json"]);
        assert_eq!(watched.json()["status"], status, "{watched:?}");
    }
    for volume in ["web-1", "web-3"] {
        let content = fs::read(bed.volume(volume)).unwrap();
        assert!(content.len() as u64 == 64 * MIB && content.iter().all(|byte| *byte == 7), "{volume}");
    }
}

/// How many files a process has open.
fn open_files(process: &Process) -> usize {
    fs::read_dir(format!("/proc/{}/fd", process.0.id())).unwrap().count()
}

#[test]
fn connections_leave_the_files_that_jobs_need() {
    let bed = Bed::new();
    let image = bed.publish("good.qcow2");
    let daemon = bed.serve_after("ulimit -n 256");
    // Its socket is there before it serves.
    until(|| bed.log().contains("\"serving\""));
    let log = bed.log();
    assert!(log.contains("fewer connections are taken than max_connections says"), "{log}");
    let line = log.lines().find(|line| line.contains("\"serving\"")).unwrap();
    let serving: Value = serde_json::from_str(line).unwrap();
    let address = serving["address"].as_str().unwrap();
    // More than there may be files; the kernel keeps those that the daemon does not take, 128 at least.
    let idle: Vec<TcpStream> = (0..180).map(|_| TcpStream::connect(address).unwrap()).collect();
    let also_idle: Vec<UnixStream> = (0..60).map(|_| UnixStream::connect(bed.socket()).unwrap()).collect();
    until(|| open_files(&daemon) > 64 + also_idle.len());
    bed.lvp(&["provision", "s3://images/good.qcow2", "web-1", "--size", "8M"]).exits(0);
    bed.assert_holds("web-1", &image);
    assert!(!bed.log().contains("could not be accepted"), "it ran out of files");
    drop((idle, also_idle));
}

#[test]
fn the_daemon_takes_the_files_that_it_may_have() {
    let bed = Bed::new();
    let daemon = bed.serve_after("ulimit -S -n 256; ulimit -H -n 4000");
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.0.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(line.split_whitespace().nth(3), Some("4000"), "{line}");
    assert!(!bed.log().contains("fewer connections"));
}

#[test]
fn a_running_job_has_its_time_to_end_when_the_daemon_stops() {
    let bed = Bed::new();
    let web = Server::start();
    web.serve("/held.qcow2", page().pace(2048, Duration::from_millis(50)));
    // So long that it ends by the job's end only.
    let mut daemon = bed.serve_with(&[("LVP_STOP_GRACE", "1h")]);
    let url = web.url("/held.qcow2");
    let id = bed.lvp(&["provision", &url, "web-1", "--size", "64M", "--detach"]).exits(0).stdout.trim().to_owned();
    until(|| bed.get(&format!("/api/v1/jobs/{id}")).contains("\"downloading\""));
    daemon.signal("TERM");
    until(|| bed.log().contains("waiting for running jobs to end"));
    let late = bed.lvp(&["provision", &url, "web-2", "--size", "64M", "--detach"]).exits(8);
    assert!(late.stderr.contains("shutting_down"), "{late:?}");
    assert!(daemon.ends_within(SOON * 4).success());
    assert_eq!(bed.lvp(&["job", "show", &id, "-o", "json"]).exits(0).json()["status"], "completed");
    assert!(!bed.volume("web-2").exists());
}

#[test]
fn the_database_is_backed_up_beside_the_daemon_and_a_damaged_one_is_no_loss() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    let mut daemon = bed.serve();
    bed.lvp(&["provision", "s3://images/good.qcow2", "web-1", "--size", "8M"]).exits(0);
    let (database, copy) = (bed.path("state/jobs.db"), bed.path("copy.db"));
    let words = ["db", "backup", copy.to_str().unwrap()];
    assert!(bed.lvp(&words).exits(0).stdout.starts_with("1 jobs of "));
    let twice = bed.lvp(&words).exits(4);
    assert!(twice.stderr.contains("file_in_the_way"), "{twice:?}");
    daemon.signal("TERM");
    assert!(daemon.ends_within(SOON).success());

    fs::write(&database, "no database, but some bytes").unwrap();
    let volume = fs::read(bed.volume("web-1")).unwrap();
    for words in [&["serve"][..], &["job", "list"], &["db", "backup", "other.db"]] {
        let refused = bed.lvp(words).exits(8);
        assert!(refused.stderr.contains("database_unavailable") && refused.stderr.contains("mv "), "{refused:?}");
    }
    let examined = bed.lvp(&["doctor"]).exits(8);
    assert!(examined.stdout.contains("FAIL  database"), "{examined:?}");
    // The way out, as it was said.
    fs::rename(&database, bed.path("state/jobs.db.damaged")).unwrap();
    fs::copy(&copy, &database).unwrap();
    assert!(bed.lvp(&["job", "list"]).exits(0).stdout.contains("web-1"));
    assert_eq!(fs::read(bed.volume("web-1")).unwrap(), volume);
    let examined = bed.lvp(&["doctor"]).stdout;
    assert!(examined.contains("in order, 1 jobs, schema version"), "{examined}");
}

#[test]
fn a_job_that_cannot_be_read_is_named_by_the_doctor() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    let words = ["provision", "s3://images/good.qcow2", "web-1", "--size", "8M", "-o", "json"];
    let id = bed.lvp(&words).exits(0).json()["job_id"].as_str().unwrap().to_owned();
    let database = rusqlite::Connection::open(bed.path("state/jobs.db")).unwrap();
    database.execute("UPDATE jobs SET kind = 'teleport'", []).unwrap();
    drop(database);
    let examined = bed.lvp(&["doctor"]).stdout;
    let told = format!("of 1 jobs 1 cannot be read and are left as they are: {id}");
    assert!(examined.contains("warn  database") && examined.contains(&told), "{examined}");
    assert!(examined.contains("run the newer lvp that wrote it"), "{examined}");
    assert!(!bed.lvp(&["job", "list"]).exits(0).stdout.contains(&id));
}

#[test]
fn an_interrupt_stops_the_daemon_like_a_termination_however_early() {
    let bed = Bed::new();
    let mut daemon = bed.serve();
    // At once: from the moment that the socket is there, a signal is a wish to stop.
    daemon.signal("INT");
    assert!(daemon.ends_within(SOON).success());
    assert!(bed.log().contains("stopped"));
}

#[test]
fn an_address_that_others_can_reach_is_refused_before_anything_is_done() {
    let bed = Bed::new();
    for host in ["0.0.0.0", "::", "192.0.2.1"] {
        let refused = crate::bed::run(bed.command(&["serve"]).env("HOST", host)).exits(2);
        assert!(refused.stderr.contains("no authentication yet") && refused.stderr.contains(host), "{refused:?}");
        assert!(refused.stderr.contains("hint: set HOST=127.0.0.1"), "{refused:?}");
        assert!(!bed.path("state").exists(), "the state was opened for {host}");
    }
}

#[test]
fn a_socket_that_a_killed_daemon_left_is_no_obstacle() {
    let bed = Bed::new();
    let mut daemon = bed.serve();
    daemon.signal("KILL");
    daemon.ends_within(SOON);
    assert!(bed.socket().exists());
    bed.lvp(&["job", "list"]).exits(0);
    let _daemon = bed.serve();
    bed.lvp(&["job", "list"]).exits(0);
}

#[test]
fn interrupting_a_watcher_leaves_the_job_and_interrupting_the_submitter_cancels_it() {
    let bed = Bed::new();
    let web = Server::start();
    web.serve("/slow.qcow2", page().pace(512, Duration::from_millis(50)));
    let _daemon = bed.serve();
    let url = web.url("/slow.qcow2");
    let words = ["provision", &url, "web-1", "--size", "64M"];
    let mut submitter = Process(bed.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    until(|| bed.get("/api/v1/jobs").contains("\"downloading\""));
    let jobs = bed.lvp(&["job", "list", "-o", "json"]).exits(0).json();
    let id = jobs["jobs"][0]["job_id"].as_str().unwrap().to_owned();
    let mut watcher =
        Process(bed.command(&["job", "watch", &id]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    // It shows the job, so it listens for the signal.
    let mut line = String::new();
    BufReader::new(watcher.0.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    watcher.signal("INT");
    assert_eq!(watcher.ends_within(SOON).code(), Some(130));
    assert_eq!(bed.lvp(&["job", "show", &id, "-o", "json"]).exits(0).json()["status"], "running");
    submitter.signal("INT");
    assert_eq!(submitter.ends_within(SOON).code(), Some(130));
    assert_eq!(bed.lvp(&["job", "show", &id, "-o", "json"]).exits(0).json()["status"], "cancelled");
    assert!(!bed.volume("web-1").exists());
}

#[test]
fn passwords_and_keys_stand_in_no_log_and_no_answer() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    let _daemon = bed.serve();
    let url = "https://user:hush-hush@images.invalid/a.qcow2";
    let refused = bed.lvp(&["provision", url, "web-1", "--size", "8M"]).exits(2);
    assert!(refused.stderr.contains("url_has_credentials"), "{refused:?}");
    let signed = "http://127.0.0.1:1/a.qcow2?X-Amz-Signature=hush-hush";
    let failed = bed.lvp(&["provision", signed, "web-1", "--size", "8M"]).exits(6);
    bed.lvp(&["provision", "s3://images/good.qcow2", "web-1", "--size", "8M"]).exits(0);
    let body = format!("{{\"image_url\": \"{url}\", \"volume_name\": \"a\", \"size\": 1}}");
    let head = format!(
        "POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let answer = bed.ask(&format!("{head}{body}"));
    assert!(answer.contains("url_has_credentials"), "{answer}");
    let page = bed.get("/metrics");
    let all = [
        refused.stderr,
        refused.stdout,
        failed.stderr,
        failed.stdout,
        answer,
        bed.get("/api/v1/jobs"),
        page,
        bed.log(),
    ];
    for text in all {
        for secret in ["hush-hush", "a-very-secret-key"] {
            let line = text.lines().find(|line| line.contains(secret));
            assert!(line.is_none(), "{secret} is shown: {line:?}");
        }
    }
    assert!(bed.log().contains("TRACE") || bed.log().contains("DEBUG"), "the log was not asked for everything");
}
