//! The fault matrix: a provision is broken at every point that it passes, in every way, for every kind of volume; afterwards
//! the world is complete or as it was.
//!
//! ```text
//!  points that this kind of volume passes  ×  kill, error, cancel, panic     and, for what is taken back:
//!  STEP.end=error  and then  undo.STEP.begin, undo.STEP.end  ×  kill, error, panic
//! ```
//! `make faults` runs all cells, `FAULTS_AT` those of the points with this part of a name. Elsewhere a fixed choice is run: in the
//! directories of this machine each point in one way, in the test machine fewer. It leaves out what a cell is (`cell`) and what is
//! right (`verdict`).

use std::{
    collections::BTreeSet,
    env, fs,
    path::Path,
    process::Command,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use e2e::{
    bed::{World, faulty_binary, target_directory},
    cell::{Action, Facts, Here, Place, Ran, Shell},
    fixture::Fixture,
    images::{MountedFileSystem, run},
    verdict::{Promise, Verdict, judge},
};
use serde_json::{Value, json};

use crate::Scenario;

/// The scenarios: one for each kind of volume.
pub const SCENARIOS: &[Scenario] = &[
    ("a_new_thick_volume_is_complete_or_was_never_there", |world| matrix(world, &THICK)),
    ("a_new_thin_volume_is_complete_or_was_never_there", |world| matrix(world, &THIN)),
    ("a_clone_of_a_base_is_complete_or_was_never_there", |world| matrix(world, &CLONE)),
    ("a_reused_volume_is_complete_or_said_not_to_be", |world| matrix(world, &REUSED)),
    ("a_reused_inactive_volume_is_complete_or_said_not_to_be", |world| matrix(world, &REUSED_INACTIVE)),
    ("a_reused_thin_volume_is_complete_or_said_not_to_be", |world| matrix(world, &REUSED_THIN)),
    ("a_new_file_is_complete_or_was_never_there", |world| matrix(world, &FILE)),
    ("a_reused_file_is_complete_or_said_not_to_be", |world| matrix(world, &REUSED_FILE)),
    ("a_file_of_a_cached_image_is_complete_or_was_never_there", |world| matrix(world, &CACHED)),
    ("a_file_and_its_base_are_complete_or_were_never_there", |world| matrix(world, &REFLINK)),
    ("a_file_of_a_base_is_complete_or_was_never_there", |world| matrix(world, &REFLINK_OF_BASE)),
    ("a_qcow2_file_is_complete_or_was_never_there", |world| matrix(world, &QCOW2)),
    ("a_linked_file_is_complete_or_was_never_there", |world| matrix(world, &LINKED)),
];

/// A kind of volume.
struct Kind {
    name: &'static str,
    target: &'static str,
    /// What the auditor calls the volume.
    volume: &'static str,
    /// Whether it is in the test machine; else on this one.
    in_machine: bool,
    /// Whether the place is a file system of its own whose files share blocks, so that there are bases.
    shares_blocks: bool,
    /// Whether the group has the base of the image before.
    has_base: bool,
    /// What is there before of the files that an earlier job left in the place's directory, as a pattern.
    keeps: &'static str,
    /// What makes the volume that is there before, in the place's directory.
    prepare: &'static str,
}

const THICK: Kind = Kind {
    name: "thick",
    target: "default",
    volume: "volume web",
    in_machine: true,
    shares_blocks: false,
    has_base: false,
    keeps: "",
    prepare: "",
};
const THIN: Kind = Kind { name: "thin", target: "thin", ..THICK };
const CLONE: Kind = Kind { name: "clone", has_base: true, ..THIN };
/// Makes the logical volume that was there before: its size, then what comes afterwards.
macro_rules! filled {
    ($size:literal, $afterwards:literal) => {
        concat!(
            "lvcreate --yes --quiet ",
            $size,
            " --name web --addtag backup vg0 >/dev/null
            head --bytes=20M /dev/zero | tr '\\0' '\\252' |
                dd of=/dev/vg0/web bs=1M iflag=fullblock conv=fsync status=none
            udevadm settle; ",
            $afterwards
        )
    };
}
const REUSED: Kind = Kind { name: "reused", prepare: filled!("--size 20M", ""), ..THICK };
const REUSED_INACTIVE: Kind =
    Kind { name: "reused inactive", prepare: filled!("--size 20M", "lvchange --quiet --activate n vg0/web"), ..THICK };
const REUSED_THIN: Kind =
    Kind { name: "reused thin", prepare: filled!("--virtualsize 20M --thinpool pool0", ""), ..THIN };
const FILE: Kind = Kind { name: "file", target: "files", volume: "file volumes/web.raw", in_machine: false, ..THICK };
const REUSED_FILE: Kind = Kind {
    name: "reused file",
    prepare: r"mkdir volumes; head --bytes=20M /dev/zero | tr '\0' '\252' >volumes/web.raw
        setfattr --name=user.own --value=backup volumes/web.raw",
    ..FILE
};
const CACHED: Kind = Kind { name: "file of a cached image", keeps: "cache", ..FILE };
const REFLINK: Kind = Kind { name: "reflink", shares_blocks: true, ..FILE };
const REFLINK_OF_BASE: Kind = Kind { name: "reflink of a base", keeps: "volumes/.lvp-*.base", ..REFLINK };
const QCOW2: Kind = Kind { name: "qcow2 file", target: "qcow2", volume: "file qcow2/web.qcow2", ..FILE };
const LINKED: Kind = Kind { name: "linked", target: "linked", volume: "file linked/web.qcow2", ..FILE };

/// The size of every volume.
const SIZE: u64 = 20 << 20;
/// Removes what a cell left in the group, but complete bases.
const EMPTY_GROUP: &str = "lvs --noheadings --options lv_name vg0 | tr -d ' ' |
    { grep -v -e '^pool0$' -e '^lvp-base-[0-9a-f]\\{16\\}-' || true; } | while read -r name; do lvremove --yes --quiet vg0/$name >/dev/null; done";
const EMPTY_BASES: &str = "lvs --noheadings --options lv_name vg0 | tr -d ' ' |
    { grep '^lvp-base-' || true; } | while read -r name; do lvremove --yes --quiet vg0/$name >/dev/null; done";
/// Makes the storage pool that the daemon would make at its first start.
const POOL: &str = "mkdir cache; virsh --quiet pool-info images >/dev/null 2>&1 ||
    { virsh --quiet pool-define-as images dir --target $PWD/cache; virsh --quiet pool-start images; }";
/// A cell of so many is run where not all are: in the test machine, and on this one.
const ONE_OF: [usize; 2] = [64, 4];
/// Points that no kind of file passes: they meet one way in each kind of volume that does.
const ONLY_IN_THE_MACHINE: &[&str] = &["base.cloned"];
/// Every point that some kind of volume passed in this run, and how many kinds were run.
static PASSED: Mutex<(BTreeSet<String>, usize)> = Mutex::new((BTreeSet::new(), 0));

/// The points in the code that no kind of volume passed, if all kinds were run that this run does not leave out.
///
/// # Errors
/// The code cannot be read.
pub fn never_passed() -> Result<Vec<String>> {
    let passed = PASSED.lock().unwrap_or_else(PoisonError::into_inner);
    if passed.1 < SCENARIOS.iter().filter(|(name, _)| crate::is_run(&format!("fault_matrix::{name}"))).count() {
        return Ok(Vec::new());
    }
    let known = points_in_the_code()?;
    ensure!(known.len() > 10, "the points were not found in the code: {known:?}");
    Ok(known.into_iter().filter(|point| !passed.0.contains(point)).collect())
}

/// All names in `fault::point("…")`, and those of the steps in `step!("…"`.
fn points_in_the_code() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../lvp-engine/src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path)?;
            let names = |before: &str| -> Vec<String> {
                text.split(before).skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())).collect()
            };
            found.extend(names("fault::point(\""));
            found.extend(
                names("step!(\"").into_iter().flat_map(|step| [format!("{step}.begin"), format!("{step}.end")]),
            );
        }
    }
    Ok(found)
}

