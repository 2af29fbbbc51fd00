//! Commands that do their work themselves, because no daemon runs.

use std::{
    fs,
    io::{BufRead, BufReader},
    process::Stdio,
    time::Duration,
};

use e2e::images;

use crate::bed::{Bed, DISK, Process, run, until};

#[test]
fn an_image_goes_from_a_path_to_a_volume_and_the_second_time_from_the_cache() {
    let bed = Bed::new();
    let image = bed.image("good.qcow2");
    // A path as the user sees it, relative to where he stands.
    let first = bed.lvp(&["provision", "images/good.qcow2", "web-1", "--size", "8M"]).exits(0);
    assert!(first.stdout.contains("web-1 is ready at") && first.stdout.contains("downloaded"), "{first:?}");
    assert!(
        first.stderr.contains("populating") || first.stderr.contains("downloading") || first.stderr.contains("waiting"),
        "{first:?}"
    );
    let second = bed.lvp(&["provision", image.to_str().unwrap(), "web-2", "--size", "8M"]).exits(0);
    assert!(second.stdout.contains("from the cache"), "{second:?}");
    for volume in ["web-1", "web-2"] {
        bed.assert_holds(volume, &image);
    }
}

#[test]
fn a_compressed_disk_goes_from_a_url_to_a_volume_of_a_directory() {
    let bed = Bed::new();
    let raw = bed.path("images/debian.img");
    images::raw_with_data(&raw, DISK, 40, 1).unwrap();
    let image = images::compressed(&raw, "xz", &["-1"]).unwrap();
    bed.store.put_file("images", "debian.img.xz", &image).unwrap();
    fs::create_dir(bed.path("disks")).unwrap();
    let target = format!("dir:{}", bed.path("disks").display());
    let words = ["provision", "s3://images/debian.img.xz", "web-1", "--size", "8M", "--target", &target];
    assert!(bed.lvp(&[&words[..], &["--dry-run"]].concat()).exits(0).stdout.contains("8 MiB"));
    bed.lvp(&words).exits(0);
    assert!(fs::read(bed.path("disks/web-1.raw")).unwrap() == fs::read(&raw).unwrap());
    let list = bed.lvp(&["image", "list"]).exits(0).stdout;
    assert!(list.contains(".raw.xz") && list.contains("8 MiB"), "{list}");
    // Compressed as another one does it, and under a name that says nothing.
    let image = images::compressed(&raw, "gz", &[]).unwrap();
    bed.store.put_file("images", "debian", &image).unwrap();
    let words = ["provision", "s3://images/debian", "web-2", "--size", "8M", "-o", "json"];
    let refused = bed.lvp(&[&words[..], &["--type", "raw"]].concat()).exits(5);
    assert_eq!(refused.json()["hint"], "declare the type raw.gz");
    bed.lvp(&[&words[..], &["--type", "raw.gz"]].concat()).exits(0);
    assert!(fs::read(bed.volume("web-2")).unwrap() == fs::read(&raw).unwrap());
    let list = bed.lvp(&["image", "list"]).exits(0).stdout;
    assert!(list.lines().any(|line| line.contains(".raw.gz") && line.contains('?')), "{list}");
}

