//! Our populate against `qemu-img convert`, on the same image and target, in one run: ratios, not absolute numbers.
//!
//! `cargo bench --workspace --features lvp-engine/bench --bench populate`. Needs root (loop devices), qemu-utils and
//! e2fsprogs. The content is a file system with real programs and libraries of this machine, made once and kept in
//! `target/bench`. Every copy runs in a process of its own, which for ours also tells its peak memory; each time
//! includes the flush to the target. The result goes to `target/bench/populate.json` too. It leaves out fetching.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use e2e::images::{self, LoopDevice, Qcow2Options};
use lvp_api::ImageFormat;
use lvp_engine::{
    format::{Image, PopulateOptions, populate, sync},
    host::block::BlockTarget,
    progress::Progress,
};
use serde_json::{Value, json};

const CONTENT: u64 = 450 << 20;
const DISK: u64 = 2 << 30;
const VOLUME: u64 = 3 << 30;
const REPETITIONS: usize = 5;
/// The argument that makes this program one copy: image, format, target, whether it reads zero, workers.
const ONE_COPY: &str = "--one-copy";

type Anyhow<T> = Result<T, Box<dyn std::error::Error>>;

/// One measured copy.
#[derive(Clone, Copy, Default)]
struct Run {
    wall: Duration,
    processor: Duration,
    peak_kib: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Ours,
    QemuDefault,
    QemuBest,
}

impl Way {
    const ALL: [Self; 3] = [Self::Ours, Self::QemuDefault, Self::QemuBest];

    fn name(self) -> &'static str {
        match self {
            Self::Ours => "lvp",
            Self::QemuDefault => "qemu-img convert -n",
            Self::QemuBest => "qemu-img convert -n -W -m 16 -t none -T writeback --target-is-zero",
        }
    }
}

fn main() -> Anyhow<()> {
    let arguments: Vec<String> = env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == ONE_COPY) {
        return one_copy(&arguments[at + 1..]);
    }
    let directory = bench_directory()?;
    let images = images_in(&directory)?;
    let machine = machine()?;
    println!("{}", serde_json::to_string_pretty(&machine)?);
    let mut cases = Vec::new();
    for (kind, image, format) in &images {
        for device in [false, true] {
            cases.push(case(&directory, kind, image, format, device)?);
        }
    }
    let result = directory.join("populate.json");
    fs::write(&result, serde_json::to_string_pretty(&json!({ "machine": machine, "cases": cases }))?)?;
    println!("\nwritten to {}", result.display());
    Ok(())
}

/// In the process that is measured.
fn one_copy(arguments: &[String]) -> Anyhow<()> {
    let [image, format, target, reads_zero, workers] = arguments else { return Err("wrong arguments".into()) };
    let image = Image::open_file(Path::new(image), format.parse::<ImageFormat>().map_err(|error| error.0)?)?;
    let target = BlockTarget { path: target.into(), offset: 0, size: VOLUME, reads_zero: reads_zero == "true" };
    let options = PopulateOptions { workers: workers.parse()?, ..PopulateOptions::default() };
    let done = populate(&image, &target, &options, &Progress::default())?;
    sync(&target)?;
    let status = fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    println!("{} {done:?}", peak.trim().trim_end_matches(" kB"));
    Ok(())
}

/// Measures all ways to copy one image to one kind of target, turn by turn.
fn case(directory: &Path, kind: &str, image: &Path, format: &str, device: bool) -> Anyhow<Value> {
    let file = directory.join("target.raw");
    let _ = fs::remove_file(&file);
    File::create(&file)?.set_len(VOLUME)?;
    let attached = if device { Some(LoopDevice::attach(&file, 512)?) } else { None };
    let target = attached.as_ref().map_or(file.as_path(), |attached| &attached.path);
    // The image is in the page cache for everyone.
    std::io::copy(&mut File::open(image)?, &mut std::io::sink())?;
    let mut runs = vec![Vec::new(); Way::ALL.len()];
    for _ in 0..REPETITIONS {
        for (way, runs) in Way::ALL.into_iter().zip(&mut runs) {
            images::run(
                "fallocate",
                &["--punch-hole", "--offset", "0", "--length", &VOLUME.to_string(), &path(target)],
            )?;
            File::open(target)?.sync_all()?;
            runs.push(measured(way, image, format, target)?);
        }
    }
    images::run("qemu-img", &["compare", "-f", format, "-F", "raw", &path(image), &path(target)])?;
    let goal = if device { "loop device" } else { "file" };
    println!("\n{kind} -> {goal} ({} MiB stored)", fs::metadata(image)?.len() >> 20);
    let ours = median(&runs[0]);
    let mut table = Vec::new();
    for (way, runs) in Way::ALL.into_iter().zip(&runs) {
        table.push(line(way, runs, ours));
    }
    drop(attached);
    fs::remove_file(&file)?;
    Ok(json!({ "image": kind, "target": goal, "ways": table }))
}