/// Where and with what the cells of one kind are run.
struct Matrix<'a> {
    kind: &'a Kind,
    place: Place<'a>,
    promise: Promise,
    request: Value,
    before: Option<Facts>,
    rows: Vec<Row>,
}

struct Row {
    fault: String,
    status: String,
    verdict: Verdict,
    log: String,
}

fn matrix(world: &World, kind: &Kind) -> Result<()> {
    let image = Fixture::qcow2("broken", 16, 6)?;
    let here = Here;
    let directory = tempfile::tempdir()?;
    let mounted =
        kind.shares_blocks.then(|| MountedFileSystem::make(512 << 20, &["mkfs.xfs", "-q", "-m", "reflink=1"]));
    let mounted = mounted.transpose()?;
    let directory = mounted.as_ref().map_or(directory.path(), |mounted| &mounted.path);
    let mut matrix = Matrix::new(world, kind, &image, &here, directory)?;
    let passed = matrix.undisturbed()?;
    let cells = matrix.cells(&passed);
    for (faults, point, action) in &cells {
        matrix.run(faults, point, *action)?;
    }
    matrix.report()?;
    let mut all = PASSED.lock().unwrap_or_else(PoisonError::into_inner);
    all.0.extend(passed);
    all.1 += 1;
    Ok(())
}

