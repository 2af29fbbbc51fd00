//! `make demo`: the main job end to end, on a fresh machine, with nothing prepared: an image with a file system in it
//! goes through an object store with real signatures onto a volume, twice, and tools that are not ours check the result.
//!
//! It needs no root, no LVM and no libvirt daemon: the target is a directory, the object store is in this process.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use e2e::{images, s3::ObjectStore};

const ACCESS_KEY: &str = "demo-access-key";
const SECRET_KEY: &str = "demo-secret-key";
/// The file system in the image, and the volume that it goes to.
const DISK_MIB: u64 = 512;
const VOLUME: &str = "1G";

fn main() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let place = directory.path();
    say("An image: a file system with real files, as a compressed qcow2");
    let (raw, image) = (place.join("debian.raw"), place.join("debian.qcow2"));
    images::ext4_from(&raw, DISK_MIB << 20, &content(), "demo")?;
    images::qcow2_from(&raw, &image, &images::Qcow2Options { compression: Some("zlib"), ..Default::default() })?;
    println!("{} of disk in a file of {} KiB", DISK_MIB << 20, fs::metadata(&image)?.len() >> 10);

    say("An object store in this process, with real signatures, holds it and its .sha256");
    let store = ObjectStore::start(ACCESS_KEY, SECRET_KEY)?;
    store.put_file("images", "debian.qcow2", &image)?;
    let sum = images::run("sha256sum", &[image.as_os_str()])?;
    let line = format!("{}  debian.qcow2\n", sum.split_whitespace().next().context("sha256sum printed nothing")?);
    store.put("images", "debian.qcow2.sha256", line.as_bytes())?;
    print!("{}/images/debian.qcow2.sha256: {line}", store.endpoint());

    let state = place.join("state");
    let provision = |volume| lvp(&store, &state, &["provision", "s3://images/debian.qcow2", volume, "--size", VOLUME]);
    say("A miss: downloaded, verified, cached, written");
    provision("web-1")?;
    let requests = store.count("GET", "/images/debian.qcow2");
    say("A hit: from the cache");
    provision("web-2")?;
    ensure!(store.count("GET", "/images/debian.qcow2") == requests, "the second volume was not written from the cache");

    say("What lvp says of it");
    for arguments in [&["job", "list"][..], &["image", "list"], &["volume", "list"]] {
        lvp(&store, &state, arguments)?;
    }

    say("What others say of it: e2fsck and qemu-img");
    for volume in ["web-1", "web-2"] {
        let path = state.join(format!("volumes/{volume}.raw"));
        show("e2fsck", &["-fn".as_ref(), path.as_os_str()])?;
        show(
            "qemu-img",
            &[
                "compare".as_ref(),
                "-f".as_ref(),
                "raw".as_ref(),
                "-F".as_ref(),
                "qcow2".as_ref(),
                path.as_os_str(),
                image.as_os_str(),
            ],
        )?;
    }
    println!("\nDone. Both volumes hold the image, and zeros behind it.");
    Ok(())
}

fn say(words: &str) {
    println!("\n── {words}");
}

/// Some tens of megabytes of real files that every Debian has.
fn content() -> PathBuf {
    ["/usr/share/perl", "/usr/share/doc", "/etc"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.is_dir())
        .unwrap_or_default()
}

/// Runs the `lvp` that was built beside this program, with its state below `state`.
fn lvp(store: &ObjectStore, state: &Path, arguments: &[&str]) -> Result<()> {
    let program = std::env::current_exe()?.with_file_name("lvp");
    println!("$ lvp {}", arguments.join(" "));
    let status = Command::new(&program)
        .args(arguments)
        .env("MINIO_ENDPOINT", store.endpoint())
        .env("MINIO_ACCESS_KEY", ACCESS_KEY)
        .env("MINIO_SECRET_KEY", SECRET_KEY)
        .env("LVP_STATE_DIR", state)
        .env("LVP_CACHE_DIR", state.join("images"))
        .env("LVP_LIBVIRT_URI", "none")
        .env_remove("LVM_VOLUME_GROUP")
        .status()
        .with_context(|| format!("{} could not be started", program.display()))?;
    ensure!(status.success(), "lvp ended with {status}");
    Ok(())
}

/// Runs a program with its output on this terminal.
fn show(program: &str, arguments: &[&std::ffi::OsStr]) -> Result<()> {
    let words: Vec<_> = arguments.iter().map(|argument| argument.to_string_lossy()).collect();
    println!("$ {program} {}", words.join(" "));
    // e2fsprogs lives where only root's PATH looks.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let status = Command::new(program).args(arguments).env("PATH", path).status()?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}
