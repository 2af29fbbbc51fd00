//! What is on the disk before and after a job, looked at without any of lvp's code: names, bytes and extended attributes
//! of all files in the directories of volumes and of the cache, and what the API says of the job.
//!
//! ```text
//!  Audit::begin ──► the job ──► completed          the volume is the image and zeros, the cache has the image and its sidecar
//!                          └──► failed, cancelled  everything as it was
//! ```
//! There is no third outcome, but for what a test names with [`Audit::but_for`]. It leaves out the database, which holds
//! no more than the API says.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use e2e::images;
use rustix::fs::{lgetxattr, llistxattr};
use serde_json::{Value, json};

use crate::bed::Bed;

/// The attribute that holds lvp's tags.
pub const TAGS: &str = "user.lvp";
/// What is looked through; the cache's directory has lvp's own in it.
const PLACES: [&str; 3] = ["volumes", "other", "cache"];
/// Longer than any list and any value here.
const LONGEST_ATTRIBUTE: usize = 4096;

/// A file as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    size: u64,
    sha256: String,
    attributes: BTreeMap<String, String>,
}

/// All files, by their path below the bed's root.
type Items = BTreeMap<String, Item>;

/// What was there before a job.
pub struct Audit<'a> {
    bed: &'a Bed,
    before: Items,
    excepted: Vec<String>,
    may_cache: Option<String>,
    released: Option<String>,
}

/// A provision that came to its good end.
pub struct Complete<'a> {
    pub volume: &'a str,
    pub image: &'a Path,
    /// As `qemu-img` calls it.
    pub format: &'a str,
    pub size: u64,
}

/// How a job failed.
pub struct Failed<'a> {
    pub code: &'a str,
    pub retryable: bool,
    /// What the sentence names.
    pub says: &'a [&'a str],
}

impl<'a> Audit<'a> {
    pub fn begin(bed: &'a Bed) -> Self {
        Self { bed, before: items(bed), excepted: Vec::new(), may_cache: None, released: None }
    }

    /// This file the test accounts for by itself.
    pub fn but_for(mut self, name: impl Into<String>) -> Self {
        self.excepted.push(name.into());
        self
    }

    /// Downloads are under way already.
    pub fn but_for_downloads(mut self) -> Self {
        self.before.retain(|name, _| !name.contains(".partial"));
        self
    }

    /// A failed job may have brought this image to its end before; then it is in the cache as a whole.
    pub fn may_cache(mut self, image: &Path) -> Self {
        self.may_cache = Some(sha256(image));
        self
    }

    /// This volume loses the tags of the job that makes it.
    pub fn released(mut self, volume: &str) -> Self {
        self.released = Some(name_of(self.bed, &self.bed.volume(volume)));
        self
    }

    /// What is remembered of this cached file is forgotten; the file stays.
    pub fn forgets(mut self, file: &Path) -> Self {
        self.before.remove(&sidecar_of(file)).expect("a sidecar");
        self
    }