fn line(way: Way, runs: &[Run], ours: f64) -> Value {
    let mut walls: Vec<f64> = runs.iter().map(|run| run.wall.as_secs_f64()).collect();
    walls.sort_by(f64::total_cmp);
    let (min, max) = (walls[0], walls[walls.len() - 1]);
    let processor = runs.iter().map(|run| run.processor.as_secs_f64()).sum::<f64>() / runs.len() as f64;
    let peak = runs.iter().map(|run| run.peak_kib).max().unwrap_or_default() as f64 / 1024.0;
    let middle = median(runs);
    let ratio = ours / middle;
    let memory = if way == Way::Ours { format!(", peak {peak:.1} MiB") } else { format!(", lvp is {ratio:.2} of it") };
    println!("  {min:6.2} {middle:6.2} {max:6.2} s, processor {processor:5.2} s{memory}   {}", way.name());
    json!({
        "way": way.name(), "min_s": min, "median_s": middle, "max_s": max, "processor_s": processor,
        "peak_mib": (way == Way::Ours).then_some(peak), "lvp_ratio": ratio,
    })
}

fn median(runs: &[Run]) -> f64 {
    let mut walls: Vec<f64> = runs.iter().map(|run| run.wall.as_secs_f64()).collect();
    walls.sort_by(f64::total_cmp);
    walls[walls.len() / 2]
}

fn measured(way: Way, image: &Path, format: &str, target: &Path) -> Anyhow<Run> {
    let (image, path_of_target) = (path(image), path(target));
    let workers = env::var("LVP_BENCH_WORKERS").unwrap_or_else(|_| PopulateOptions::default().workers.to_string());
    let own = env::current_exe()?;
    let mut command = Command::new(if way == Way::Ours { own.as_os_str() } else { OsStr::new("qemu-img") });
    match way {
        Way::Ours => command.args([ONE_COPY, &image, format, &path_of_target, "true", &workers]),
        Way::QemuDefault => command.args(["convert", "-n", "-f", format, "-O", "raw", &image, &path_of_target]),
        Way::QemuBest => command
            .args(["convert", "-n", "-W", "-m", "16", "-t", "none", "-T", "writeback", "--target-is-zero"])
            .args(["-f", format, "-O", "raw", &image, &path_of_target]),
    };
    let before = processor_of_children()?;
    let begun = Instant::now();
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("{}: {}", way.name(), String::from_utf8_lossy(&output.stderr)).into());
    }
    if way != Way::Ours {
        File::open(target)?.sync_data()?;
    }
    let wall = begun.elapsed();
    let said = String::from_utf8_lossy(&output.stdout);
    let peak_kib = said.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default();
    Ok(Run { wall, processor: processor_of_children()?.saturating_sub(before), peak_kib })
}

/// Processor time of all children that have ended: fields 16 and 17 of /proc/self/stat, in hundredths of a second.
fn processor_of_children() -> Anyhow<Duration> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: u64 = fields.skip(13).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 10))
}

/// Makes the images, once.
fn images_in(directory: &Path) -> Anyhow<Vec<(&'static str, PathBuf, &'static str)>> {
    let raw = directory.join("root.raw");
    if !raw.exists() {
        let tree = tempfile::tempdir_in(directory)?;
        let mut left = CONTENT;
        gather(Path::new("/usr"), tree.path(), &mut left)?;
        let new = directory.join("new.raw");
        images::ext4_from(&new, DISK, tree.path(), "root")?;
        fs::rename(new, &raw)?;
    }
    let mut images = Vec::new();
    for (kind, compression) in [("zlib", Some("zlib")), ("zstd", Some("zstd")), ("uncompressed", None)] {
        let image = directory.join(format!("root-{kind}.qcow2"));
        if !image.exists() {
            let new = directory.join("new.qcow2");
            images::qcow2_from(&raw, &new, &Qcow2Options { compression, ..Qcow2Options::default() })?;
            fs::rename(new, &image)?;
        }
        images.push((kind, image, "qcow2"));
    }
    images.push(("raw", raw, "raw"));
    Ok(images)
}

/// Copies files in the order of their names until there is enough.
fn gather(from: &Path, to: &Path, left: &mut u64) -> Anyhow<()> {
    fs::create_dir_all(to)?;
    let mut entries: Vec<_> = fs::read_dir(from)?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        let copy = to.join(entry.file_name());
        if kind.is_dir() {
            gather(&entry.path(), &copy, left)?;
        } else if kind.is_file() && *left > 0 {
            *left = left.saturating_sub(fs::copy(entry.path(), copy)?);
        }
    }
    Ok(())
}

fn bench_directory() -> Anyhow<PathBuf> {
    let own = env::current_exe()?;
    // target/release/deps/populate-…
    let directory = own.ancestors().nth(3).ok_or("no target directory")?.join("bench");
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

fn machine() -> Anyhow<Value> {
    let first = |path: &str, key: &str| -> Anyhow<String> {
        let text = fs::read_to_string(path)?;
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        Ok(line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned())
    };
    Ok(json!({
        "processor": first("/proc/cpuinfo", "model name")?,
        "processors": std::thread::available_parallelism()?.get(),
        "memory": first("/proc/meminfo", "MemTotal")?,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "load": fs::read_to_string("/proc/loadavg")?.trim(),
        "qemu": images::run("qemu-img", &["--version"])?.lines().next(),
        "workers": PopulateOptions::default().workers,
        "repetitions": REPETITIONS,
        "content_mib": CONTENT >> 20, "disk_mib": DISK >> 20, "volume_mib": VOLUME >> 20,
    }))
}

fn path(path: &Path) -> String {
    path.display().to_string()
}
