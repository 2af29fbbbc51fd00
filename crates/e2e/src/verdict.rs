//! What lvp promises of a job, whatever happens to it: afterwards the world is complete, or as it was. The judge.
//!
//! ```text
//!  completed           the volume is there, to the last byte the image and zeros, and says so         Complete
//!  failed, cancelled   nothing of the volume is there, or what was there before is as it was          AsBefore
//!                      what was there before is overwritten, in part or whole, and the job says so    Declared
//!                      what was there before is as it was, but active, and the job says so            Declared
//!  anything else                                                                                      Third
//! ```
//! In every case a complete image may be in the cache, and a complete base beside the volumes. It leaves out looking at the
//! world: `cell`.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::cell::Facts;

/// What a cell may leave.
#[derive(Debug, Clone)]
pub struct Promise {
    /// What the auditor calls the volume: `volume web`, `file volumes/web.raw`.
    pub volume: String,
    /// The MD5 of the whole volume with the image on it.
    pub content: String,
    /// The MD5 of a base of the image.
    pub base: String,
    /// The MD5 of the image's file.
    pub image: String,
    /// The SHA-256 of the image's file.
    pub digest: String,
}

/// How a cell ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Everything is done.
    Complete,
    /// Nothing is done.
    AsBefore,
    /// What was there before is partly overwritten, and the job says so.
    Declared,
    /// What must not be, and why.
    Third(String),
}

/// Judges the world after a job by what it was before.
pub fn judge(before: &Facts, after: &Facts, job: &Value, promise: &Promise) -> Verdict {
    match examine(before, after, job, promise) {
        Ok(verdict) => verdict,
        Err(why) => Verdict::Third(why),
    }
}

fn examine(before: &Facts, after: &Facts, job: &Value, promise: &Promise) -> Result<Verdict, String> {
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for key in keys {
        let (was, is) = (before.get(key), after.get(key));
        if was != is && *key != promise.volume {
            may_change(key, was, is, after, promise)?;
        }
    }
    let (was, is) = (before.get(&promise.volume), after.get(&promise.volume));
    let status = job["status"].as_str().unwrap_or_default();
    match (status, is) {
        ("completed", Some(is)) => complete(was, is, job, promise).map(|()| Verdict::Complete),
        ("completed", None) => Err("it is completed, and there is no volume".to_owned()),
        ("failed" | "cancelled", is) if was == is => Ok(Verdict::AsBefore),
        ("failed" | "cancelled", Some(is)) => declared(was, is, job, promise).map(|()| Verdict::Declared),
        ("failed" | "cancelled", None) => Err("the volume that was there before is gone".to_owned()),
        (status, _) => Err(format!("the job is {status}")),
    }
}

/// What may have changed beside the volume.
fn may_change(
    key: &str,
    was: Option<&String>,
    is: Option<&String>,
    after: &Facts,
    promise: &Promise,
) -> Result<(), String> {
    let left = format!("{key} was {was:?} and is {is:?}");
    if key == "database" {
        return if is.is_some_and(|is| is == "ok, unfinished 0") { Ok(()) } else { Err(left) };
    }
    // A sidecar says when its image was used last.
    let sidecar = key.strip_prefix("file cache/.lvp/").and_then(|name| name.strip_suffix(".json"));
    if was.is_some() && is.is_some() && sidecar.is_some_and(|name| after.contains_key(&format!("file cache/{name}"))) {
        return Ok(());
    }
    let (None, Some(is)) = (was, is) else { return Err(left) };
    let images = || after.keys().filter_map(|key| key.strip_prefix("file cache/")).filter(|name| !name.contains('/'));
    let is_fine = if let Some(name) = key.strip_prefix("file cache/.lvp/") {
        name.strip_suffix(".json").is_some_and(|name| images().any(|image| image == name))
    } else if let Some(name) = key.strip_prefix("file cache/") {
        fact(is, "content") == promise.image && after.contains_key(&format!("file cache/.lvp/{name}.json"))
    } else if let Some(name) = key.strip_prefix("pool-volume images/") {
        images().any(|image| image == name)
    } else {
        is_complete_base(key, is, promise)
    };
    if is_fine { Ok(()) } else { Err(left) }
}

/// Whether this is a base to its end: every byte of the image, read-only, with its digest.
fn is_complete_base(key: &str, facts: &str, promise: &Promise) -> bool {
    let short = &promise.digest[..16];
    if fact(facts, "content") != promise.base {
        return false;
    }
    if let Some(name) = key.strip_prefix("volume ") {
        let tags: Vec<&str> = fact(facts, "tags").split(',').collect();
        return name.starts_with(&format!("lvp-base-{short}-"))
            && fact(facts, "attributes").starts_with("Vr")
            && tags.contains(&format!("lvp.base=sha256:{}", promise.digest).as_str());
    }
    key.ends_with(&format!("/.lvp-{short}.base"))
        && fact(facts, "mode") == "400"
        && fact(facts, "attributes").contains(&promise.digest)
}