#[test]
fn an_image_goes_from_the_object_store_to_a_volume() {
    let bed = Bed::new();
    let image = bed.publish("good.qcow2");
    let job = bed.lvp(&["provision", "s3://images/good.qcow2", "web-1", "--size", "8M", "-o", "json"]).exits(0).json();
    assert_eq!(
        (&job["status"], &job["volume"], &job["cache_hit"]),
        (&"completed".into(), &"web-1".into(), &false.into())
    );
    bed.assert_holds("web-1", &image);
    let id = job["job_id"].as_str().unwrap();
    // Another process knows it too.
    assert_eq!(bed.lvp(&["job", "show", id, "-o", "json"]).exits(0).json(), job);
    assert!(bed.lvp(&["job", "list"]).exits(0).stdout.contains(id));
    assert_eq!(bed.lvp(&["job", "watch", id, "-o", "json"]).exits(0).json(), job);
    assert_eq!(bed.lvp(&["volume", "list", "-o", "json"]).exits(0).json()[0]["name"], "web-1");
    let image = &bed.lvp(&["image", "list", "-o", "json"]).exits(0).json()[0];
    let name = image["name"].as_str().unwrap();
    assert!(bed.lvp(&["image", "verify", name]).exits(0).stdout.contains("is intact"));
    assert!(bed.lvp(&["image", "pin", name]).exits(0).stdout.contains("is pinned"));
    bed.lvp(&["image", "delete", name]).exits(4);
    bed.lvp(&["image", "unpin", name]).exits(0);
    bed.lvp(&["image", "delete", name]).exits(0);
    bed.lvp(&["volume", "delete", "web-1"]).exits(4);
    bed.lvp(&["volume", "delete", "web-1", "--force"]).exits(0);
    assert!(bed.lvp(&["volume", "list"]).exits(0).stdout.contains("no volumes"));
}

#[test]
fn results_are_json_or_yaml_for_programs_and_nothing_else_is_on_stdout() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    let words = ["provision", "s3://images/good.qcow2", "web-1", "--size", "8M", "--output"];
    let yaml = bed.lvp(&[&words[..], &["yaml"]].concat()).exits(0).stdout;
    assert!(
        yaml.lines().any(|line| line == "status: completed") && yaml.lines().all(|line| line.contains(':')),
        "{yaml}"
    );
    for command in [&["job", "list"][..], &["image", "list"], &["volume", "list"], &["config", "show"], &["doctor"]] {
        bed.lvp(&[command, &["-o", "json"]].concat()).exits(0).json();
        let yaml = bed.lvp(&[command, &["-o", "yaml"]].concat()).exits(0).stdout;
        assert!(yaml.starts_with("- ") || yaml.starts_with("jobs:"), "{command:?}: {yaml}");
    }
    let failed = bed.lvp(&["volume", "show", "nothing", "-o", "json"]).exits(3);
    assert_eq!(failed.stdout, "");
    let error: serde_json::Value = serde_json::from_str(&failed.stderr).unwrap();
    assert_eq!((&error["error"], &error["code"]), (&"volume_not_found".into(), &404.into()));
}

#[test]
fn the_doctor_names_volumes_that_are_not_complete() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    for name in ["web-1", "web-2"] {
        bed.lvp(&["provision", "s3://images/good.qcow2", name, "--size", "8M"]).exits(0);
    }
    let record = r#"{"job":"0193f2b0-0000-7000-8000-000000000000","image":null,"incomplete":true}"#;
    let value = format!("--value={record}");
    images::run("setfattr", &["--name=user.lvp", &value, bed.volume("web-2").to_str().unwrap()]).unwrap();
    let told = bed.lvp(&["doctor"]).exits(0);
    assert!(told.stdout.contains("incomplete: web-2") && !told.stdout.contains("web-1"), "{told:?}");
}

#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    let words = ["provision", "s3://images/good.qcow2", "web-1", "--size", "8M", "--dry-run"];
    let plan = bed.lvp(&words).exits(0).stdout;
    assert!(plan.contains("to download") && plan.contains("web-1 (to create)") && plan.contains("8 MiB"), "{plan}");
    assert!(plan.contains("makes") && plan.contains("the image in the cache") && plan.contains("to write"), "{plan}");
    assert_eq!(bed.lvp(&[&words[..], &["-o", "json"]].concat()).exits(0).json()["volume_action"], "create");
    assert!(!bed.volume("web-1").exists());
    assert_eq!(fs::read_dir(bed.path("cache")).unwrap().flatten().filter(|entry| entry.path().is_file()).count(), 0);
    assert!(bed.lvp(&["job", "list"]).exits(0).stdout.contains("no jobs"));
}

