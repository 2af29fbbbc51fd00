//! Every kind of failure has its exit code, its line on stderr with the stable code, and a hint.

use std::{fs, process::Command};

use crate::bed::{Bed, Run, run};

#[track_caller]
fn assert_error(run: Run, exit: i32, code: &str) {
    let run = run.exits(exit);
    assert_eq!(run.stdout, "", "{run:?}");
    assert!(run.stderr.contains("error: ") && run.stderr.contains(&format!("[{code}]")), "{run:?}");
    assert!(run.stderr.contains("hint: "), "{run:?}");
}

#[test]
fn each_kind_of_error_has_its_exit_code() {
    let bed = Bed::new();
    let image = bed.publish("good.qcow2");
    let provision = |url: &str, volume: &str, more: &[&str]| bed.lvp(&[&["provision", url, volume], more].concat());
    let good = "s3://images/good.qcow2";
    provision(good, "web-1", &["--size", "8M"]).exits(0);

    assert_error(provision("ftp://host/a.qcow2", "web-2", &["--size", "8M"]), 2, "unsupported_scheme");
    assert_error(provision(good, "web-2", &["--size", "0"]), 2, "invalid_size");
    assert_error(bed.lvp(&["job", "show", "0190b5a0-0000-7000-8000-000000000000"]), 3, "job_not_found");
    assert_error(bed.lvp(&["image", "show", "0123456789abcdef"]), 3, "image_not_found");
    assert_error(bed.lvp(&["volume", "delete", "web-2", "--force"]), 3, "volume_not_found");
    assert_error(provision(good, "web-2", &["--size", "8M", "--target", "nowhere"]), 3, "target_not_found");
    assert_error(provision(good, "web-1", &["--size", "16M"]), 4, "volume_incompatible");
    let mut user = Command::new("sleep").arg("60").stdin(fs::File::open(bed.volume("web-1")).unwrap()).spawn().unwrap();
    let in_use = provision(good, "web-1", &["--size", "8M"]);
    user.kill().unwrap();
    user.wait().unwrap();
    assert_error(in_use, 4, "volume_in_use");
    assert_error(provision(good, "web-2", &["--size", "4M"]), 5, "image_too_large");
    assert_error(provision(good, "web-2", &["--size", "8M", "--type", "raw"]), 5, "image_type_mismatch");
    let zero = format!("sha256:{}", "0".repeat(64));
    assert_error(provision(good, "web-2", &["--size", "8M", "--checksum", &zero]), 5, "checksum_mismatch");
    assert_error(provision("s3://images/missing.qcow2", "web-2", &["--size", "8M"]), 6, "source_not_found");
    assert_error(provision("http://127.0.0.1:1/a.qcow2", "web-2", &["--size", "8M"]), 6, "source_unreachable");
    assert_error(provision(good, "web-2", &["--size", "7000P"]), 7, "insufficient_space");
    assert_error(bed.lvp(&["--server", "http://127.0.0.1:1", "job", "list"]), 8, "daemon_unreachable");
    let missing = bed.path("images/missing.qcow2");
    assert_error(provision(missing.to_str().unwrap(), "web-2", &["--size", "8M"]), 6, "source_not_found");
    bed.assert_holds("web-1", &image);
    assert!(!bed.volume("web-2").exists());
}

#[test]
fn what_cannot_be_typed_is_told_by_the_command_line_itself() {
    let bed = Bed::new();
    for (words, word) in [
        (&["provision", "s3://a/b", "-x", "--size", "8M"][..], "-x"),
        (&["provision", "s3://a/b", "..", "--size", "8M"], "'..'"),
        (&["provision", "s3://a/b", "snapshot1", "--size", "8M"], "reserved"),
        (&["provision", "s3://a/b", "web-1", "--size", "50X"], "50G"),
        (&["provision", "s3://a/b", "web-1", "--size", "-5G"], "-5G"),
        (&["provision", "s3://a/b", "web-1"], "--size"),
        (&["provision", "s3://a/b", "web-1", "--size", "8M", "--type", "vmdk"], "qcow2"),
        (&["provision", "s3://a/b", "web-1", "--size", "8M", "--checksum", "md5:1"], "sha256"),
        (&["job", "show", "not-a-uuid"], "UUID"),
        (&["job", "list", "--status", "done"], "completed"),
        (&["job", "list", "--limit", "0"], "1..=500"),
        (&["provsion"], "provision"),
    ] {
        let refused = bed.lvp(words).exits(2);
        assert!(refused.stderr.contains(word) && refused.stdout.is_empty(), "{words:?}: {refused:?}");
    }
    assert!(!bed.path("state").exists());
}

#[test]
fn a_place_that_cannot_be_used_is_an_error_with_a_way_out() {
    let bed = Bed::new();
    fs::write(bed.path("state"), "in the way").unwrap();
    let refused = bed.lvp(&["job", "list"]).exits(1);
    assert!(refused.stderr.contains("hint: set LVP_STATE_DIR"), "{refused:?}");
    let long = bed.path(&"x".repeat(120));
    let socket = run(bed.command(&["serve"]).env("LVP_STATE_DIR", bed.path("s")).env("LVP_SOCKET", long)).exits(2);
    assert!(socket.stderr.contains("107"), "{socket:?}");
}
