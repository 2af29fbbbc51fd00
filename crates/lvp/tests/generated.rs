//! What is generated from the code and committed is as the code says: the OpenAPI document, the reference of errors, the
//! reference of settings. `make schema` (UPDATE=1) writes them. And that the tests exist which the reference of faults names.

use std::{fs, path::Path};

use lvp_api::{ErrorCode, exit};

/// The settings, as the binary has them.
#[path = "../src/config/table.rs"]
mod table;

/// Between these two lines of a document stands what is generated.
const BEGIN: &str = "<!-- generated: make schema -->\n";
const END: &str = "<!-- end of what is generated -->\n";

#[track_caller]
fn assert_committed(path: &str, wanted: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
    if std::env::var_os("UPDATE").is_some_and(|value| value == "1") {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, wanted).unwrap();
    }
    let found = fs::read_to_string(&file).unwrap_or_default();
    assert!(found == wanted, "{path} is not what the code says: run `make schema` and commit it");
}

/// The document with this table in place of what stands between the marks; without a document, a new one.
fn with_table(path: &str, introduction: &str, table: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
    let document = fs::read_to_string(file).unwrap_or_else(|_| format!("{introduction}\n\n{BEGIN}{END}"));
    let (before, rest) = document.split_once(BEGIN).expect("the document has the first mark");
    let (_, after) = rest.split_once(END).expect("the document has the last mark");
    format!("{before}{BEGIN}\n{table}\n{END}{after}")
}

#[test]
fn the_openapi_document_is_as_committed() {
    let text = serde_json::to_string_pretty(&lvp_server::openapi()).unwrap();
    assert_committed("schema/openapi.json", &format!("{text}\n"));
}

#[test]
fn the_reference_of_errors_is_as_committed() {
    let mut text = String::from("| code | HTTP | exit | try again | meaning |\n|---|---|---|---|---|\n");
    for code in ErrorCode::ALL {
        let retry = if code.retryable() { "yes" } else { "no" };
        let (status, exit, meaning) = (code.http_status(), code.exit_code(), code.meaning());
        text.push_str(&format!("| `{code}` | {status} | {exit} | {retry} | {meaning} |\n"));
    }
    text.push_str("\n| exit code | means |\n|---|---|\n| 0 | Done. |\n");
    for (code, meaning) in [
        (exit::INTERNAL, "A defect of lvp or an error of the host's tools."),
        (exit::USAGE, "The request or the command line cannot be right: change it."),
        (exit::NOT_FOUND, "What was named is not there."),
        (exit::CONFLICT, "What was asked conflicts with what is there: in use, incompatible, not lvp's."),
        (exit::IMAGE, "The image was refused or does not match its checksum."),
        (exit::SOURCE, "The image's source cannot be reached or refuses."),
        (exit::SPACE, "There is not enough space."),
        (exit::UNAVAILABLE, "A part of the host (daemon, database, volume group, libvirt) is not usable now."),
        (exit::CANCELLED, "The job was cancelled, or Ctrl-C ended the waiting for it."),
    ] {
        text.push_str(&format!("| {code} | {meaning} |\n"));
    }
    let path = "docs/reference/errors.md";
    let introduction = "# Errors\n\nEvery error has a stable code. Over HTTP it is the field `error` of the answer's body, in a \
                        failed job the\nfield `error_code`, on the command line the word in brackets at the end of the line. \
                        `try again` says whether\nthe same request can succeed later; the body's `retryable` says it for the \
                        case at hand.";
    assert_committed(path, &with_table(path, introduction, &text));
}

#[test]
fn the_reference_of_settings_is_as_committed() {
    let mut text = String::from("| key | environment | flag | default | meaning |\n|---|---|---|---|---|\n");
    for setting in table::SETTINGS {
        let variables: Vec<String> = setting.variables.iter().map(|name| format!("`{name}`")).collect();
        let flag = setting.flag.map(|flag| format!("`--{flag}`")).unwrap_or_default();
        let default = setting.default.map(|default| format!("`{default}`")).unwrap_or_default();
        let secret = if setting.secret { " (never shown)" } else { "" };
        text.push_str(&format!(
            "| `{}` | {} | {flag} | {default} | {}{secret} |\n",
            setting.key,
            variables.join(", "),
            setting.meaning
        ));
    }
    let path = "docs/reference/configuration.md";
    let introduction = "# Configuration\n\nFlags outrank the environment, which outranks the TOML file (`--config`, `LVP_CONFIG`, or\n\
                        `/etc/libvirt-volume-provisioner/config.toml`), which outranks the defaults. `lvp config show` prints each\n\
                        value with where it came from. The first name in the environment is the one to use; further ones are\n\
                        understood for those who come from the reference daemon.";
    assert_committed(path, &with_table(path, introduction, &text));
}

/// All Rust sources of the workspace's crates, as one text.
fn sources(folder: &Path) -> String {
    let mut text = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            text += &fs::read_to_string(path).unwrap();
        }
    }
    text
}

#[test]
fn every_test_that_the_reference_of_faults_names_exists() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let (document, sources) =
        (fs::read_to_string(crates.join("../docs/reference/faults.md")).unwrap(), sources(&crates));
    let rows = document.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| Fault "));
    let mut named = 0;
    for row in rows {
        let last = row.trim_end_matches(['|', ' ']).rsplit('|').next().unwrap();
        let tests: Vec<&str> = last.split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "no test is named: {row}");
        for test in &tests {
            assert!(sources.contains(&format!("fn {test}(")), "there is no test {test}");
        }
        named += tests.len();
    }
    assert!(named > 20, "the table was not read");
}
