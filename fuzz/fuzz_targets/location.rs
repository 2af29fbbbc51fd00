//! Image URLs: arbitrary text, alone and with a secret put where a password or a signature would be. The secret is
//! never shown, and what is shown of an object or a file names the same again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lvp_engine::{
    SourceSettings,
    parsers::{self, ImageUrl},
};
use url::Url;

/// No part of it is in any message of ours.
const SECRET: &str = "hush0hush1hush2";

/// Reads a URL under all settings, and checks that nothing of what is said has the secret in it.
fn read(text: &str, is_secret: bool) {
    let endpoint = Url::parse("http://minio.test:9000").ok();
    for settings in [SourceSettings::default(), SourceSettings { endpoint, ..SourceSettings::default() }] {
        for allow_files in [false, true] {
            let shown = match ImageUrl::parse(text, &settings, allow_files) {
                Ok(url) => {
                    let (identity, beside) = parsers::url_names(&url);
                    assert_eq!(identity.len(), 64);
                    format!("{url} {url:?} {} {beside:?}", url.file_name())
                }
                Err(error) => format!("{error} {error:?} {} {:?}", error.chain(), error.to_body()),
            };
            assert!(!is_secret || !shown.contains(SECRET), "{text:?} is shown as {shown:?}");
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let text = String::from_utf8_lossy(input);
    read(&text, false);
    // A path has no query and no password: all of it is shown.
    if text.contains(SECRET) || text.trim().starts_with('/') {
        return;
    }
    read(&format!("{text}?{SECRET}"), true);
    read(&format!("{text}?signature={SECRET}&a=b"), true);
    // Only there is what follows a host with a user before it.
    let is_scheme = |text: &str| text.trim_start().bytes().all(|byte| byte.is_ascii_alphanumeric());
    if let Some((scheme, rest)) = text.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) {
        read(&format!("{scheme}://user:{SECRET}@{rest}"), true);
        read(&format!("{scheme}://{SECRET}@{rest}"), true);
    }
});
