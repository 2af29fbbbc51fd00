//! Configuration as the binary reads it: origins, what is refused, and the examination of the host.

use std::fs;

use crate::bed::{Bed, run};

#[test]
fn each_setting_is_shown_with_its_origin_and_secrets_are_not() {
    let bed = Bed::new();
    let file = bed.path("other.toml");
    fs::write(&file, "max_concurrent_jobs = 3\nworkers = 3\n[targets.fast]\nkind = 'lvm'\nvolume_group = 'vg0'\n")
        .unwrap();
    let words = ["--config", file.to_str().unwrap(), "config", "show", "--log-level", "warn", "-o", "json"];
    let shown = run(bed.command(&words).env("LVP_WORKERS", "5")).exits(0);
    assert!(!shown.stdout.contains("secret-key") && !shown.stdout.contains("access-key"), "{shown:?}");
    let rows = shown.json();
    let row = |key: &str| {
        let row =
            rows.as_array().unwrap().iter().find(|row| row["setting"] == key).unwrap_or_else(|| panic!("no {key}"));
        (row["value"].as_str().unwrap().to_owned(), row["origin"].as_str().unwrap().to_owned())
    };
    assert!(rows.as_array().unwrap().iter().any(|row| row["meaning"] == "Jobs that run at once"));
    let pair = |value: &str, origin: &str| (value.to_owned(), origin.to_owned());
    assert_eq!(row("log_level"), pair("warn", "--log-level"));
    assert_eq!(row("workers"), pair("5", "LVP_WORKERS"));
    assert_eq!(row("max_concurrent_jobs"), pair("3", &file.display().to_string()));
    assert_eq!(row("minio.region"), pair("us-east-1", "default"));
    assert_eq!(row("minio.secret_key"), pair("(hidden)", "MINIO_SECRET_KEY"));
    assert_eq!(row("targets.fast"), pair("lvm:vg0", &file.display().to_string()));
    assert_eq!(row("socket"), pair(&bed.socket().display().to_string(), "default"));
}

#[test]
fn what_is_not_a_setting_is_refused_with_the_nearest_name() {
    let bed = Bed::new();
    let file = bed.path("other.toml");
    fs::write(&file, "[minio]\nendpiont = 'http://127.0.0.1:1'\n").unwrap();
    let refused = bed.lvp(&["--config", file.to_str().unwrap(), "job", "list"]).exits(2);
    assert!(
        refused.stderr.contains("minio.endpiont") && refused.stderr.contains("did you mean minio.endpoint?"),
        "{refused:?}"
    );
    let refused = run(bed.command(&["job", "list"]).env("LVP_CACHE_DIRR", "/x")).exits(2);
    assert!(refused.stderr.contains("did you mean LVP_CACHE_DIR?"), "{refused:?}");
    let refused = run(bed.command(&["job", "list"]).env("MAX_CONCURRENT_JOBS", "0")).exits(2);
    assert!(
        refused.stderr.contains("from MAX_CONCURRENT_JOBS") && refused.stderr.contains("at least 1"),
        "{refused:?}"
    );
    for (name, value, words) in [
        ("LVP_DOWNLOAD_LIMIT", "fast", "is not a size"),
        ("LVP_WRITE_LIMIT", "1K", "is less than 64 KiB a second"),
        ("LVP_THIN_FLOOR", "101", "is not a number of percent"),
        ("LVP_IO_PRESSURE_LIMIT", "0", "is not a number of percent from 1 to 99"),
        ("LVP_IO_PRIORITY", "Low", "is not one of normal, low and idle"),
    ] {
        let refused = run(bed.command(&["job", "list"]).env(name, value)).exits(2);
        assert!(refused.stderr.contains(name) && refused.stderr.contains(words), "{refused:?}");
    }
    let refused = run(bed.command(&["job", "list"]).env("LVP_CONFIG", "/nowhere.toml")).exits(2);
    assert!(refused.stderr.contains("/nowhere.toml"), "{refused:?}");
    assert!(!bed.path("state").exists());
}

