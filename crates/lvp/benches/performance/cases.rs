//! What is compared with what, how often, and the goals.
//!
//! | case | ways that take turns |
//! |---|---|
//! | provision | lvp with an empty cache; curl, sha256sum, qemu-img; lvp with the image cached; qemu-img alone |
//! | limited | lvp with an empty cache; curl alone; both from a server of 100 MB/s |
//! | size | lvp with the image cached, onto 5 GiB; the same onto 50 GiB |
//! | share | lvp with a base of the image, on a file system with reflinks; lvp with the image cached, to a new file |
//! | thin | the same on LVM, in the test machine: see [`thin`] |
//! | start | a command of lvp that does nothing |

use std::{collections::BTreeMap, env, fs, path::Path, thread};

use anyhow::Result;
use e2e::{
    images::{LoopDevice, MountedFileSystem},
    minio::Minio,
    server::{Page, Server},
};
use serde_json::{Value, json};
use xtask::{
    cache::{self, Scratch},
    roots::{self, Images, Kind},
};

use crate::{
    alone,
    measure::{Run, Spread, round},
    report, thin,
    ways::{Bench, Offered, Part, Place, write_zeros},
};

const BUCKET: &str = "bench";
const VOLUME: u64 = 5 << 30;
const LARGE_VOLUME: u64 = 50 << 30;
/// The rate of the limited server, in bytes a second.
const LINK: u64 = 100_000_000;
const MEMORY_GOAL_MIB: f64 = 64.0;

/// How much is measured.
pub struct Effort {
    /// Less than all.
    pub quick: bool,
    workers: usize,
    /// Words of the names of the cases that are wanted; none: all.
    only: Vec<String>,
}

impl Effort {
    /// As the environment says: `BENCH_QUICK`, `BENCH_ONLY`, `BENCH_WORKERS`.
    pub fn wanted() -> Self {
        let words = |name: &str| env::var(name).unwrap_or_default();
        let processors = thread::available_parallelism().map_or(2, usize::from);
        Self {
            quick: !words("BENCH_QUICK").is_empty(),
            // What lvp itself takes.
            workers: words("BENCH_WORKERS").parse().unwrap_or((2 * processors).clamp(2, 4)),
            only: words("BENCH_ONLY").split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect(),
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|word| name.contains(word.as_str()))
    }

    fn repetitions(&self, many: usize) -> usize {
        env::var("BENCH_REPETITIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(if self.quick {
            2
        } else {
            many
        })
    }
}

/// Runs all cases that are wanted.
pub fn run(effort: &Effort) -> Result<Vec<Value>> {
    let small = roots::ensure(roots::SMALL)?;
    let minio = Minio::start()?;
    minio.make_bucket(BUCKET)?;
    let mut groups = Vec::new();
    let mut plan = Vec::new();
    plan.extend(Kind::ALL.map(|kind| (&small, kind, false, effort.repetitions(5))));
    plan.extend(Kind::ALL.map(|kind| (&small, kind, true, effort.repetitions(3))));
    let large = if effort.quick { None } else { Some(roots::ensure(roots::LARGE)?) };
    if let Some(large) = &large {
        plan.extend(Kind::ALL.map(|kind| (large, kind, false, effort.repetitions(3))));
    }
    for (images, kind, device, repetitions) in plan {
        let name = format!("provision {} {} {}", images.root.name, kind.name(), if device { "device" } else { "file" });
        let left_out = effort.quick && (device || !matches!(kind, Kind::Zlib | Kind::Plain));
        if effort.wants(&name) && !left_out {
            groups.push(provision(effort, &minio, images, kind, device, repetitions)?);
        }
    }
    for kind in Kind::ALL.into_iter().filter(|kind| !effort.quick || *kind == Kind::Zlib) {
        if effort.wants(&format!("limited small {}", kind.name())) {
            groups.push(limited(effort, &small, kind)?);
        }
    }
    if effort.wants("size small zlib qcow2") {
        groups.push(size(effort, &minio, &small)?);
    }
    let roots = [Some(&small), large.as_ref()];
    for images in roots.into_iter().flatten().filter(|images| effort.wants(&format!("share {}", images.root.name))) {
        groups.push(share(effort, &minio, images)?);
    }
    if effort.wants("thin small") && !effort.quick {
        groups.push(thin::thin(&small, effort.repetitions(3))?);
    }
    if effort.wants("start") {
        groups.push(start(effort, &small)?);
    }
    Ok(groups)
}

