//! Following jobs: server-sent events, dry runs, lists.

use std::{fs, time::Duration};

use e2e::server::{Page, Server};
use serde_json::{Value, json};

use crate::bed::{Bed, DISK, MIB};

/// The events of a stream that has closed: name and data.
fn events(text: &str) -> Vec<(String, Value)> {
    let field = |event: &str, name: &str| {
        event.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim_start().to_owned())
    };
    let parse = |event: &str| Some((field(event, "event:")?, serde_json::from_str(&field(event, "data:")?).unwrap()));
    text.split("\n\n").filter_map(parse).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_tell_progress_that_never_goes_back_and_then_the_end() {
    let bed = Bed::new().await;
    let web = Server::start();
    let image = fs::read(bed.image("slow.qcow2", 1)).unwrap();
    let piece = image.len() / 8;
    web.serve("/slow.qcow2", Page::new(image).pace(piece, Duration::from_millis(150)));
    let mut order = bed.order("slow.qcow2", "web-1");
    order["image_url"] = json!(web.url("/slow.qcow2"));
    let id = bed.submit(&order).await;

    let stream = bed.tcp().get(&format!("/api/v1/jobs/{id}/events")).await;
    assert_eq!((stream.status, stream.headers["content-type"].to_str().unwrap()), (200, "text/event-stream"));
    let events = events(&stream.text);
    let (last, before) = events.split_last().unwrap();
    assert_eq!(
        (last.0.as_str(), &last.1["status"], &last.1["progress"]["percent"]),
        ("completed", &json!("completed"), &json!(100))
    );
    assert!(before.len() >= 3, "{events:#?}");
    assert!(before.iter().all(|(name, _)| name == "progress"));
    let percents: Vec<u64> = events.iter().map(|(_, job)| job["progress"]["percent"].as_u64().unwrap()).collect();
    assert!(percents.is_sorted(), "{percents:?}");
    assert!(percents.iter().any(|percent| (1..50).contains(percent)), "{percents:?}");
    let downloading: Vec<&Value> =
        before.iter().map(|(_, job)| &job["progress"]).filter(|progress| progress["stage"] == "downloading").collect();
    assert!(
        downloading.iter().any(|progress| progress["bytes_per_second"].as_u64().is_some_and(|rate| rate > 0)),
        "{downloading:?}"
    );
    for (_, job) in &events {
        let progress = &job["progress"];
        assert!(
            progress["bytes_processed"].as_u64()
                <= progress["bytes_total"].as_u64().filter(|total| *total > 0).or(Some(u64::MAX)),
            "{progress}"
        );
    }
    // Of a job that has ended, the end alone.
    let again = bed.tcp().get(&format!("/api/v1/jobs/{id}/events")).await;
    let again = self::events(&again.text);
    assert_eq!(again.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["completed"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_answers_the_plan_and_changes_nothing() {
    let bed = Bed::new().await;
    let image = bed.image("good.qcow2", 1);
    let digest = bed.upload(&image);
    let order = bed.order("good.qcow2", "web-1");
    let mut as_field = order.clone();
    as_field["dry_run"] = json!(true);
    let (before, length) = (bed.listing(), fs::metadata(&image).unwrap().len());
    let by_query = bed.tcp().post("/api/v1/provision?dry_run=true", &order).await.expect(200);
    let by_field = bed.tcp().post("/api/v1/jobs", &as_field).await.expect(200);
    let mut to_write = Value::Null;
    for mut plan in [by_query, by_field] {
        to_write = plan.as_object_mut().unwrap().remove("bytes_to_write").unwrap();
        assert!(plan.as_object_mut().unwrap().remove("target_free_bytes").unwrap().as_u64().unwrap() > 0);
        let expected = json!({
            "image_url": "s3://images/good.qcow2", "image_type": "qcow2", "image_digest": format!("sha256:{digest}"),
            "cache_hit": false, "bytes_to_fetch": length, "bytes_to_zero": 0, "virtual_size_bytes": DISK,
            "volume": "web-1", "target": format!("dir:{}", bed.path("volumes").display()),
            "volume_action": "create", "volume_size_bytes": DISK, "target_promised_bytes": 0,
            "creates": [
                { "kind": "cached_image", "size_bytes": length },
                { "kind": "volume", "name": "web-1", "size_bytes": DISK }
            ]
        });
        assert_eq!(plan, expected);
    }
    assert_eq!((bed.listing(), bed.all_jobs().await.len()), (before, 0));

    let receipt = bed.provision(&order).await["receipt"].clone();
    assert_eq!(receipt["bytes_decoded"], to_write, "what was planned is what was done: {receipt:#}");
    let before = bed.listing();
    let plan = bed.tcp().post("/api/v1/jobs", &as_field).await.expect(200);
    assert_eq!(
        (&plan["volume_action"], &plan["cache_hit"], &plan["bytes_to_fetch"]),
        (&json!("reuse"), &json!(true), &json!(0))
    );
    let to_zero = json!(DISK - to_write.as_u64().unwrap());
    assert_eq!((&plan["bytes_to_write"], &plan["bytes_to_zero"], &plan["creates"]), (&to_write, &to_zero, &json!([])));
    assert_eq!(plan.get("seconds_estimated"), None, "no hit was provisioned here before");
    assert_eq!((bed.listing(), bed.all_jobs().await.len()), (before, 1));
    bed.provision(&bed.order("good.qcow2", "web-2")).await;
    let plan = bed.tcp().post("/api/v1/jobs", &as_field).await.expect(200);
    assert!(plan["seconds_estimated"].as_u64().is_some_and(|seconds| seconds >= 1), "{plan:#}");
    let mut elsewhere = as_field.clone();
    elsewhere["target"] = json!("other");
    assert_eq!(bed.tcp().post("/api/v1/jobs", &elsewhere).await.expect(200).get("seconds_estimated"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_refuses_what_the_job_would() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let before = bed.listing();
    for (image, volume, size, code, status) in [
        ("missing.qcow2", "web-2", DISK, "source_not_found", 422),
        ("good.qcow2", "web-2", DISK - 1, "image_too_large", 422),
        ("good.qcow2", "web-1", DISK * 2, "volume_incompatible", 409),
        ("good.qcow2", "web-2", 7 << 60, "insufficient_space", 507),
        ("good.qcow2", "-", DISK, "invalid_volume_name", 400),
    ] {
        let mut order = bed.order(image, volume);
        order["size"] = json!(size);
        let answer = bed.tcp().post("/api/v1/jobs?dry_run=true", &order).await;
        assert_eq!(answer.status, status, "{}", answer.text);
        answer.refusal(code);
    }
    assert_eq!((bed.listing(), bed.all_jobs().await.len()), (before, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_are_listed_newest_first_by_page_and_by_status() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let mut ids = Vec::new();
    for image in ["good.qcow2", "missing.qcow2", "good.qcow2", "missing.qcow2", "good.qcow2"] {
        let id = bed.submit(&bed.order(image, &format!("web-{}", ids.len()))).await;
        bed.ended(&id).await;
        ids.insert(0, id);
    }
    let page = async |query: &str| {
        let list = bed.tcp().get(&format!("/api/v1/jobs?{query}")).await.expect(200);
        let ids: Vec<String> =
            list["jobs"].as_array().unwrap().iter().map(|job| job["job_id"].as_str().unwrap().to_owned()).collect();
        (ids, list.get("next").map(|next| next.as_str().unwrap().to_owned()))
    };
    assert_eq!(page("").await, (ids.clone(), None));
    let (mut seen, mut before) = (Vec::new(), String::new());
    loop {
        let (jobs, next) = page(&format!("limit=2{before}")).await;
        seen.extend(jobs);
        let Some(next) = next else { break };
        before = format!("&before={next}");
    }
    assert_eq!(seen, ids);
    assert_eq!(page("limit=5").await, (ids.clone(), None));
    assert_eq!(page("status=failed").await.0, [ids[1].clone(), ids[3].clone()]);
    assert_eq!(page("status=completed&limit=1").await, (vec![ids[0].clone()], Some(ids[0].clone())));
    assert_eq!(page("status=running").await, (Vec::new(), None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_history_is_pruned_to_its_limit() {
    let bed = Bed::with(|settings| settings.job_history = 2).await;
    let mut ids = Vec::new();
    for _ in 0..4 {
        let id = bed.submit(&bed.order("missing.qcow2", "web-1")).await;
        // The oldest ones vanish, so it is asked for by list.
        while bed.all_jobs().await[0]["status"] != "failed" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        ids.push(id);
    }
    let begun = std::time::Instant::now();
    while bed.all_jobs().await.len() > 2 {
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    bed.tcp().get(&format!("/api/v1/jobs/{}", ids[0])).await.refusal("job_not_found");
    assert_eq!(bed.job(&ids[3]).await["status"], "failed");
    // Those that are cancelled before they begin are no way around it.
    let web = Server::start();
    web.serve("/x.raw", Page::new(vec![7; 2 * MIB as usize]).stall(&[MIB; 99]));
    let stuck = json!({ "image_url": web.url("/x.raw"), "volume_name": "web-1", "size": 2 * MIB, "image_type": "raw" });
    let running = bed.submit(&stuck).await;
    bed.job_when(&running, |job| job["status"] == "running").await;
    for _ in 0..4 {
        let waiting = bed.submit(&stuck).await;
        bed.tcp().delete(&format!("/api/v1/jobs/{waiting}")).await.expect(200);
    }
    assert_eq!(bed.all_jobs().await.len(), 3, "one runs, two are remembered");
}