#[test]
fn a_job_without_a_daemon_is_not_detached() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    let refused = bed.lvp(&["provision", "s3://images/good.qcow2", "web-1", "--size", "8M", "--detach"]).exits(2);
    assert!(
        refused.stderr.contains("--detach needs a daemon") && refused.stderr.contains("hint: start `lvp serve`"),
        "{refused:?}"
    );
    bed.lvp(&["image", "prefetch", "s3://images/good.qcow2", "--detach"]).exits(2);
    assert!(bed.lvp(&["job", "list"]).exits(0).stdout.contains("no jobs"));
    let prefetched = bed.lvp(&["image", "prefetch", "s3://images/good.qcow2"]).exits(0);
    assert!(prefetched.stdout.contains("is cached at"), "{prefetched:?}");
}

#[test]
fn interrupting_a_provision_takes_back_what_it_did() {
    let bed = Bed::new();
    bed.publish_heavy(2048);
    let words = ["provision", "s3://images/heavy.qcow2", "web-1", "--size", "2G"];
    let mut process = Process(bed.command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut stderr = BufReader::new(process.0.stderr.take().unwrap());
    let mut line = String::new();
    until(|| {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before it populated");
        line.contains("populating")
    });
    assert!(bed.volume("web-1").exists());
    process.signal("INT");
    let status = process.ends_within(Duration::from_secs(10));
    assert_eq!(status.code(), Some(130));
    assert!(stderr.lines().map_while(Result::ok).any(|line| line.contains("cancelling")));
    assert!(!bed.volume("web-1").exists());
    let left: Vec<_> = fs::read_dir(bed.path("cache/.lvp")).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("partial")), "{left:?}");
    let jobs = bed.lvp(&["job", "list", "-o", "json"]).exits(0).json();
    assert_eq!((&jobs["jobs"][0]["status"], jobs["jobs"].as_array().unwrap().len()), (&"cancelled".into(), 1));
}

#[test]
fn a_closed_pipe_is_no_panic() {
    let bed = Bed::new();
    let program = env!("CARGO_BIN_EXE_lvp");
    for words in
        ["config show", "completions bash", "completions zsh", "doctor", "job list -o json", "--help", "--version"]
    {
        let mut shell = bed.command(&[]);
        let environment: Vec<_> =
            shell.get_envs().map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned))).collect();
        shell = std::process::Command::new("bash");
        shell.env_clear().envs(environment.into_iter().filter_map(|(name, value)| Some((name, value?))));
        // The reader is gone before the first byte is written.
        let script = format!("set -o pipefail; (sleep 0.3; {program} {words}) | true");
        let ended = run(shell.args(["-c", &script]));
        assert!(!ended.stderr.contains("panicked") && ended.code != 101, "{words}: {ended:?}");
    }
}

#[test]
fn completions_are_printed_for_each_shell() {
    let bed = Bed::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let printed = bed.lvp(&["completions", shell]).exits(0).stdout;
        assert!(printed.contains("provision") && printed.contains("prefetch"), "{shell}");
    }
    // What bash is given, bash reads.
    fs::write(bed.path("completions"), bed.lvp(&["completions", "bash"]).stdout).unwrap();
    run(std::process::Command::new("bash").args(["-n", bed.path("completions").to_str().unwrap()])).exits(0);
}

#[test]
fn two_commands_at_once_are_two_in_a_row() {
    let bed = Bed::new();
    let image = bed.publish("good.qcow2");
    let start = |volume: &str| {
        let words = ["provision", "s3://images/good.qcow2", volume, "--size", &DISK.to_string()];
        Process(bed.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    };
    let mut both = [start("web-1"), start("web-2")];
    for process in &mut both {
        assert!(process.ends_within(Duration::from_secs(20)).success());
    }
    for volume in ["web-1", "web-2"] {
        bed.assert_holds(volume, &image);
    }
}