    /// Waits for the end of a job that must fail so, and compares the world with before.
    pub async fn failed(&self, id: &str, expected: &Failed<'_>) -> Value {
        let job = self.bed.ended(id).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!(expected.code)), "{job:#}");
        assert_eq!(job["retryable"], expected.retryable, "{job:#}");
        let sentence = job["error"].as_str().unwrap_or_default();
        for part in expected.says {
            assert!(sentence.contains(part), "the sentence does not say {part:?}: {job:#}");
        }
        assert!(job["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{job:#}");
        self.unchanged(&job);
        job
    }

    /// The same of a job that was cancelled.
    pub async fn cancelled(&self, id: &str) -> Value {
        let job = self.bed.ended(id).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("cancelled"), &Value::Null), "{job:#}");
        self.unchanged(&job);
        job
    }

    /// That nothing is other than before.
    #[track_caller]
    pub fn unchanged(&self, job: &Value) {
        let (before, mut after) = (self.seen(self.before.clone()), self.seen(items(self.bed)));
        if let Some(digest) = &self.may_cache {
            let is_new = |name: &str| name.starts_with("cache/") && !before.contains_key(name);
            let brought = after.extract_if(.., |name, item| is_new(name) && item.sha256 == *digest).count();
            assert!([0, 2].contains(&brought), "half an image is in the cache: {job:#}");
        }
        assert_eq!(after, before, "not as it was: {job:#}");
        assert_eq!(job["receipt"], Value::Null, "{job:#}");
        assert!(job["details"].get("not_undone").is_none(), "{job:#}");
    }

    /// Waits for the end of a job that must complete, and looks at all that it had to do, and at that alone.
    pub async fn complete(&self, id: &str, expected: &Complete<'_>) -> Value {
        let job = self.bed.ended(id).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("completed"), &Value::Null), "{job:#}");
        let file = self.bed.volume(expected.volume);
        self.bed.assert_holds(&file, expected.image, expected.format, expected.size);
        let digest = format!("sha256:{}", sha256(expected.image));
        self.assert_receipt(&job, expected, &digest).await;
        let mut after = self.seen(items(self.bed));
        let mut before = self.seen(self.before.clone());
        self.assert_tags(&job, &name_of(self.bed, &file), &digest, (&mut before, &mut after));
        self.assert_cached(&job, expected.image, (&mut before, &mut after));
        assert_eq!(after, before, "more changed than the volume and its image: {job:#}");
        job
    }

    async fn assert_receipt(&self, job: &Value, expected: &Complete<'_>, digest: &str) {
        let receipt = &job["receipt"];
        let known = (&receipt["job_id"], &receipt["image_digest"], &receipt["volume_bytes"]);
        assert_eq!(known, (&job["job_id"], &json!(digest), &json!(expected.size)), "{job:#}");
        let parts = ["bytes_written", "bytes_zeroed", "bytes_skipped", "bytes_left", "bytes_shared"];
        let sum: u64 = parts.iter().map(|part| receipt[*part].as_u64().unwrap()).sum();
        assert_eq!(sum, expected.size, "{job:#}");
        let shown = self.bed.tcp().get(&format!("/api/v1/volumes/{}", expected.volume)).await.expect(200);
        assert_eq!(shown["receipt"], *receipt, "{shown:#}");
        let verified = format!("/api/v1/volumes/{}/verify", expected.volume);
        assert_eq!(self.bed.tcp().post(&verified, &Value::Null).await.expect(200)["intact"], true);
    }

    /// A new volume is the job's, one that was there stays whose it was; each says what it holds. Takes it from both.
    fn assert_tags(&self, job: &Value, volume: &str, digest: &str, (before, after): (&mut Items, &mut Items)) {
        let mut now = after.remove(volume).expect("the volume").attributes;
        let tags: Value = serde_json::from_str(&now.remove(TAGS).expect("the volume has tags")).unwrap();
        let (owner, others) = match before.remove(volume) {
            None if self.released.as_deref() == Some(volume) => (Value::Null, BTreeMap::new()),
            None => (job["job_id"].clone(), BTreeMap::new()),
            Some(mut then) => {
                let owner = then.attributes.remove(TAGS).map(|tags| serde_json::from_str::<Value>(&tags).unwrap());
                (owner.map_or(Value::Null, |tags| tags["job"].clone()), then.attributes)
            }
        };
        assert_eq!((&tags["job"], &tags["image"]), (&owner, &json!(digest)), "{tags}");
        assert_eq!(now, others, "attributes of others");
    }

    /// The image is in the cache with its sidecar, whether it was before or not. Takes them from both.
    fn assert_cached(&self, job: &Value, image: &Path, (before, after): (&mut Items, &mut Items)) {
        let cached = PathBuf::from(job["image_path"].as_str().unwrap());
        let name = name_of(self.bed, &cached);
        let file = after.remove(&name).unwrap_or_else(|| panic!("no {name} in {after:#?}"));
        assert_eq!((file.size, file.sha256.as_str()), (image.metadata().unwrap().len(), sha256(image).as_str()));
        let sidecar = sidecar_of(&cached);
        let beside = after.remove(&sidecar).unwrap_or_else(|| panic!("no {sidecar} in {after:#?}"));
        assert_eq!(beside.sha256, file.sha256, "the digest in the sidecar");
        before.remove(&name);
        before.remove(&sidecar);
    }

    fn seen(&self, mut items: Items) -> Items {
        items.retain(|name, _| !self.excepted.contains(name));
        items
    }
}

fn sidecar_of(cached: &Path) -> String {
    format!("cache/.lvp/{}.json", cached.file_name().unwrap().to_str().unwrap())
}

fn name_of(bed: &Bed, file: &Path) -> String {
    file.strip_prefix(bed.path("")).unwrap().to_str().unwrap().to_owned()
}

pub fn sha256(file: &Path) -> String {
    images::run("sha256sum", &[file]).unwrap().split_whitespace().next().unwrap().trim_start_matches('\\').to_owned()
}

fn items(bed: &Bed) -> Items {
    let mut found = Items::new();
    let mut folders: Vec<PathBuf> = PLACES.map(|place| bed.path(place)).into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = name_of(bed, &path);
            if path.is_dir() {
                folders.push(path);
            } else if name != "cache/.lvp/lock" {
                found.insert(name, item(&path));
            }
        }
    }
    found
}

/// A file; of a sidecar only what its image is, since each use is noted there.
fn item(path: &Path) -> Item {
    let attributes = attributes(path);
    let text = path.to_str().unwrap();
    if text.ends_with(".json") && !text.ends_with(".partial.json") {
        let sidecar: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let digest = sidecar["sha256"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
        return Item { size: sidecar["size"].as_u64().unwrap(), sha256: digest, attributes };
    }
    Item { size: path.symlink_metadata().unwrap().len(), sha256: sha256(path), attributes }
}

/// The extended attributes of a file.
pub fn attributes(path: &Path) -> BTreeMap<String, String> {
    let mut names = vec![0; LONGEST_ATTRIBUTE];
    let length = llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; LONGEST_ATTRIBUTE];
            let length = lgetxattr(path, name, &mut value[..]).unwrap();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (text(name), text(&value[..length]))
        })
        .collect()
}
