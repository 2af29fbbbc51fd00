//! Precedence, origins, and what is refused.

use super::*;

fn merge(file: &str, variables: &[(&str, &str)], flags: Flags) -> Result<Config> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    std::fs::write(&path, file).unwrap();
    let variables = variables.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    Config::merge(Some(path), flags, &variables)
}

fn refusal(file: &str, variables: &[(&str, &str)]) -> String {
    let error =
        merge(file, variables, Vec::new()).and_then(|config| config.engine(Recovery::Leave)).expect_err("a refusal");
    assert_eq!(error.code(), ErrorCode::InvalidConfiguration);
    format!("{} {}", error.chain(), error.to_body().hint.unwrap_or_default())
}

#[test]
fn flags_outrank_the_environment_outranks_the_file_outranks_defaults() {
    let origin = |config: &Config| config.values["port"].origin.clone();
    assert_eq!(origin(&merge("", &[], Vec::new()).unwrap()), Origin::Default);
    let file = merge("port = 1", &[], Vec::new()).unwrap();
    assert!(matches!(origin(&file), Origin::File(_)));
    assert_eq!(file.addresses().unwrap().tcp.unwrap().1, 1);
    let environment = merge("port = 1", &[("PORT", "2")], Vec::new()).unwrap();
    assert_eq!(origin(&environment), Origin::Environment("PORT"));
    let flag = merge("port = 1", &[("PORT", "2")], vec![("port", "3".to_owned())]).unwrap();
    assert_eq!((origin(&flag), flag.addresses().unwrap().tcp.unwrap().1), (Origin::Flag("port"), 3));
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_known_one() {
    assert!(refusal("prot = 1", &[]).contains("did you mean port?"));
    assert!(refusal("[minio]\nendpiont = 'x'", &[]).contains("did you mean minio.endpoint?"));
    assert!(refusal("", &[("LVP_CACHE_MAX_BYTE", "1")]).contains("did you mean LVP_CACHE_MAX_BYTES?"));
    assert!(refusal("[targets.a]\nkind='lvm'\nvolume_groop='x'", &[]).contains("did you mean volume_group?"));
    assert!(refusal("zzz = 1", &[]).contains("lvp config show"));
}

#[test]
fn values_that_cannot_be_are_refused_with_their_origin() {
    assert!(refusal("", &[("MAX_CONCURRENT_JOBS", "0")]).contains("(from MAX_CONCURRENT_JOBS) must be at least 1"));
    assert!(refusal("", &[("LVP_JOB_HISTORY", "0")]).contains("(from LVP_JOB_HISTORY) must be at least 1"));
    assert!(refusal("", &[("MINIO_RETRY_BACKOFF_MS", "1,x")]).contains("milliseconds"));
    assert!(refusal("", &[("MINIO_ENDPOINT", "minio:9000")]).contains("MINIO_ENDPOINT"));
    assert!(refusal("", &[("MINIO_ACCESS_KEY", "a")]).contains("MINIO_SECRET_KEY is not"));
    assert!(refusal("", &[("LVP_CACHE_MAX_BYTES", "much")]).contains("size"));
    assert!(refusal("[targets.a]\nkind='nfs'", &[]).contains("there are lvm and dir"));
    assert!(refusal("[targets.a]\nkind='dir'\npath='relative'", &[]).contains("absolute"));
    assert!(refusal("port = ", &[]).contains("config.toml"));
}

#[test]
fn a_volume_group_alone_makes_the_default_target() {
    let spec = |config: &Config| config.targets["default"].0.spec.to_string();
    assert_eq!(spec(&merge("", &[("LVM_VOLUME_GROUP", "vg0")], Vec::new()).unwrap()), "lvm:vg0");
    let file =
        "[targets.default]\nkind='dir'\npath='/srv'\n[targets.fast]\nkind='lvm'\nvolume_group='vg0'\nthin_pool='pool0'";
    let config = merge(file, &[], Vec::new()).unwrap();
    assert_eq!(
        (spec(&config).as_str(), config.targets["fast"].0.spec.to_string().as_str()),
        ("dir:/srv", "lvm:vg0/pool0")
    );
    assert_eq!(spec(&merge(file, &[("LVM_VOLUME_GROUP", "vg1")], Vec::new()).unwrap()), "lvm:vg1");
    let none = merge("", &[("LVP_STATE_DIR", "/s")], Vec::new()).unwrap();
    assert_eq!(spec(&none), "dir:/s/volumes");
}

#[test]
fn secrets_are_hidden_and_everything_has_an_origin() {
    let config =
        merge("", &[("MINIO_ACCESS_KEY", "sesame"), ("MINIO_SECRET_ACCESS_KEY", "sesame")], Vec::new()).unwrap();
    let shown = config.shown();
    assert!(shown.iter().all(|(_, text, origin)| text != "sesame" && !origin.is_empty()));
    assert!(shown.iter().any(|(key, text, origin)| key == "minio.secret_key"
        && text == "(hidden)"
        && origin == "MINIO_SECRET_ACCESS_KEY"));
    let engine = config.engine(Recovery::Leave).unwrap();
    assert!(!format!("{engine:?}").contains("sesame"));
}

#[test]
fn names_of_the_reference_daemon_keep_their_meaning() {
    let config = merge("", &[("LISTEN_ADDR", "127.0.0.2:81"), ("DATABASE_PATH", "/d")], Vec::new()).unwrap();
    assert_eq!(config.addresses().unwrap().tcp.unwrap(), ("127.0.0.2".to_owned(), 81));
    assert_eq!(config.engine(Recovery::Leave).unwrap().database.unwrap(), Path::new("/d"));
    let six = merge("", &[("HOST", "::1")], Vec::new()).unwrap();
    assert_eq!(six.addresses().unwrap().tcp.unwrap(), ("::1".to_owned(), 8080));
}

#[test]
fn only_a_directory_of_qcow2_files_is_linked() {
    let linked = "[targets.a]\nkind='dir'\npath='/srv'\nformat='qcow2'\nlinked=true";
    let config = merge(linked, &[], Vec::new()).unwrap();
    assert!(config.targets["a"].0.linked);
    assert!(config.shown().iter().any(|(key, text, _)| key == "targets.a" && text.ends_with("(linked)")));
    let unlinked = merge(&linked.replace("true", "false"), &[], Vec::new()).unwrap();
    assert!(!unlinked.targets["a"].0.linked);
    for target in [
        "kind='dir'\npath='/srv'\nlinked=true",
        "kind='dir'\npath='/srv'\nformat='raw'\nlinked=true",
        "kind='lvm'\nvolume_group='vg0'\nlinked=true",
        "kind='lvm'\nvolume_group='vg0'\nthin_pool='pool0'\nlinked=true",
    ] {
        let said = refusal(&format!("[targets.a]\n{target}"), &[]);
        assert!(said.contains("targets.a is linked") && said.contains("format = \"qcow2\""), "{said}");
    }
    assert!(refusal(&linked.replace("true", "'yes'"), &[]).contains("neither true nor false"));
    assert!(refusal(&linked.replace("linked", "linkd"), &[]).contains("did you mean linked?"));
}