/// Puts an image into the store; its digest is taken on the way, and how long that takes.
fn offer(minio: &Minio, images: &Images, kind: Kind) -> Result<(Offered, f64)> {
    let (path, key) = (images.path(kind), format!("{}.{}", images.root.name, kind.format()));
    minio.put(BUCKET, &key, &path)?;
    let (seconds, digest) = alone::hash(&path)?;
    let web_url = format!("{}/{BUCKET}/{key}", minio.endpoint());
    Ok((Offered { url: format!("s3://{BUCKET}/{key}"), web_url, kind, digest }, seconds))
}

fn place(scratch: &Scratch, device: bool, images: &Images) -> Result<Place> {
    if !device {
        return Ok(Place::File);
    }
    let file = scratch.path().join("device");
    fs::File::create(&file)?.set_len(VOLUME)?;
    write_zeros(&file, images.root.disk)?;
    Ok(Place::Device(LoopDevice::attach(&file, 512)?, images.root.disk))
}

/// The runs of the ways of one case, by their names, in the order of the turns.
#[derive(Default)]
struct Runs(BTreeMap<&'static str, Vec<Run>>);

impl Runs {
    fn add(&mut self, way: &'static str, run: Run) {
        self.0.entry(way).or_default().push(run);
    }

    fn of(&self, way: &str, value: impl Fn(&Run) -> f64) -> Vec<f64> {
        self.0.get(way).map(|runs| runs.iter().map(value).collect()).unwrap_or_default()
    }

    fn walls(&self, way: &str) -> Vec<f64> {
        self.of(way, |run| run.wall)
    }

    fn json(&self) -> Value {
        let ways = self.0.keys().map(|way| {
            let spread = |value: fn(&Run) -> f64| Spread::of(self.of(way, value)).json();
            let numbers = json!({
                "wall_s": spread(|run| run.wall),
                "processor_s": spread(|run| run.processor),
                "peak_mib": spread(|run| run.peak_mib),
            });
            ((*way).to_owned(), numbers)
        });
        Value::Object(ways.collect())
    }
}

/// A comparison with its goal.
pub fn ratio(what: &str, to: &str, spread: Spread, goal: Option<f64>) -> Value {
    let met = goal.map(|goal| round(spread.median) <= goal);
    json!({ "what": what, "to": to, "ratio": spread.json(), "goal": goal, "met": met })
}

fn provision(
    effort: &Effort,
    minio: &Minio,
    images: &Images,
    kind: Kind,
    device: bool,
    repetitions: usize,
) -> Result<Value> {
    let scratch = cache::scratch("bench")?;
    let (offered, hash) = offer(minio, images, kind)?;
    let place = place(&scratch, device, images)?;
    let bench =
        Bench { scratch: &scratch, minio: Some(minio), offered, place, volume: VOLUME, workers: effort.workers };
    let (mut runs, mut parts) = (Runs::default(), Vec::new());
    for turn in 0..repetitions {
        runs.add("lvp, miss", bench.cold()?);
        if turn == 0 {
            bench.compare(&images.path(Kind::Raw))?;
        }
        let (run, of_it) = bench.manual()?;
        runs.add("manual", run);
        parts.push(of_it);
        runs.add("lvp, hit", bench.hit()?);
        if turn == 0 {
            bench.compare(&images.path(Kind::Raw))?;
        }
        runs.add("qemu-img", bench.convert()?);
    }
    let alone = stages_alone(&bench, &images.path(kind), hash, &parts)?;
    let group = json!({
        "case": "provision",
        "root": images.root.name,
        "image": kind.name(),
        "target": if device { "loop device" } else { "file" },
        "stored_mib": fs::metadata(images.path(kind))?.len() >> 20,
        "volume_gib": VOLUME >> 30,
        "ways": runs.json(),
        "manual_parts_s": manual_parts(&parts),
        "alone_s": alone,
        "ratios": ratios(kind, &runs, &parts, &alone, repetitions),
    });
    minio.remove(BUCKET, &format!("{}.{}", images.root.name, kind.format()))?;
    println!("{}", report::group(&group));
    Ok(group)
}

/// The medians of the parts of the manual way.
fn manual_parts(parts: &[[Part; 4]]) -> Value {
    let median = |index: usize| round(Spread::of(parts.iter().map(|part| part[index].wall)).median);
    json!({ "curl": median(0), "sha256sum": median(1), "qemu-img": median(2), "sync": median(3) })
}

/// What each stage takes by itself, and the slowest.
fn stages_alone(bench: &Bench<'_>, image: &Path, hash: f64, parts: &[[Part; 4]]) -> Result<Value> {
    let processors = thread::available_parallelism().map_or(1, usize::from) as f64;
    let download = Spread::of(parts.iter().map(|part| part[0].wall)).median;
    let (decode, data) = alone::decode(image, bench.offered.kind.format())?;
    let target = bench.our_volume();
    bench.clean(&target)?;
    if matches!(bench.place, Place::File) {
        fs::File::create(&target)?.set_len(bench.volume)?;
    }
    let write = alone::write(&target, bench.volume, data, bench.workers)?;
    let decode = decode / processors;
    let slowest = [download, hash, decode, write].into_iter().fold(0.0, f64::max);
    Ok(json!({
        "download": round(download), "hash": round(hash), "decode_on_all": round(decode), "write": round(write),
        "slowest": round(slowest), "data_mib": data >> 20,
    }))
}

fn ratios(kind: Kind, runs: &Runs, parts: &[[Part; 4]], alone: &Value, repetitions: usize) -> Vec<Value> {
    let (miss, hit) = (runs.walls("lvp, miss"), runs.walls("lvp, hit"));
    let manual = runs.walls("manual");
    let of = Spread::of_quotients;
    let alone_goal = match kind {
        Kind::Zlib => 0.6,
        Kind::Zstd => 0.8,
        Kind::Plain | Kind::Raw => 1.0,
    };
    // What the manual way's tools need for the same work, without fetching.
    let theirs: Vec<f64> = parts.iter().map(|part| part[1].processor + part[2].processor).collect();
    let limit = vec![alone["slowest"].as_f64().unwrap_or(f64::NAN); repetitions];
    let peak = runs.of("lvp, miss", |run| run.peak_mib).into_iter().chain(runs.of("lvp, hit", |run| run.peak_mib));
    let peak = Spread::of(peak);
    vec![
        ratio("miss, one pass", "curl + sha256sum + qemu-img", of(&miss, &manual), Some(0.5)),
        ratio("hit", "curl + sha256sum + qemu-img", of(&hit, &manual), Some(0.35)),
        ratio("hit", "qemu-img alone", of(&hit, &runs.walls("qemu-img")), Some(alone_goal)),
        ratio(
            "processor seconds of a miss",
            "sha256sum + qemu-img",
            of(&runs.of("lvp, miss", |run| run.processor), &theirs),
            Some(1.0),
        ),
        ratio(
            "processor seconds of a hit",
            "qemu-img",
            of(&runs.of("lvp, hit", |run| run.processor), &runs.of("qemu-img", |run| run.processor)),
            None,
        ),
        ratio("miss, one pass", "the slowest stage alone", of(&miss, &limit), None),
        ratio("peak memory, MiB", "", Spread { median: peak.most, ..peak }, Some(MEMORY_GOAL_MIB)),
    ]
}

/// From a server with a rate, against the download alone.
fn limited(effort: &Effort, images: &Images, kind: Kind) -> Result<Value> {
    let scratch = cache::scratch("bench")?;
    let (server, path) = (Server::start(), format!("/small.{}", kind.format()));
    server.serve(&path, Page::new(fs::read(images.path(kind))?));
    server.limit(LINK);
    let (_, digest) = alone::hash(&images.path(kind))?;
    let offered = Offered { url: server.url(&path), web_url: server.url(&path), kind, digest };
    let bench =
        Bench { scratch: &scratch, minio: None, offered, place: Place::File, volume: VOLUME, workers: effort.workers };
    let mut runs = Runs::default();
    for _ in 0..effort.repetitions(3) {
        runs.add("lvp, miss", bench.cold()?);
        runs.add("curl", bench.download()?);
    }
    let quotient = Spread::of_quotients(&runs.walls("lvp, miss"), &runs.walls("curl"));
    let group = json!({
        "case": "limited", "root": images.root.name, "image": kind.name(), "target": "file",
        "stored_mib": fs::metadata(images.path(kind))?.len() >> 20,
        "ways": runs.json(),
        "ratios": [ratio("miss, source of 100 MB/s", "curl alone", quotient, Some(1.05))],
    });
    println!("{}", report::group(&group));
    Ok(group)
}

/// A large volume against a small one.
fn size(effort: &Effort, minio: &Minio, images: &Images) -> Result<Value> {
    let scratch = cache::scratch("bench")?;
    let (offered, _) = offer(minio, images, Kind::Zlib)?;
    let of_size = |volume: u64| Bench {
        scratch: &scratch,
        minio: Some(minio),
        offered: offered.clone(),
        place: Place::File,
        volume,
        workers: effort.workers,
    };
    let (small, large) = (of_size(VOLUME), of_size(LARGE_VOLUME));
    small.cold()?;
    let mut runs = Runs::default();
    for _ in 0..effort.repetitions(5) {
        runs.add("50 GiB", large.hit()?);
        runs.add("5 GiB", small.hit()?);
    }
    let quotient = Spread::of_quotients(&runs.walls("50 GiB"), &runs.walls("5 GiB"));
    let group = json!({
        "case": "size", "root": images.root.name, "image": Kind::Zlib.name(), "target": "file",
        "ways": runs.json(),
        "ratios": [ratio("hit, volume of 50 GiB", "volume of 5 GiB", quotient, Some(1.1))],
    });
    println!("{}", report::group(&group));
    Ok(group)
}

/// A copy of a base against a copy of the image.
fn share(effort: &Effort, minio: &Minio, images: &Images) -> Result<Value> {
    let scratch = cache::scratch("bench")?;
    let mounted = MountedFileSystem::make(8 << 30, &["mkfs.xfs", "-q", "-m", "reflink=1"])
        .or_else(|_| MountedFileSystem::make(8 << 30, &["mkfs.btrfs", "-q"]))?;
    let (offered, _) = offer(minio, images, Kind::Zlib)?;
    let on = |place: Place| Bench {
        scratch: &scratch,
        minio: Some(minio),
        offered: offered.clone(),
        place,
        volume: VOLUME,
        workers: effort.workers,
    };
    let (copied, shared) = (on(Place::File), on(Place::Sharing(mounted.path.clone())));
    // Makes the base, and its first copy.
    shared.cold()?;
    shared.compare(&images.path(Kind::Raw))?;
    let mut runs = Runs::default();
    for _ in 0..effort.repetitions(5) {
        runs.add("lvp, base", shared.hit()?);
        runs.add("lvp, hit", copied.hit()?);
    }
    shared.compare(&images.path(Kind::Raw))?;
    let quotient = Spread::of_quotients(&runs.walls("lvp, base"), &runs.walls("lvp, hit"));
    let group = json!({
        "case": "share", "root": images.root.name, "image": Kind::Zlib.name(), "target": "reflinks",
        "ways": runs.json(),
        "ratios": [ratio("hit, with a base", "hit, to a new file", quotient, Some(0.05))],
    });
    println!("{}", report::group(&group));
    Ok(group)
}

/// What every run of the product has in it, before it does anything: state, cache and private API.
fn start(effort: &Effort, images: &Images) -> Result<Value> {
    let scratch = cache::scratch("bench")?;
    let offered = Offered { url: String::new(), web_url: String::new(), kind: Kind::Zlib, digest: String::new() };
    let bench =
        Bench { scratch: &scratch, minio: None, offered, place: Place::File, volume: VOLUME, workers: effort.workers };
    let mut runs = Runs::default();
    for _ in 0..effort.repetitions(5) {
        runs.add("lvp image list", bench.product(&["image", "list"])?.run()?);
    }
    let group = json!({ "case": "start", "root": images.root.name, "image": "none", "target": "none",
        "ways": runs.json(), "ratios": [] });
    println!("{}", report::group(&group));
    Ok(group)
}
