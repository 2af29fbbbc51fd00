//! What happens to a volume or its source while the daemon is down in the middle of its job, each with a whole job: part of
//! the row "People" of docs/reference/faults.md.
//!
//! It leaves out volumes that were new (`people_faults`), and what happens at each step (the fault matrix).

use std::fs;

use e2e::server::Page;
use serde_json::json;

use crate::{
    auditor::{TAGS, attributes},
    people_faults::{ready, slow_order, writing},
    source_faults::{order, somebodys_volume},
};

/// Nobody asked for what is there now to be overwritten.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_put_in_place_of_one_that_was_partly_overwritten_while_the_daemon_is_down_is_left_alone() {
    let (mut bed, web, _) = ready().await;
    let renamed = "volume old, which was called web-1 when the job began, was there before and is partly overwritten";
    let lost = "volume web-1 was there before and is partly overwritten; it was removed or renamed since";
    for (way, code, said) in [
        ("removed", "volume_not_found", lost),
        ("renamed", "volume_not_found", renamed),
        ("replaced", "file_in_the_way", lost),
        ("renamed and replaced", "file_in_the_way", renamed),
    ] {
        println!("{way}");
        somebodys_volume(&bed, "web-1");
        let id = bed.submit(&slow_order(&web.url("/x.raw"), "web-1")).await;
        writing(&bed, &id).await;
        let (volume, old) = (bed.volume("web-1"), bed.volume("old"));
        let other = vec![9; fs::metadata(&volume).unwrap().len() as usize];
        bed.restart_after(|_| {
            if way.starts_with("renamed") {
                fs::rename(&volume, &old).unwrap();
            } else {
                fs::remove_file(&volume).unwrap();
            }
            if way.ends_with("replaced") {
                fs::write(&volume, &other).unwrap();
            }
        })
        .await;
        let mut job = bed.ended(&id).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!(code)), "{job:#}");
        assert_eq!(job["retryable"], code == "volume_not_found", "{job:#}");
        let left = job["details"].as_object_mut().unwrap().remove("not_undone").unwrap().to_string();
        assert!(left.contains(said), "{left}");
        assert_eq!(volume.exists(), way.ends_with("replaced"));
        if volume.exists() {
            assert!(fs::read(&volume).unwrap() == other && attributes(&volume).is_empty(), "it was touched");
            fs::remove_file(&volume).unwrap();
        }
        if old.exists() {
            assert!(!attributes(&old).contains_key(TAGS), "it says that it holds an image");
            fs::remove_file(&old).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_was_begun_and_is_still_there_is_written_to_its_end() {
    let (mut bed, web, image) = ready().await;
    somebodys_volume(&bed, "web-1");
    let id = bed.submit(&slow_order(&web.url("/x.raw"), "web-1")).await;
    writing(&bed, &id).await;
    bed.restart_after(|_| ()).await;
    assert_eq!(bed.ended(&id).await["status"], "completed");
    bed.assert_holds(&bed.volume("web-1"), &image, "raw", fs::metadata(bed.volume("web-1")).unwrap().len());
}

/// Only its end was not recorded: the volume says that it holds the image, and its source is not asked any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_written_volume_is_complete_though_its_source_is_gone() {
    let (mut bed, web, _) = ready().await;
    for was_there in [false, true] {
        println!("it was there: {was_there}");
        web.serve("/x.raw", Page::new(fs::read(bed.path("images/disk-1.raw")).unwrap()));
        if was_there {
            somebodys_volume(&bed, "web-2");
        }
        let name = if was_there { "web-2" } else { "web-1" };
        let first = bed.provision(&order(&web.url("/x.raw"), name)).await;
        let id = first["job_id"].as_str().unwrap();
        let volume = bed.volume(name);
        let (content, tags) = (fs::read(&volume).unwrap(), attributes(&volume));
        bed.restart_after(|state| {
            let database = rusqlite::Connection::open(state.join("jobs.db")).unwrap();
            let overwriting = if was_there { "true" } else { "false" };
            let changed = database.execute(
                "UPDATE jobs SET status = 'running', finished_at = NULL,
                 record = json_set(record, '$.finished', json('false'), '$.overwriting', json(?1)) WHERE id = ?2",
                [overwriting, id],
            );
            assert_eq!(changed.unwrap(), 1);
            web.serve("/x.raw", Page::new(Vec::new()).fail(1000, 403));
        })
        .await;
        let job = bed.ended(id).await;
        assert_eq!(job["status"], "completed", "{job:#}");
        assert!(fs::read(&volume).unwrap() == content && attributes(&volume) == tags, "it was touched");
    }
}
