//! Certificates that are not to be taken, each with a whole job: part of the row "Source" of docs/reference/faults.md.

use std::fs;

use e2e::{
    server::{Page, Server},
    tls::{Expired, Identity},
};

use crate::{
    auditor::{Audit, Complete, Failed},
    bed::{Bed, MIB},
    source_faults::{order, raw_image, somebodys_volume},
};

/// A bed that trusts this authority.
async fn trusting(authority: &str) -> Bed {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("authority.pem");
    fs::write(&file, authority).unwrap();
    let bed = Bed::with(|settings| settings.sources.ca_file = Some(file)).await;
    // It is read when the first source is.
    std::mem::forget(directory);
    bed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_is_not_right_ends_the_job_before_a_byte() {
    let good = || Identity::signed("127.0.0.1", Expired::Nothing);
    for (name, identity, authority, says) in [
        ("unknown authority", good(), good().authority().to_owned(), "UnknownIssuer"),
        ("another name", Identity::signed("store.example.org", Expired::Nothing), String::new(), "not valid for name"),
        ("expired", Identity::signed("127.0.0.1", Expired::Certificate), String::new(), "expired"),
        ("authority between expired", Identity::signed("127.0.0.1", Expired::Between), String::new(), "expired"),
    ] {
        println!("{name}");
        let bed = trusting(if authority.is_empty() { identity.authority() } else { &authority }).await;
        let web = Server::start_tls_as(&identity);
        web.serve("/x.raw", Page::new(fs::read(raw_image(&bed, 1)).unwrap()));
        somebodys_volume(&bed, "old");
        for volume in ["web-1", "old"] {
            let audit = Audit::begin(&bed);
            let id = bed.submit(&order(&web.url("/x.raw"), volume)).await;
            let expected = Failed {
                code: "source_unreachable",
                retryable: true,
                says: &["/x.raw", "no TLS connection to 127.0.0.1", says],
            };
            audit.failed(&id, &expected).await;
        }
        assert_eq!(web.received(), [], "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_a_trusted_authority_is_taken() {
    // Who is trusted by name is trusted beyond its own dates (RFC 5280, section 6.1.1: a trust anchor has none).
    for expired in [Expired::Nothing, Expired::Authority] {
        let identity = Identity::signed("127.0.0.1", expired);
        let (bed, web) = (trusting(identity.authority()).await, Server::start_tls_as(&identity));
        let image = raw_image(&bed, 1);
        web.serve("/x.raw", Page::new(fs::read(&image).unwrap()));
        let audit = Audit::begin(&bed);
        let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
        let size = image.metadata().unwrap().len() + MIB;
        audit.complete(&id, &Complete { volume: "web-1", image: &image, format: "raw", size }).await;
    }
}