impl<'a> Matrix<'a> {
    fn new(world: &'a World, kind: &'a Kind, image: &Fixture, here: &'a Here, directory: &Path) -> Result<Self> {
        let binary = faulty_binary();
        ensure!(binary.is_file(), "there is no {}; scripts/e2e makes it", binary.display());
        let published = world.publish(image)?;
        let minio = |endpoint: String| {
            [
                ("MINIO_ENDPOINT", endpoint),
                ("MINIO_ACCESS_KEY", world.minio.access_key().to_owned()),
                ("MINIO_SECRET_KEY", world.minio.secret_key().to_owned()),
            ]
        };
        let place = if kind.in_machine {
            let binary = world.faulty_binary()?;
            let settings = minio(world.minio.endpoint_in_vm());
            Place::new(&world.vm, "/var/lib/lvp-faults", binary, Some("vg0"), &settings)?
        } else {
            let port = ("PORT", xtask::boot::free_port()?.to_string());
            let libvirt = ("LVP_LIBVIRT_URI", "none".to_owned());
            let settings = [&minio(world.minio.endpoint())[..], &[port, libvirt]].concat();
            let (directory, binary) = (directory.join("place"), binary.display().to_string());
            Place::new(here as &dyn Shell, &directory.display().to_string(), &binary, None, &settings)?
        };
        let promise = Promise {
            volume: kind.volume.to_owned(),
            content: md5_with_zeros(image, SIZE)?,
            base: md5_with_zeros(image, 0)?,
            image: md5(&image.path)?,
            digest: image.sha256.clone(),
        };
        let request = json!({"image_url": published.s3_url, "volume_name": "web", "size": SIZE.to_string(),
            "target": kind.target, "checksum": format!("sha256:{}", image.sha256)});
        Ok(Self { kind, place, promise, request, before: None, rows: Vec::new() })
    }

    fn configuration(&self) -> String {
        let directory = self.place.directory();
        let files = format!(
            "[targets.files]\nkind = \"dir\"\npath = \"{directory}/volumes\"\n
             [targets.qcow2]\nkind = \"dir\"\npath = \"{directory}/qcow2\"\nformat = \"qcow2\"\n
             [targets.linked]\nkind = \"dir\"\npath = \"{directory}/linked\"\nformat = \"qcow2\"\nlinked = true\n"
        );
        let group = "[targets.default]\nkind = \"lvm\"\nvolume_group = \"vg0\"\n
             [targets.thin]\nkind = \"lvm\"\nvolume_group = \"vg0\"\nthin_pool = \"pool0\"\n";
        if self.kind.in_machine { format!("{group}{files}") } else { files }
    }