#[test]
fn credentials_are_missed_only_by_a_source_that_needs_them() {
    let bed = Bed::new();
    let image = bed.publish("good.qcow2");
    let without = |words: &[&str]| {
        let mut command = bed.command(words);
        run(command.env_remove("MINIO_ACCESS_KEY").env_remove("MINIO_SECRET_KEY"))
    };
    without(&["provision", image.to_str().unwrap(), "web-1", "--size", "8M"]).exits(0);
    let denied = without(&["provision", "s3://images/good.qcow2", "web-2", "--size", "8M"]).exits(6);
    assert!(denied.stderr.contains("MINIO_ACCESS_KEY"), "{denied:?}");
    bed.store.make_public("images");
    without(&["provision", "s3://images/good.qcow2", "web-2", "--size", "8M"]).exits(0);
    let nowhere = run(bed
        .command(&["provision", "s3://images/good.qcow2", "web-3", "--size", "8M"])
        .env_remove("MINIO_ENDPOINT"));
    assert!(nowhere.exits(2).stderr.contains("MINIO_ENDPOINT"));
}

#[test]
fn doctor_ends_well_on_a_usable_host_and_tells_the_fix_on_another() {
    let bed = Bed::new();
    let well = bed.lvp(&["doctor"]).exits(0);
    for word in ["state", "cache", "libvirt", "target:default", "object store", "takes the keys", "clock", "daemon"] {
        assert!(well.stdout.contains(word), "no {word}: {}", well.stdout);
    }
    assert!(!well.stdout.contains("FAIL"));
    assert!(!bed.path("state").exists(), "doctor changed something");

    let keys = run(bed.command(&["doctor"]).env("MINIO_SECRET_KEY", "wrong")).exits(8);
    assert!(
        keys.stdout.contains("FAIL  object store") && keys.stdout.contains("fix: check MINIO_ACCESS_KEY"),
        "{keys:?}"
    );
    let group = run(bed.command(&["doctor", "-o", "json"]).env("LVM_VOLUME_GROUP", "no-such-group")).exits(8);
    let checks = group.json();
    let target = checks.as_array().unwrap().iter().find(|check| check["name"] == "target:default").unwrap();
    assert!(target["status"] == "unhealthy" && target["hint"].is_string(), "{target:#}");
    // It runs beside a daemon.
    let _daemon = bed.serve();
    assert!(bed.lvp(&["doctor"]).exits(0).stdout.contains("answers at"));
}

#[test]
fn a_linked_target_is_told_of_in_tables_refusals_and_by_doctor() {
    let bed = Bed::new();
    bed.publish("good.qcow2");
    let folder = bed.path("linked");
    let target = format!("[targets.linked]\nkind='dir'\npath='{}'\nformat='qcow2'\nlinked=true\n", folder.display());
    std::fs::write(bed.path("config.toml"), target).unwrap();
    let provision = |name: &str, more: &[&str]| {
        let words = ["provision", "s3://images/good.qcow2", name, "--size", "8M", "--target", "linked"];
        bed.lvp(&[&words[..], more].concat()).exits(0)
    };
    provision("web-1", &[]);
    let planned = provision("web-2", &["--dry-run"]);
    assert!(planned.stdout.contains("to create as an overlay on the image's base"), "{planned:?}");
    provision("web-2", &[]);
    let bases = bed.lvp(&["image", "bases", "-o", "json"]).exits(0).json();
    let base = bases[0]["name"].as_str().unwrap();
    assert_eq!((bases.as_array().unwrap().len(), &bases[0]["linked_volumes"]), (1, &2.into()), "{bases:#}");
    let shown = bed.lvp(&["volume", "show", "web-1", "--target", "linked"]).exits(0);
    let told = shown.stdout.lines().any(|line| line.contains("linked to") && line.contains(base));
    assert!(told, "{shown:?}");
    let listed = bed.lvp(&["volume", "list", "--target", "linked"]).exits(0);
    assert_eq!(listed.stdout.matches("to its base").count(), 2, "{listed:?}");
    let refused = bed.lvp(&["image", "delete", bases[0]["image_digest"].as_str().unwrap()]).exits(4);
    assert!(refused.stderr.contains("needed by 2 volumes linked to it, such as web-1"), "{refused:?}");
    assert!(refused.stderr.contains("hint: delete the volumes first"), "{refused:?}");

    bed.lvp(&["doctor"]).exits(0);
    std::fs::rename(folder.join(base), folder.join("aside")).unwrap();
    let lost = bed.lvp(&["doctor"]).exits(8);
    assert!(lost.stdout.contains(&format!("web-2 needs {base}, which is not there")), "{lost:?}");
}
