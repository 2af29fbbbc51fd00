//! Presigned S3 requests: Signature Version 4 in the query, so that a signed object is read like any other URL.
//!
//! Only the `host` header is signed: `Range` and `If-Match` may differ between uses of one signature, and a redirect to
//! another host carries nothing of it. Source: AWS, "Authenticating Requests: Using Query Parameters (AWS Signature
//! Version 4)", whose example is the test below. It leaves out everything but GET and HEAD of one object.

use std::time::Duration;

use aws_lc_rs::hmac;
use jiff::Timestamp;
use url::Url;

use super::{escape::percent_encode, hasher::sha256_hex, settings::Credentials};

/// How long a signature is good: it must cover the time until the request reaches the server, not the transfer.
const LIFETIME: Duration = Duration::from_secs(900);

/// The address of an object, path style, not signed.
pub(super) fn object_url(endpoint: &Url, bucket: &str, key: &str) -> Url {
    let mut url = endpoint.clone();
    // The parser leaves an encoded path as it is: see the test.
    url.set_path(&format!("/{}/{}", percent_encode(bucket, false), percent_encode(key, true)));
    url
}

/// Signs one request for `url`, which has no query yet.
pub(super) fn presign(method: &str, url: &Url, region: &str, credentials: &Credentials, now: Timestamp) -> Url {
    sign_for(method, url, region, credentials, now, LIFETIME)
}

fn sign_for(
    method: &str,
    url: &Url,
    region: &str,
    credentials: &Credentials,
    now: Timestamp,
    lifetime: Duration,
) -> Url {
    let time = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let day = &time[..8];
    let scope = format!("{day}/{region}/s3/aws4_request");
    let query = format!(
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={}&X-Amz-Date={time}&X-Amz-Expires={}&X-Amz-SignedHeaders=host",
        percent_encode(&format!("{}/{scope}", credentials.access_key.reveal()), false),
        lifetime.as_secs(),
    );
    let host = match (url.host_str().unwrap_or_default(), url.port()) {
        (host, Some(port)) => format!("{host}:{port}"),
        (host, None) => host.to_owned(),
    };
    let request = format!("{method}\n{}\n{query}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD", url.path());
    let to_sign = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", sha256_hex(request.as_bytes()));
    let first = format!("AWS4{}", credentials.secret_key.reveal());
    let key = [day, region, "s3", "aws4_request"]
        .iter()
        .fold(first.into_bytes(), |key, part| keyed_hash(&key, part).as_ref().to_vec());
    let signature: String = keyed_hash(&key, &to_sign).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let mut signed = url.clone();
    signed.set_query(Some(&format!("{query}&X-Amz-Signature={signature}")));
    signed
}

fn keyed_hash(key: &[u8], text: &str) -> hmac::Tag {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::{super::settings::Secret, *};

    #[test]
    fn signs_the_example_of_the_documentation() {
        let credentials = Credentials {
            access_key: Secret::new("AKIAIOSFODNN7EXAMPLE"),
            secret_key: Secret::new("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        };
        let url = Url::parse("https://examplebucket.s3.amazonaws.com/test.txt").unwrap();
        let now = "2013-05-24T00:00:00Z".parse().unwrap();
        let signed = sign_for("GET", &url, "us-east-1", &credentials, now, Duration::from_secs(86400));
        assert_eq!(
            signed.query().unwrap(),
            "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20130524%2Fus-east-1%2Fs3\
             %2Faws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host\
             &X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"
        );
    }

    #[test]
    fn an_object_s_address_is_encoded_as_it_is_signed() {
        let endpoint = Url::parse("http://127.0.0.1:9000").unwrap();
        let url = object_url(&endpoint, "b", "a b//ü+%25?#.qcow2");
        assert_eq!(url.as_str(), "http://127.0.0.1:9000/b/a%20b//%C3%BC%2B%2525%3F%23.qcow2");
    }
}