    /// Whether an earlier job has left something that this kind of volume begins with.
    fn has_before(&self) -> bool {
        self.kind.has_base || !self.kind.keeps.is_empty()
    }

    /// Makes the world as it is before a cell, maybe with what an earlier job left.
    fn reset(&self, with_before: bool) -> Result<()> {
        let script = match (self.kind.in_machine, with_before) {
            (false, _) => String::new(),
            (true, true) => EMPTY_GROUP.to_owned(),
            (true, false) => format!("{EMPTY_GROUP}\n{EMPTY_BASES}"),
        };
        self.place.reset(&self.configuration(), &script)?;
        let pool = if self.kind.in_machine { POOL } else { "" };
        let kept = if with_before && !self.kind.keeps.is_empty() { "cp -a $PWD.kept/. ." } else { "" };
        self.place.shell(&format!("cd {}\n{pool}\n{kept}\n{}", self.place.directory(), self.kind.prepare)).map(drop)
    }

    /// Runs the job without a fault; gives the points that it passes.
    fn undisturbed(&self) -> Result<Vec<String>> {
        if self.has_before() {
            self.reset(false)?;
            let ran = self.place.run(&self.request, "", "none", None)?;
            ensure!(ran.job["status"] == "completed", "{:#}", ran.job);
            let keep = format!("rm -rf $PWD.kept; mkdir $PWD.kept; cp -a --parents {} $PWD.kept", self.kind.keeps);
            let keep = if self.kind.keeps.is_empty() { "" } else { &keep };
            self.place.shell(&format!("cd {}; {keep}", self.place.directory()))?;
        }
        self.reset(self.has_before())?;
        let before = self.place.audit()?;
        let Ran { job, points, .. } = self.place.run(&self.request, "", "none", None)?;
        let verdict = judge(&before, &self.place.audit()?, &job, &self.promise);
        ensure!(verdict == Verdict::Complete, "without a fault: {verdict:?}: {job:#}\n{}", self.place.log());
        let mut seen = BTreeSet::new();
        Ok(points.into_iter().filter(|point| seen.insert(point.clone())).collect())
    }

    /// The cells of this kind: what is told, the point that it is about, and what happens there.
    fn cells(&self, passed: &[String]) -> Vec<(String, String, Action)> {
        let fault = |point: &str, action| self.place.fault(point, action);
        let mut cells = Vec::new();
        for point in passed {
            cells.extend(Action::ALL.map(|action| (fault(point, action), point.clone(), action)));
        }
        // What comes after the last step is not taken back.
        for step in passed.iter().filter_map(|point| point.strip_suffix(".end")).filter(|name| *name != "job") {
            for point in [format!("undo.{step}.begin"), format!("undo.{step}.end")] {
                // What was overwritten cannot be brought back: that is said, as an error of the undo.
                if point == "undo.populate_volume.end" && !self.kind.prepare.is_empty() {
                    continue;
                }
                for action in [Action::Kill, Action::Error, Action::Panic] {
                    let both = format!("{};{}", fault(&format!("{step}.end"), Action::Error), fault(&point, action));
                    cells.push((both, point.clone(), action));
                }
            }
        }
        if let Ok(part) = env::var("FAULTS_AT") {
            cells.retain(|(_, point, _)| point.contains(&part));
            return cells;
        }
        if env::var_os("FAULTS_ALL").is_some() {
            return cells;
        }
        // Each point meets one way in each kind of file, and another one in the next kind.
        let (turn, one_of) = (self.kind.name.len(), ONE_OF[usize::from(!self.kind.in_machine)]);
        let chosen = |number: usize, point: &str| {
            let is_only_here = self.kind.in_machine && ONLY_IN_THE_MACHINE.contains(&point);
            (number + number / Action::ALL.len() + turn).is_multiple_of(one_of)
                || (is_only_here && (number + turn).is_multiple_of(Action::ALL.len()))
        };
        let numbered = cells.into_iter().enumerate();
        numbered.filter(|(number, (_, point, _))| chosen(*number, point)).map(|(_, cell)| cell).collect()
    }

