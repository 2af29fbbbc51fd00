//! Keys, signatures and queries reach the object store and nobody else: no other host, no error, no file.

use super::*;

/// What must not be found anywhere.
const SECRETS: [&str; 5] = [ACCESS_KEY, SECRET_KEY, "X-Amz-Signature", "x-amz-signature", "hush"];

#[track_caller]
fn assert_clean(text: &str, of: &str) {
    for secret in SECRETS {
        assert!(!text.contains(secret), "{of} shows {secret}: {text}");
    }
}

fn everything(error: &Error) -> String {
    format!("{error} {error:?} {} {:?}", error.chain(), error.to_body())
}

#[tokio::test]
async fn credentials_are_never_sent_to_another_host() {
    let (server, other) = (Server::start(), Server::start());
    let bytes = content(4000, 1);
    let bed = Bed::with(signed(&server.url("")), None).await;
    other.serve("/elsewhere.qcow2", Page::new(bytes.clone()));
    server.serve("/images/x.qcow2", Page::new("").redirect(&other.url("/elsewhere.qcow2")));
    bed.bring_promised("s3://images/x.qcow2", sha256(&bytes)).await.unwrap();
    bed.bring(&other.url("/elsewhere.qcow2")).await.unwrap();
    assert!(server.received().iter().any(|request| request.target.contains("X-Amz-Signature")));
    assert!(other.received().len() >= 4);
    for request in other.received() {
        assert_clean(&format!("{request:?}"), "another host");
        for header in ["authorization", "referer", "cookie"] {
            assert_eq!(request.header(header), None);
        }
        assert!(request.header("user-agent").unwrap().starts_with("lvp/"));
    }
}

#[tokio::test]
async fn no_error_shows_a_key_a_signature_or_a_query() {
    let server = Server::start();
    let bed = Bed::with(SourceSettings { retry_attempts: 1, ..signed(&server.url("")) }, None).await;
    let page = || Page::new(content(4000, 1));
    let pages = [
        page().fail(99, 403),
        page().fail(99, 404),
        page().fail(99, 400),
        page().fail(99, 500),
        page().cut(&[100; 99]),
        page().stall(&[100; 99]),
        page().redirect("/images/x.qcow2"),
        page().redirect("ftp://127.0.0.1/"),
        page().header("content-encoding", "gzip"),
        page().then(1, Page::new(content(4000, 2))),
        page(),
    ];
    let wrong = Some(sha256(b"y"));
    for page in pages {
        server.serve("/images/x.qcow2", page);
        for url in ["s3://images/x.qcow2".to_owned(), server.url("/images/x.qcow2?X-Amz-Signature=hush")] {
            let wanted = Wanted { checksum: wrong.clone(), ..bed.wanted(&url) };
            let error = bring(&bed.images, &wanted, &Progress::default()).await.err().unwrap();
            assert_clean(&everything(&error), "an error");
            assert_clean(&format!("{wanted:?} {}", wanted.url), "what was wanted");
        }
    }
    drop(server);
    let error = bed.bring("s3://images/x.qcow2").await.unwrap_err();
    assert_clean(&everything(&error), "an error");
    assert_clean(&format!("{:?}", bed.settings), "the settings");
}

#[tokio::test]
async fn no_file_holds_a_query() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let bed = Bed::new().await;
    let entry = bed.bring(&server.url("/x.qcow2?X-Amz-Signature=hush&token=hush")).await.unwrap();
    assert_eq!(entry.view().source, format!("{}?…", server.url("/x.qcow2")));
    for name in bed.files() {
        let text = String::from_utf8_lossy(&std::fs::read(bed.root.path().join(&name)).unwrap()).into_owned();
        assert_clean(&format!("{name} {text}"), &name);
    }
}