/// That a volume is what the job says.
fn complete(was: Option<&String>, is: &str, job: &Value, promise: &Promise) -> Result<(), String> {
    let (id, marks) = (job["job_id"].as_str().unwrap_or_default(), marks(is));
    let wrong = |what: &str| Err(format!("it is completed, and {what}: {is}"));
    if fact(is, "content") != promise.content {
        return wrong("the volume has other bytes");
    }
    if marks.contains("incomplete") {
        return wrong("the volume says that it is incomplete");
    }
    if !marks.contains(&promise.digest) {
        return wrong("the volume does not say which image it holds");
    }
    match was {
        None if !marks.contains(id) => wrong("the volume does not say which job made it"),
        None => Ok(()),
        Some(was) if unchanging(was) != unchanging(is) => {
            wrong(&format!("the volume is not the one of before ({was})"))
        }
        Some(_) if marks.contains(id) => wrong("the volume says that this job made it"),
        Some(_) => Ok(()),
    }
}

/// That a volume that is neither complete nor as before is the one of before, and the job says what became of it.
fn declared(was: Option<&String>, is: &str, job: &Value, promise: &Promise) -> Result<(), String> {
    let said = job["details"]["not_undone"].to_string();
    match was {
        None => Err(format!("the job did not complete, and left {is}; it said {said}")),
        Some(was) if unchanging(was) != unchanging(is) => Err(format!("the volume was {was} and is {is}")),
        // It was not active; the second where a test made the saying fail.
        Some(was)
            if is_only_activated(was, is) && (said.contains("still active") || said.contains("ensure_volume:")) =>
        {
            Ok(())
        }
        Some(_) if said.contains("holds the new image") => complete(was, is, job, promise),
        Some(_) if marks(is).contains("sha256:") => Err(format!("the volume says that it holds an image: {is}")),
        // The second where a test made the saying fail.
        Some(_) if !said.contains("partly overwritten") && !said.contains("populate_volume:") => {
            Err(format!("the volume is {is}, and the job said {said}"))
        }
        Some(_) => Ok(()),
    }
}

/// Whether a volume was not active and is, and everything else of it is the same.
fn is_only_activated(was: &str, is: &str) -> bool {
    let attributes = fact(was, "attributes");
    let activated = |same: &str| was.replace(&format!("attributes={attributes} "), &format!("attributes={same}a "));
    attributes.strip_suffix('-').is_some_and(|same| activated(same) == is)
}

/// One fact of a line such as `size=1 tags=a,b`.
fn fact<'a>(facts: &'a str, name: &str) -> &'a str {
    let value = |word: &'a str| word.strip_prefix(name)?.strip_prefix('=');
    facts.split(' ').find_map(value).unwrap_or_default()
}

/// What stands on a volume: tags of LVM, attributes of a file.
fn marks(facts: &str) -> &str {
    fact(facts, if facts.contains("uuid=") { "tags" } else { "attributes" })
}

/// The facts that lvp never changes of what it did not make: among them the marks of others.
fn unchanging(facts: &str) -> Vec<&str> {
    let own = marks(facts).split([',', ';']).filter(|mark| !mark.is_empty() && !is_of_lvp(mark));
    ["size", "uuid", "mode"].iter().map(|name| fact(facts, name)).chain(own).collect()
}