    /// What there is before a cell; where nothing is made anew for each, it is always the same.
    fn before(&mut self) -> Result<Facts> {
        if let Some(before) = self.before.as_ref().filter(|_| self.kind.prepare.is_empty()) {
            return Ok(before.clone());
        }
        let before = self.place.audit()?;
        self.before = Some(before.clone());
        Ok(before)
    }

    fn run(&mut self, faults: &str, point: &str, action: Action) -> Result<()> {
        let begun = Instant::now();
        self.reset(self.has_before())?;
        let before = self.before()?;
        let ran = self.place.run(&self.request, faults, point, Some(action));
        let (status, verdict) = match ran {
            Err(error) => ("-".to_owned(), Verdict::Third(format!("{error:#}"))),
            Ok(ran) if !ran.passed => ("-".to_owned(), Verdict::Third("the point was not passed".to_owned())),
            Ok(ran) => {
                let verdict = judge(&before, &self.place.audit()?, &ran.job, &self.promise);
                let code = ran.job["error_code"].as_str().map(|code| format!(" ({code})")).unwrap_or_default();
                (format!("{}{code}", ran.job["status"].as_str().unwrap_or("-")), verdict)
            }
        };
        let log = if matches!(verdict, Verdict::Third(_)) { self.place.log() } else { String::new() };
        let fault = format!("{point} {}", action.name());
        let seconds = begun.elapsed().as_secs_f32();
        match &verdict {
            Verdict::Third(why) => eprintln!("{}: {fault}: {seconds:.1} s: {why}", self.kind.name),
            other => eprintln!("{}: {fault}: {seconds:.1} s: {other:?}", self.kind.name),
        }
        self.rows.push(Row { fault, status, verdict, log });
        Ok(())
    }

    /// Writes the table, and fails for every third state.
    fn report(&self) -> Result<()> {
        let mut table = String::new();
        let mut thirds = Vec::new();
        for Row { fault, status, verdict, log } in &self.rows {
            let end = match verdict {
                Verdict::Complete => "complete",
                Verdict::AsBefore => "as before",
                Verdict::Declared => "declared",
                Verdict::Third(why) => {
                    thirds.push(format!("{fault}: {status}: {why}\n{log}"));
                    "THIRD STATE"
                }
            };
            table.push_str(&format!("{:12} {fault:40} {status:28} {end}\n", self.kind.name));
        }
        let directory = target_directory().join("faults");
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(format!("{}.txt", self.kind.name.replace(' ', "-"))), &table)?;
        eprintln!("{table}{}: {} cells, {} third states", self.kind.name, self.rows.len(), thirds.len());
        ensure!(thirds.is_empty(), "{}", thirds.join("\n\n"));
        Ok(())
    }
}

fn md5(file: &Path) -> Result<String> {
    let printed = run("md5sum", &[file])?;
    Ok(printed.split_whitespace().next().context("md5sum printed nothing")?.to_owned())
}

/// The MD5 of what is in this image, with zeros behind it up to `size`, by `qemu-img`.
fn md5_with_zeros(image: &Fixture, size: u64) -> Result<String> {
    let directory = tempfile::tempdir()?;
    let raw = directory.path().join("raw");
    let mut convert = Command::new("qemu-img");
    xtask::process::run(convert.args(["convert", "-f", &image.format, "-O", "raw"]).arg(&image.path).arg(&raw))?;
    let file = fs::File::options().write(true).open(&raw)?;
    file.set_len(size.max(file.metadata()?.len()))?;
    md5(&raw)
}
