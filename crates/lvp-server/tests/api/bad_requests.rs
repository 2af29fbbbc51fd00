//! Bad input that is known to be wrong before there is a job: its code, its status, its words, and nothing left behind.

use reqwest::{
    Method,
    header::{CONTENT_TYPE, HOST},
};
use serde_json::{Value, json};

use crate::bed::{Answer, Bed, Door};

/// A body, the code that it gets, and words of the answer.
type Case<'a> = (String, &'a str, &'a [&'a str]);

/// A good request with some fields changed; `null` removes one.
fn changed(bed: &Bed, changes: &Value) -> String {
    let mut body = bed.order("good.qcow2", "web-1");
    for (field, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => body.as_object_mut().unwrap().remove(field),
            value => body.as_object_mut().unwrap().insert(field.clone(), value.clone()),
        };
    }
    body.to_string()
}

/// Sends each body under both path forms, over TCP, and asserts its refusal, and that nothing came of it.
async fn assert_refused(bed: &Bed, cases: Vec<Case<'_>>) {
    let before = bed.listing();
    for (body, code, words) in cases {
        for path in ["/api/v1/provision", "/api/v1/jobs"] {
            let request = bed.tcp().request(Method::POST, path).header(CONTENT_TYPE, "application/json");
            let answer = Answer::of(request.body(body.clone())).await;
            assert_eq!(answer.status, status_of(code), "{body}: {}", answer.text);
            let refusal = answer.refusal(code);
            assert_eq!(refusal["retryable"], false, "{body}: {refusal:#}");
            assert!(refusal["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{body}: no hint in {refusal:#}");
            for word in words {
                assert!(answer.text.contains(word), "{body}: no '{word}' in {refusal:#}");
            }
        }
    }
    assert_eq!(bed.listing(), before);
    assert_eq!(bed.all_jobs().await, Vec::<Value>::new());
}

fn status_of(code: &str) -> u16 {
    match code {
        "not_permitted" => 403,
        "target_not_found" => 404,
        _ => 400,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_no_request_is_refused_with_its_mistake() {
    let bed = Bed::new().await;
    let with = |changes: Value| changed(&bed, &changes);
    assert_refused(
        &bed,
        vec![
            ("{".to_owned(), "malformed_json", &["not JSON"]),
            (String::new(), "malformed_json", &["not JSON"]),
            ("nonsense".to_owned(), "malformed_json", &["not JSON", "line 1 column"]),
            (format!("{} {{}}", with(json!({}))), "malformed_json", &["trailing"]),
            ("[]".to_owned(), "invalid_field", &[]),
            ("null".to_owned(), "invalid_field", &[]),
            ("\"text\"".to_owned(), "invalid_field", &[]),
            ("{}".to_owned(), "invalid_field", &["image_url"]),
            (with(json!({ "image_url": null })), "invalid_field", &["missing", "image_url"]),
            (with(json!({ "volume_name": null })), "invalid_field", &["missing", "volume_name"]),
            (with(json!({ "image_url": 7 })), "invalid_field", &["image_url", "string"]),
            (with(json!({ "volume_name": ["web-1"] })), "invalid_field", &["volume_name", "string"]),
            (with(json!({ "dry_run": "yes" })), "invalid_field", &["dry_run", "boolean"]),
            (with(json!({ "voluem_name": "web-1" })), "unknown_field", &["voluem_name", "volume_name"]),
            (with(json!({ "image_type": "vmdk" })), "invalid_field", &["image_type", "qcow2", "raw"]),
            (with(json!({ "image_type": null, "image_url": bed.url("disk.img") })), "invalid_field", &["image_type"]),
            (with(json!({ "correlation_id": "a\nb" })), "invalid_field", &["correlation_id"]),
            (with(json!({ "correlation_id": "x".repeat(257) })), "invalid_field", &["correlation_id", "256"]),
            (with(json!({ "checksum": "md5:00" })), "invalid_checksum", &["md5", "sha256"]),
            (with(json!({ "checksum": "sha256:12" })), "invalid_checksum", &["64"]),
            (with(json!({ "checksum": "" })), "invalid_checksum", &["sha256"]),
            (with(json!({ "limit_rate": 0 })), "invalid_field", &["limit_rate", "64 KiB", "100M"]),
            (with(json!({ "limit_rate": "1K" })), "invalid_field", &["limit_rate", "1 KiB"]),
            (with(json!({ "limit_rate": true })), "invalid_field", &["limit_rate"]),
            (with(json!({ "target": "fsat" })), "target_not_found", &["fsat", "default", "other"]),
            (with(json!({ "target": "nfs:/x" })), "invalid_target", &["nfs:/x", "dir:/PATH"]),
            (with(json!({ "target": "dir:relative" })), "invalid_target", &["absolute"]),
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_size_that_cannot_be_is_refused() {
    let bed = Bed::new().await;
    let with = |changes: Value| changed(&bed, &changes);
    let gib = |value: Value| with(json!({ "size": null, "volume_size_gb": value }));
    let huge = r#"{"image_url": "s3://a/b.raw", "volume_name": "a", "volume_size_gb": 99999999999999999999}"#;
    assert_refused(
        &bed,
        vec![
            (gib(json!(0)), "invalid_size", &["0", "volume_size_gb: 50"]),
            (gib(json!(-1)), "invalid_size", &["-1", "negative"]),
            (gib(json!(i64::MAX)), "invalid_size", &["more than"]),
            (gib(json!(u64::MAX)), "invalid_size", &["volume_size_gb"]),
            (huge.to_owned(), "invalid_size", &["volume_size_gb"]),
            (gib(json!(1.5)), "invalid_size", &["volume_size_gb", "1.5"]),
            (gib(json!("50")), "invalid_field", &["volume_size_gb", "string"]),
            (gib(Value::Null), "invalid_field", &["neither volume_size_gb nor size"]),
            (with(json!({ "volume_size_gb": 1 })), "invalid_field", &["both volume_size_gb and size"]),
            (with(json!({ "size": 0 })), "invalid_size", &["0"]),
            (with(json!({ "size": "0G" })), "invalid_size", &["0"]),
            (with(json!({ "size": -5 })), "invalid_size", &["-5"]),
            (with(json!({ "size": "-5G" })), "invalid_size", &["-5G"]),
            (with(json!({ "size": "50X" })), "invalid_size", &["50X", "50G"]),
            (with(json!({ "size": u64::MAX })), "invalid_size", &["more than"]),
            (with(json!({ "size": "99999999P" })), "invalid_size", &["99999999P"]),
            (with(json!({ "size": true })), "invalid_field", &["size"]),
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_name_that_lvm_refuses_is_refused_for_every_target() {
    let bed = Bed::new().await;
    let name = |name: &str| changed(&bed, &json!({ "volume_name": name }));
    let code = "invalid_volume_name";
    assert_refused(
        &bed,
        vec![
            (name(""), code, &["empty"]),
            (name("."), code, &["'.'"]),
            (name(".."), code, &["'..'"]),
            (name("../volumes/x"), code, &["'/'"]),
            (name("a/b"), code, &["a/b", "'/'"]),
            (name("/etc/passwd"), code, &["'/'"]),
            (name("-rf"), code, &["-rf", "begins with '-'"]),
            (name("a b"), code, &["' '"]),
            (name("a\0b"), code, &["letters, digits"]),
            (name("a\nb"), code, &["letters, digits"]),
            (name("größe"), code, &["letters, digits"]),
            (name(&"x".repeat(128)), code, &["128", "127"]),
            (name("snapshot1"), code, &["snapshot1", "reserved"]),
            (name("pvmove0"), code, &["reserved"]),
            (name("web_tdata"), code, &["reserved"]),
            (name("web_rimage_0"), code, &["reserved"]),
            (name("web_mlog"), code, &["reserved"]),
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_url_that_cannot_be_fetched_from_is_refused_and_its_password_repeated_nowhere() {
    let bed = Bed::new().await;
    let url = |url: &str| changed(&bed, &json!({ "image_url": url }));
    let bodies =
        ["https://user:hush@host/a.qcow2", "s3://user:hush@images/a.qcow2", "https://hush@host/a.qcow2"].map(url);
    assert_refused(
        &bed,
        vec![
            (url(""), "invalid_url", &[]),
            (url("http://"), "invalid_url", &[]),
            (url("https://host/directory/"), "invalid_url", &["'/'"]),
            (url("https://host/a#b"), "invalid_url", &[]),
            (url("s3://images"), "invalid_url", &["s3://bucket/key"]),
            (url("s3://images/a%2F..%2Fb"), "invalid_url", &["'..'"]),
            (url("ftp://host/a.qcow2"), "unsupported_scheme", &["ftp", "https"]),
            (url("gopher://host/a.qcow2"), "unsupported_scheme", &["gopher"]),
            (bodies[0].clone(), "url_has_credentials", &["MINIO_ACCESS_KEY"]),
            (bodies[1].clone(), "url_has_credentials", &[]),
            (bodies[2].clone(), "url_has_credentials", &[]),
        ],
    )
    .await;
    for body in bodies {
        let request = bed.tcp().request(Method::POST, "/api/v1/images").header(CONTENT_TYPE, "application/json");
        assert!(!Answer::of(request.body(body.clone())).await.text.contains("hush"));
        let request = bed.tcp().request(Method::POST, "/api/v1/jobs").header(CONTENT_TYPE, "application/json");
        assert!(!Answer::of(request.body(body)).await.text.contains("hush"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_and_places_of_this_machine_are_named_over_the_unix_socket_only() {
    let bed = Bed::new().await;
    let image = bed.image("local.qcow2", 1);
    let elsewhere = format!("dir:{}", bed.path("elsewhere").display());
    let file = |url: String| changed(&bed, &json!({ "image_url": url }));
    assert_refused(
        &bed,
        vec![
            (file(format!("file://{}", image.display())), "not_permitted", &["administrator"]),
            (file(image.display().to_string()), "not_permitted", &["administrator"]),
            (changed(&bed, &json!({ "target": elsewhere })), "not_permitted", &["not configured", "[targets.NAME]"]),
            (changed(&bed, &json!({ "target": "lvm:vg0" })), "not_permitted", &["lvm:vg0"]),
        ],
    )
    .await;
    let order = json!({
        "image_url": format!("file://{}", image.display()), "volume_name": "web-1", "size": "8M", "target": elsewhere
    });
    let id = bed.unix().post("/api/v1/jobs", &order).await.expect(202)["job_id"].as_str().unwrap().to_owned();
    assert_eq!(bed.ended(&id).await["status"], "completed");
    bed.assert_holds(&bed.path("elsewhere/web-1.raw"), &image, "qcow2", crate::bed::DISK);
    // Somebody else may not look there either.
    let query = format!("?target={elsewhere}");
    bed.tcp().get(&format!("/api/v1/volumes{query}")).await.refusal("not_permitted");
    bed.tcp().delete(&format!("/api/v1/volumes/web-1{query}&force=true")).await.refusal("not_permitted");
    assert_eq!(bed.unix().get(&format!("/api/v1/volumes{query}")).await.expect(200).as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_id_is_known_or_404_and_a_uuid_or_400() {
    let bed = Bed::new().await;
    let unknown = "0190b5a0-0000-7000-8000-000000000000";
    for (id, code, status) in
        [(unknown, "job_not_found", 404), ("not-a-uuid", "invalid_job_id", 400), ("a%20b", "invalid_job_id", 400)]
    {
        for (method, path) in [
            (Method::GET, "/api/v1/status/"),
            (Method::GET, "/api/v1/jobs/"),
            (Method::DELETE, "/api/v1/cancel/"),
            (Method::DELETE, "/api/v1/jobs/"),
        ] {
            let answer = Answer::of(bed.tcp().request(method, &format!("{path}{id}"))).await;
            assert_eq!(answer.status, status, "{path}{id}: {}", answer.text);
            answer.refusal(code);
        }
        let events = bed.tcp().get(&format!("/api/v1/jobs/{id}/events")).await;
        assert_eq!(events.status, status);
        events.refusal(code);
    }
    assert_eq!(bed.tcp().get(&format!("/api/v1/jobs?before={unknown}x")).await.status, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_of_the_api_is_refused_like_one() {
    let bed = Bed::new().await;
    let unknown = bed.tcp().get("/api/v1/volume").await;
    assert_eq!(unknown.status, 404);
    assert!(unknown.refusal("route_not_found")["message"].as_str().unwrap().contains("/api/openapi.json"));
    bed.tcp().get("/").await.refusal("route_not_found");

    let wrong = Answer::of(bed.tcp().request(Method::PUT, "/api/v1/jobs")).await;
    assert_eq!((wrong.status, wrong.headers["allow"].to_str().unwrap()), (405, "GET,HEAD,POST"));
    wrong.refusal("method_not_allowed");

    let body = bed.order("good.qcow2", "web-1").to_string();
    let post = || bed.tcp().request(Method::POST, "/api/v1/jobs");
    for content_type in [None, Some("text/plain"), Some("application/x-www-form-urlencoded"), Some("application/jsonp")]
    {
        let request = post().body(body.clone());
        let request = content_type.into_iter().fold(request, |request, kind| request.header(CONTENT_TYPE, kind));
        let answer = Answer::of(request).await;
        assert_eq!(answer.status, 415, "{content_type:?}");
        answer.refusal("unsupported_media_type");
    }
    let large = Answer::of(post().json(&json!({ "image_url": "x".repeat(100_000) }))).await;
    assert_eq!(large.status, 413);
    large.refusal("body_too_large");
    assert_eq!(bed.all_jobs().await.len(), 0);

    let with_charset = post().header(CONTENT_TYPE, "application/json; charset=utf-8").body(body);
    assert_eq!(Answer::of(with_charset).await.status, 202);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_query_that_cannot_be_read_is_refused_like_a_body() {
    let bed = Bed::new().await;
    for path in [
        "/api/v1/jobs?limit=0",
        "/api/v1/jobs?limit=501",
        "/api/v1/jobs?limit=many",
        "/api/v1/jobs?limit=-1",
        "/api/v1/jobs?status=done",
    ] {
        let answer = bed.tcp().get(path).await;
        assert_eq!(answer.status, 400, "{path}: {}", answer.text);
        answer.refusal("invalid_field");
    }
    let answer = bed.tcp().post("/api/v1/jobs?dry_run=perhaps", &bed.order("good.qcow2", "web-1")).await;
    assert_eq!(answer.status, 400);
    answer.refusal("invalid_field");
    let answer = bed.tcp().delete("/api/v1/volumes/web-1?force=yes").await;
    assert_eq!(answer.status, 400);
    answer.refusal("invalid_field");
    assert_eq!(bed.all_jobs().await.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_under_another_hosts_name_is_refused_over_tcp() {
    let bed = Bed::new().await;
    let ask = |door: &Door, host: &str| door.request(Method::GET, "/healthz").header(HOST, host.to_owned());
    for host in ["evil.example", "evil.example:8080", "10.0.0.1", "localhost.evil.example", "127.0.0.1.evil.example"] {
        let answer = Answer::of(ask(bed.tcp(), host)).await;
        assert_eq!(answer.status, 403, "{host}");
        assert!(answer.refusal("not_permitted")["message"].as_str().unwrap().contains(host));
    }
    for host in ["localhost", "LocalHost:80", "127.0.0.1", "127.0.0.2:1", "[::1]:8080"] {
        assert_eq!(Answer::of(ask(bed.tcp(), host)).await.status, 200, "{host}");
    }
    assert_eq!(Answer::of(ask(bed.unix(), "evil.example")).await.status, 200);
}
