//! Everything that a client can have more of than is good: jobs that wait, bytes of a request, connections, followers.

use std::time::{Duration, Instant};

use e2e::{
    gate::Gate,
    server::{Page, Server},
};
use futures::StreamExt;
use lvp_server::Limits;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::bed::{Answer, Bed, MIB};

/// Who waits longer hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Sends the beginning of an image, and then nothing.
fn stuck(web: &Server) -> Value {
    web.serve("/x.raw", Page::new(vec![7; 2 * MIB as usize]).stall(&[MIB; 99]));
    json!({ "image_url": web.url("/x.raw"), "volume_name": "stuck", "size": 2 * MIB, "image_type": "raw" })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_takes_no_job_and_says_when_to_come_again() {
    let bed = Bed::with(|settings| {
        settings.max_concurrent_jobs = 1;
        settings.max_queued_jobs = 2;
    })
    .await;
    let web = Server::start();
    bed.publish("good.qcow2", 1);
    let running = bed.submit(&stuck(&web)).await;
    bed.job_when(&running, |job| job["status"] == "running").await;
    let keyed = |key: &str, volume: &str| {
        let request = bed.tcp().request(Method::POST, "/api/v1/jobs").header("Idempotency-Key", key.to_owned());
        Answer::of(request.json(&bed.order("good.qcow2", volume)))
    };
    let first = keyed("first", "web-1").await.expect(202);
    let second = bed.submit(&bed.order("good.qcow2", "web-2")).await;
    let prefetch = json!({ "image_url": bed.url("good.qcow2") });
    for answer in [
        keyed("third", "web-3").await,
        bed.tcp().post("/api/v1/provision", &bed.order("good.qcow2", "web-3")).await,
        bed.unix().post("/api/v1/images", &prefetch).await,
    ] {
        assert_eq!(answer.status, 429);
        let refusal = answer.refusal("queue_full");
        assert_eq!((&refusal["retryable"], &refusal["details"]["pending_jobs"]), (&json!(true), &json!(2)));
        assert!(answer.headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() > 0);
    }
    assert_eq!(bed.all_jobs().await.len(), 3, "what was refused is not kept");
    // What is known already is answered, and a dry run asks for nothing.
    assert_eq!(keyed("first", "web-1").await.expect(202), first);
    bed.tcp().post("/api/v1/jobs?dry_run=true", &bed.order("good.qcow2", "web-3")).await.expect(200);

    bed.tcp().delete(&format!("/api/v1/jobs/{second}")).await.expect(200);
    let third = keyed("third", "web-3").await.expect(202);
    bed.tcp().delete(&format!("/api/v1/jobs/{running}")).await.expect(200);
    for job in [first, third] {
        assert_eq!(bed.ended(job["job_id"].as_str().unwrap()).await["status"], "completed");
    }
}

fn limits(change: impl FnOnce(&mut Limits)) -> Limits {
    let mut limits = Limits::default();
    change(&mut limits);
    limits
}

/// Sends these bytes over a connection of its own, and gives all that comes until the server closes it.
async fn exchange(bed: &Bed, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(bed.tcp().address()).await.unwrap();
    // It may have closed before all is sent.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let closed = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    assert!(closed.is_ok(), "the connection stays open after {:?}", String::from_utf8_lossy(&answer));
    String::from_utf8_lossy(&answer).into_owned()
}

/// A client that says nothing, or half of something, is not waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_go_on_is_let_go() {
    let bed = Bed::limited(limits(|limits| limits.patience = Duration::from_millis(300)), |_| {}).await;
    let head = "POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\n";
    for (name, bytes) in [
        ("nothing", String::new()),
        ("half of what HTTP/2 begins with", "PRI * HT".to_owned()),
        ("what HTTP/2 begins with, and no request", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned()),
        ("half of a head", head.to_owned()),
    ] {
        let answer = exchange(&bed, bytes.as_bytes()).await;
        assert!(!answer.contains("200 OK"), "{name}: {answer}");
    }
    // One that keeps its connection for a next request that does not come.
    let kept = exchange(&bed, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert!(kept.starts_with("HTTP/1.1 200"), "{kept}");
    let half = format!("{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{");
    let answer = exchange(&bed, half.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("request_timeout"), "{answer}");
    assert_eq!(bed.tcp().get("/livez").await.status, 200);
}

/// Over HTTP/2 a client that answers pings and grants no window would keep its answers here for as long as it likes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_http_2_that_grants_no_window_is_not_served() {
    let bed = Bed::new().await;
    // The preface, settings with an INITIAL_WINDOW_SIZE of 0, and a request for / (RFC 9113, 3.4, 4.1 and 6.5; the numbers
    // before the host stand for GET, http and / in RFC 7541, appendix A).
    let mut asks = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    asks.extend(b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0");
    asks.extend(b"\0\0\x0e\x01\x05\0\0\0\x01\x82\x86\x84\x41\x09localhost");
    let answer = exchange(&bed, &asks).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    // Nor is it spoken to who asks for it in the way of HTTP/1.1.
    let upgrade = "GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\n\
                   HTTP2-Settings: AAQAAAAA\r\n\r\n";
    let answer = exchange(&bed, upgrade.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_takes_no_answer_is_let_go() {
    let bed = Bed::limited(limits(|limits| limits.patience = Duration::from_millis(300)), |_| {}).await;
    let mut stream = TcpStream::connect(bed.tcp().address()).await.unwrap();
    let asks_and_never_reads =
        async { while stream.write_all(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n").await.is_ok() {} };
    assert!(tokio::time::timeout(PATIENCE, asks_and_never_reads).await.is_ok(), "its connection stays open");
    assert_eq!(bed.tcp().get("/livez").await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_and_bodies_have_an_end() {
    let bed = Bed::new().await;
    let many = format!("GET /livez HTTP/1.1\r\nHost: localhost\r\n{}\r\n", "a: b\r\n".repeat(1000));
    let long = format!("GET /livez HTTP/1.1\r\nHost: localhost\r\na: {}\r\n\r\n", "b".repeat(1 << 20));
    let target = format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "b".repeat(1 << 20));
    for (name, bytes) in [("many headers", many), ("a long header", long), ("a long path", target)] {
        let answer = exchange(&bed, bytes.as_bytes()).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{name}: {answer}");
    }
    // Every route that takes a body, announced and not.
    for (method, path) in
        [(Method::POST, "/api/v1/jobs"), (Method::POST, "/api/v1/provision"), (Method::POST, "/api/v1/images")]
    {
        let body = vec![b' '; 65 << 10];
        let request = || bed.tcp().request(method.clone(), path).header("content-type", "application/json");
        assert_eq!(Answer::of(request().body(body.clone())).await.refusal("body_too_large")["code"], 413, "{path}");
        let chunked = futures::stream::repeat_with(move || Ok::<_, std::io::Error>(body.clone())).take(3);
        let answer = Answer::of(request().body(reqwest::Body::wrap_stream(chunked))).await;
        answer.refusal("body_too_large");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_bounded_and_the_socket_has_its_own() {
    let bed = Bed::limited(limits(|limits| limits.connections = 2), |_| {}).await;
    let connect = || TcpStream::connect(bed.tcp().address().to_owned());
    let ask = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    // Two that have said nothing yet have all there are.
    let (first, _second) = (connect().await.unwrap(), connect().await.unwrap());
    let mut third = connect().await.unwrap();
    third.write_all(ask).await.unwrap();
    assert_eq!(bed.unix().get("/livez").await.status, 200, "the administrator is let in");
    let mut answer = String::new();
    let early = tokio::time::timeout(Duration::from_millis(300), third.read_to_string(&mut answer)).await;
    assert!(early.is_err(), "it was answered: {answer}");
    drop(first);
    tokio::time::timeout(PATIENCE, third.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_are_bounded_and_make_room_when_they_go() {
    let bed = Bed::limited(limits(|limits| limits.followers = 2), |_| {}).await;
    let web = Server::start();
    let id = bed.submit(&stuck(&web)).await;
    let path = format!("/api/v1/jobs/{id}/events");
    let follow = || bed.tcp().request(Method::GET, &path).send();
    let (first, _second) = (follow().await.unwrap(), follow().await.unwrap());
    assert_eq!(first.status(), 200);
    let answer = bed.unix().get(&path).await;
    assert_eq!(answer.status, 503);
    assert!(answer.refusal("too_many_followers")["hint"].as_str().unwrap().contains("status"));
    assert!(answer.headers.contains_key("retry-after"));
    bed.job(&id).await;
    drop(first);
    let begun = Instant::now();
    while follow().await.unwrap().status() != 200 {
        assert!(begun.elapsed() < PATIENCE, "nobody makes room");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Dry runs at once that the engine makes.
const PLANS: usize = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dry_runs_at_a_source_that_hangs_are_bounded_and_end_with_their_callers() {
    let bed = Bed::new().await;
    let (web, gate) = (Server::start(), Gate::default());
    let image = std::fs::read(bed.publish("good.qcow2", 1)).unwrap();
    web.serve("/held.qcow2", Page::new(image).hold(0, &gate));
    let mut held = bed.order("good.qcow2", "web-1");
    held["image_url"] = json!(web.url("/held.qcow2"));
    let path = "/api/v1/jobs?dry_run=true";
    let ask = |order: &Value| Answer::of(bed.tcp().request(Method::POST, path).json(order));
    let callers: Vec<_> = (0..PLANS).map(|_| tokio::spawn(ask(&held))).collect();
    let begun = Instant::now();
    while web.count("GET", "/held.qcow2") < PLANS {
        assert!(begun.elapsed() < PATIENCE, "they do not come to the source");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let good = bed.order("good.qcow2", "web-1");
    let refused = ask(&good).await;
    assert_eq!((refused.status, &refused.refusal("queue_full")["retryable"]), (429, &json!(true)));
    assert!(refused.headers.contains_key("retry-after"));
    // What is no dry run is done meanwhile, and the database answers.
    bed.provision(&bed.order("good.qcow2", "web-2")).await;
    // Their callers go, and the source still says nothing: their places come back all the same.
    callers.iter().for_each(tokio::task::JoinHandle::abort);
    let begun = Instant::now();
    while ask(&good).await.status != 200 {
        assert!(begun.elapsed() < PATIENCE, "a plan goes on without its caller");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    gate.open();
}