/// Whether this is, or is a part of, what lvp writes on volumes: `lvp.image=…`; `lvp="{\"job\":null,\"image\":null}"`.
fn is_of_lvp(mark: &str) -> bool {
    mark.starts_with("lvp") || mark.starts_with("\\\"")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const DIGEST: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn promise() -> Promise {
        let [volume, content, base, image, digest] = ["volume web", "good", "base", "image", DIGEST].map(str::to_owned);
        Promise { volume, content, base, image, digest }
    }

    fn facts(lines: &[(&str, String)]) -> Facts {
        lines.iter().map(|(key, facts)| ((*key).to_owned(), facts.clone())).collect()
    }

    fn volume(tags: &str, content: &str) -> (&'static str, String) {
        ("volume web", format!("size=1 attributes=-wi uuid=u tags={tags} content={content}"))
    }

    fn verdict(before: &[(&str, String)], after: &[(&str, String)], job: &Value) -> Verdict {
        judge(&facts(before), &facts(after), job, &promise())
    }

    #[test]
    fn a_volume_is_complete_to_the_last_byte_or_not_at_all() {
        let (completed, failed) = (json!({"job_id": "j", "status": "completed"}), json!({"status": "failed"}));
        let tags = format!("lvp,lvp.image=sha256:{DIGEST},lvp.job=j");
        assert_eq!(verdict(&[], &[volume(&tags, "good")], &completed), Verdict::Complete);
        assert!(matches!(verdict(&[], &[volume(&tags, "bad")], &completed), Verdict::Third(_)));
        assert!(matches!(verdict(&[], &[volume("lvp,lvp.job=j", "good")], &completed), Verdict::Third(_)));
        assert!(matches!(verdict(&[], &[], &completed), Verdict::Third(_)));
        assert!(matches!(verdict(&[], &[volume(&tags, "good")], &failed), Verdict::Third(_)));
        assert_eq!(verdict(&[], &[], &failed), Verdict::AsBefore);
        assert!(matches!(verdict(&[], &[], &json!({"status": "running"})), Verdict::Third(_)));
    }

    #[test]
    fn what_was_there_stays_or_is_said_to_be_overwritten() {
        let failed = json!({"status": "failed"});
        let before = [volume("backup", "old")];
        assert_eq!(verdict(&before, &before, &failed), Verdict::AsBefore);
        assert!(matches!(verdict(&before, &[], &failed), Verdict::Third(_)));
        assert!(matches!(verdict(&before, &[volume("backup", "half")], &failed), Verdict::Third(_)));
        let said = json!({"status": "failed", "details": {"not_undone": ["it is partly overwritten"]}});
        assert_eq!(verdict(&before, &[volume("backup", "half")], &said), Verdict::Declared);
        assert!(matches!(verdict(&before, &[volume("", "half")], &said), Verdict::Third(_)));
        let image = format!("backup,lvp.image=sha256:{DIGEST}");
        assert!(matches!(verdict(&before, &[volume(&image, "half")], &said), Verdict::Third(_)));
        let whole = json!({"status": "failed", "job_id": "j", "details": {"not_undone": ["it holds the new image"]}});
        assert_eq!(verdict(&before, &[volume(&image, "good")], &whole), Verdict::Declared);
        assert!(matches!(verdict(&before, &[volume(&image, "half")], &whole), Verdict::Third(_)));
        let completed = json!({"job_id": "j", "status": "completed"});
        assert_eq!(verdict(&before, &[volume(&image, "good")], &completed), Verdict::Complete);
    }

    #[test]
    fn a_volume_that_was_not_active_is_so_again_or_said_not_to_be() {
        let is = |active: &str, content: &str| {
            [("volume web", format!("size=1 attributes=-wi-{active} uuid=u tags=backup content={content}"))]
        };
        let after = |active, content, said: &str| {
            let job = json!({"status": "failed", "details": {"not_undone": [said]}});
            verdict(&is("-", "old"), &is(active, content), &job)
        };
        assert_eq!(after("-", "old", ""), Verdict::AsBefore);
        assert_eq!(
            after("a", "old", "ensure_volume: volume vg0/web holds what it held, but is still active"),
            Verdict::Declared
        );
        assert_eq!(after("a", "old", "ensure_volume: a test made undo.ensure_volume.begin fail"), Verdict::Declared);
        assert!(matches!(after("a", "old", ""), Verdict::Third(_)));
        assert!(matches!(after("a", "half", "ensure_volume: it is still active"), Verdict::Third(_)));
        assert!(matches!(after("s", "old", "ensure_volume: it is still active"), Verdict::Third(_)));
    }

    #[test]
    fn only_complete_things_may_be_left_beside_it() {
        let failed = json!({"status": "failed"});
        let is_fine = |lines: &[(&str, &str)]| {
            let lines: Vec<_> = lines.iter().map(|(key, facts)| (*key, (*facts).to_owned())).collect();
            verdict(&[], &lines, &failed) == Verdict::AsBefore
        };
        let (image, sidecar) = (("file cache/i.qcow2", "content=image"), ("file cache/.lvp/i.qcow2.json", ""));
        assert!(is_fine(&[image, sidecar, ("pool-volume images/i.qcow2", "")]));
        assert!(!is_fine(&[image]));
        assert!(!is_fine(&[sidecar]));
        assert!(!is_fine(&[("file cache/i.qcow2", "content=half"), sidecar]));
        assert!(!is_fine(&[("file cache/.lvp/x.partial", "")]));
        let cached = |used: &str| [(image.0, image.1.to_owned()), (sidecar.0, used.to_owned())];
        assert_eq!(verdict(&cached("before"), &cached("now"), &failed), Verdict::AsBefore);
        assert!(matches!(verdict(&cached("before"), &cached("now")[1..], &failed), Verdict::Third(_)));
        assert!(!is_fine(&[("volume other", "tags=lvp")]));
        let base = |content: &str| format!("attributes=Vri tags=lvp,lvp.base=sha256:{DIGEST} content={content}");
        assert!(is_fine(&[("volume lvp-base-0011223344556677-abcdef", &base("base"))]));
        assert!(!is_fine(&[("volume lvp-base-0011223344556677-abcdef", &base("half"))]));
        assert!(!is_fine(&[("volume lvp-base-new-j", &base("base"))]));
        assert!(is_fine(&[("database", "ok, unfinished 0")]) && !is_fine(&[("database", "ok, unfinished 1")]));
    }
}
