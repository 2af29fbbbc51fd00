//! What every request and answer has (ids, keys), and what the server says of itself: health, metrics, OpenAPI.

use std::fs;

use reqwest::Method;
use serde_json::{Value, json};

use crate::bed::{Answer, Bed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idempotency_key_names_one_job_and_one_request() {
    let mut bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let order = bed.order("good.qcow2", "web-1");
    let post = |bed: &Bed, path: &str, key: &str, body: &Value| {
        Answer::of(bed.tcp().request(Method::POST, path).header("Idempotency-Key", key.to_owned()).json(body))
    };
    let first = post(&bed, "/api/v1/provision", "key-1", &order).await.expect(202);
    bed.ended(first["job_id"].as_str().unwrap()).await;
    assert_eq!(post(&bed, "/api/v1/jobs", "key-1", &order).await.expect(202), first);
    assert_ne!(post(&bed, "/api/v1/jobs", "key-2", &order).await.expect(202), first);

    let other = post(&bed, "/api/v1/jobs", "key-1", &bed.order("good.qcow2", "web-2")).await;
    assert_eq!(other.status, 409);
    let refusal = other.refusal("idempotency_conflict");
    assert_eq!(refusal["details"]["job_id"], first["job_id"]);
    let prefetch = post(&bed, "/api/v1/images", "key-1", &json!({ "image_url": bed.url("good.qcow2") })).await;
    prefetch.refusal("idempotency_conflict");
    post(&bed, "/api/v1/jobs", &"x".repeat(129), &order).await.refusal("invalid_field");
    assert_eq!(bed.all_jobs().await.len(), 2);

    bed.restart().await;
    assert_eq!(post(&bed, "/api/v1/jobs", "key-1", &order).await.expect(202), first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_id_comes_back_and_stands_in_errors() {
    let bed = Bed::new().await;
    let ask =
        |path: &str, id: &str| Answer::of(bed.tcp().request(Method::GET, path).header("X-Request-ID", id.to_owned()));
    for path in ["/healthz", "/api/v1/jobs", "/nowhere", "/api/v1/jobs/nonsense"] {
        let answer = ask(path, "my-request-7").await;
        assert_eq!(answer.headers["x-request-id"], "my-request-7", "{path}");
        if answer.status >= 400 {
            assert_eq!(answer.json()["correlation_id"], "my-request-7", "{path}");
        }
    }
    // Without one, or with one that would spoil a log, there is a new one.
    for bad in ["a b", &"x".repeat(200)] {
        let id = ask("/healthz", bad).await.headers["x-request-id"].to_str().unwrap().to_owned();
        assert!(id.parse::<lvp_api::JobId>().is_ok(), "{id}");
    }
    let ids = [bed.tcp().get("/livez").await, bed.tcp().get("/livez").await]
        .map(|answer| answer.headers["x-request-id"].clone());
    assert_ne!(ids[0], ids[1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_gives_reasons_and_readiness_fails_when_a_part_is_not_usable() {
    let bed = Bed::with(|settings| drop(settings.targets.remove("broken"))).await;
    for path in ["/healthz", "/livez"] {
        assert_eq!((bed.tcp().get(path).await.status, bed.tcp().get(path).await.text.as_str()), (200, "ok"));
    }
    let health = bed.tcp().get("/health").await.expect(200);
    assert_ne!(health["status"], "unhealthy");
    assert_eq!((&health["active_jobs"], &health["pending_jobs"]), (&json!(0), &json!(0)));
    let names: Vec<&str> =
        health["checks"].as_array().unwrap().iter().map(|check| check["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["database", "cache", "target:default", "target:other"]);
    assert_eq!(bed.tcp().get("/readyz").await.status, 200);

    fs::remove_dir(bed.path("volumes")).unwrap();
    fs::write(bed.path("volumes"), "in the way").unwrap();
    for path in ["/health", "/readyz"] {
        let health = bed.tcp().get(path).await.expect(503);
        assert_eq!(health["status"], "unhealthy");
        let checks = health["checks"].as_array().unwrap();
        let target = checks.iter().find(|check| check["name"] == "target:default").unwrap();
        assert_eq!(target["status"], "unhealthy");
        assert!(
            target["message"].as_str().unwrap().contains("not a directory") && target["hint"].is_string(),
            "{target:#}"
        );
    }
    for path in ["/healthz", "/livez"] {
        assert_eq!(bed.tcp().get(path).await.status, 200, "{path}: the process answers all the same");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_have_the_seeds_names_and_no_series_per_id() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let job = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    bed.tcp().get("/nowhere/at/all").await;
    // Any word is a method.
    for number in 0..20 {
        let method = Method::from_bytes(format!("BREW{number}").as_bytes()).unwrap();
        Answer::of(bed.tcp().request(method, "/livez")).await;
    }
    let page = bed.tcp().get("/metrics").await;
    assert!(page.headers["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    for line in [
        "# TYPE libvirt_volume_provisioner_requests_total counter",
        "# TYPE libvirt_volume_provisioner_jobs_total counter",
        "# TYPE libvirt_volume_provisioner_active_jobs gauge",
        "libvirt_volume_provisioner_jobs_total{status=\"started\"}",
        "libvirt_volume_provisioner_jobs_total{status=\"completed\"}",
        "libvirt_volume_provisioner_jobs_total{status=\"failed\"}",
        "libvirt_volume_provisioner_requests_total{endpoint=\"/api/v1/jobs\",method=\"POST\",status=\"202\"}",
        "libvirt_volume_provisioner_requests_total{endpoint=\"/api/v1/jobs/{id}\",method=\"GET\",status=\"200\"}",
        "endpoint=\"unmatched\",method=\"GET\",status=\"404\"",
        "endpoint=\"/livez\",method=\"other\",status=\"405\"",
        "process_resident_memory_bytes",
    ] {
        assert!(page.text.contains(line), "no '{line}' in\n{}", page.text);
    }
    assert!(!page.text.contains(job["job_id"].as_str().unwrap()) && !page.text.contains("nowhere"));
    assert!(!page.text.contains("BREW"), "{}", page.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openapi_document_is_served_and_every_get_in_it_answers() {
    let bed = Bed::new().await;
    let served = bed.tcp().get("/api/openapi.json").await.expect(200);
    assert_eq!(served, serde_json::to_value(lvp_server::openapi()).unwrap());
    let paths = served["paths"].as_object().unwrap();
    assert!(paths.len() > 12);
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let concrete = path.replace("{id}", "0190b5a0-0000-7000-8000-000000000000").replace(['{', '}'], "");
            let answer = Answer::of(bed.tcp().request(method.clone(), &concrete)).await;
            assert!(
                answer.status != 405 && answer.status < 500 || path == "/health" || path == "/readyz",
                "{method} {path}: {}",
                answer.text
            );
            assert!(!answer.text.contains("route_not_found"), "{method} {path}");
        }
    }
}
