//! The seed's requests and answers, as they stand there, under both path forms.

use serde_json::{Value, json};

use crate::bed::Bed;

/// The two documents of the seed disagree on the paths; both are served: submit, status, cancel.
const FORMS: [(&str, &str, &str); 2] =
    [("/api/v1/provision", "/api/v1/status", "/api/v1/cancel"), ("/api/v1/jobs", "/api/v1/jobs", "/api/v1/jobs")];

/// The seed's request; only the host of the object store is ours.
fn request(bed: &Bed, volume: &str, correlation_id: &str) -> Value {
    json!({
        "image_url": bed.url("ubuntu-20.04.qcow2"),
        "volume_name": volume,
        "volume_size_gb": 1,
        "image_type": "qcow2",
        "correlation_id": correlation_id
    })
}

/// Takes what differs from run to run out of a job, after a look at it.
fn normalised(bed: &Bed, mut job: Value) -> Value {
    for field in ["created_at", "started_at", "updated_at", "finished_at"] {
        let time = job.as_object_mut().unwrap().remove(field).unwrap();
        assert!(time.as_str().unwrap().ends_with('Z'), "{field} is {time}, not a time in UTC");
    }
    let root = bed.path("").display().to_string();
    let text = job.to_string().replace(&bed.store.endpoint(), "STORE").replace(root.trim_end_matches('/'), "ROOT");
    serde_json::from_str(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_seeds_requests_get_the_seeds_answers_under_both_path_forms() {
    for (submit, status, _) in FORMS {
        let bed = Bed::new().await;
        let digest = bed.upload(&bed.image("ubuntu-20.04.qcow2", 1));
        for (volume, hit) in [("vm-root-disk-1", false), ("vm-root-disk-2", true)] {
            let answer = bed.tcp().post(submit, &request(&bed, volume, "provision-vm-001")).await;
            let submitted = answer.expect(202);
            let id = submitted["job_id"].as_str().unwrap().to_owned();
            assert_eq!(submitted, json!({ "job_id": id }));
            bed.ended(&id).await;
            let job = bed.tcp().get(&format!("{status}/{id}")).await.expect(200);
            let path = format!("ROOT/cache/ubuntu-20.04-{}.qcow2", &digest[..16]);
            // `receipts` holds the receipt to its own account.
            let receipt = &job["receipt"];
            let expected = json!({
                "job_id": id,
                "status": "completed",
                "progress": {
                    "stage": "finalizing",
                    "percent": 100,
                    "bytes_processed": 1_u64 << 30,
                    "bytes_total": 1_u64 << 30
                },
                "correlation_id": "provision-vm-001",
                "cache_hit": hit,
                "image_path": path,
                // Beyond the seed's:
                "kind": "provision",
                "image_url": "s3://images/ubuntu-20.04.qcow2",
                "image_digest": format!("sha256:{digest}"),
                "volume": volume,
                "target": "dir:ROOT/volumes",
                "device_path": format!("ROOT/volumes/{volume}.raw"),
                "receipt": receipt,
            });
            assert_eq!(normalised(&bed, job.clone()), expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_path_forms_show_and_cancel_the_same_job() {
    let bed = Bed::new().await;
    bed.publish("ubuntu-20.04.qcow2", 1);
    for (submit, _, cancel) in FORMS {
        let submitted = bed.tcp().post(submit, &request(&bed, "vm-root-disk-1", "x")).await.expect(202);
        let id = submitted["job_id"].as_str().unwrap().to_owned();
        bed.ended(&id).await;
        let shown: Vec<Value> =
            [bed.job(&id).await, bed.tcp().get(&format!("/api/v1/status/{id}")).await.expect(200)].into();
        assert_eq!(shown[0], shown[1]);
        bed.tcp().delete(&format!("{cancel}/{id}")).await.refusal("job_finished");
    }
}
