//! Domains of libvirt's test driver, on and off, and the chains of files below their disks.

use std::fs::{self, File};

use e2e::{holder::Holder, images};
use lvp_api::ErrorCode;

use super::*;

/// States of libvirt's `virDomainState`.
const RUNNING: u8 = 1;
const SHUT_OFF: u8 = 5;

/// libvirt's test driver with one domain, `guest`, in this state, with this disk.
fn libvirt(directory: &Path, state: u8, disk: &Path, format: &str) -> Libvirt {
    let (node, disk) = (directory.join("node.xml"), disk.display());
    let text = format!(
        "<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
         <domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
         <name>guest</name><memory>8192</memory><os><type>hvm</type></os>
         <test:runstate>{state}</test:runstate><devices>
         <disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{disk}'/>
         <target dev='vda' bus='virtio'/></disk></devices></domain></node>"
    );
    fs::write(&node, text).unwrap();
    Libvirt::new(format!("test://{}", node.display()))
}

fn users_of(path: &Path, libvirt: Libvirt) -> Vec<String> {
    file_users(Some(libvirt)).look().unwrap()(path).unwrap()
}

fn overlay(directory: &Path, name: &str, below: &str, format: Option<&str>) -> PathBuf {
    let path = directory.join(name);
    let mut words = vec!["create", "-q", "-u", "-f", "qcow2", "-b", below];
    words.extend(format.iter().flat_map(|format| ["-F", format]));
    words.extend([path.to_str().unwrap(), "8M"]);
    images::run("qemu-img", &words).unwrap();
    path
}

#[test]
fn a_domain_that_is_shut_off_uses_its_disk_and_all_below_it() {
    let directory = tempfile::tempdir().unwrap();
    let room = directory.path();
    let (image, other) = (room.join("image.qcow2"), room.join("other.qcow2"));
    for file in [&image, &other] {
        File::create(file).unwrap().set_len(8 << 20).unwrap();
    }
    let middle = overlay(room, "middle.qcow2", image.to_str().unwrap(), Some("qcow2"));
    let top = overlay(room, "top.qcow2", "middle.qcow2", Some("qcow2"));
    for state in [RUNNING, SHUT_OFF] {
        for (disk, format) in [(&image, "raw"), (&middle, "qcow2"), (&top, "qcow2")] {
            let libvirt = libvirt(room, state, disk, format);
            let said = ["the domain guest has it as a disk, or below one"];
            assert_eq!(users_of(&image, libvirt.clone()), said, "{state}: {}", disk.display());
            assert_eq!(users_of(&other, libvirt), [""; 0]);
        }
    }
    // What a guest wrote on a raw disk names nothing.
    assert_eq!(users_of(&image, libvirt(room, SHUT_OFF, &top, "raw")), [""; 0]);
    // A domain has it by name, also where it is gone.
    fs::remove_file(&image).unwrap();
    assert_eq!(users_of(&image, libvirt(room, SHUT_OFF, &top, "qcow2")).len(), 1);
}

/// What qemu does with a file of which nobody says what it is: it looks.
#[test]
fn a_chain_whose_formats_are_not_named_is_followed() {
    let directory = tempfile::tempdir().unwrap();
    let room = directory.path();
    let image = room.join("image.raw");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    overlay(room, "middle.qcow2", "image.raw", Some("raw"));
    let top = overlay(room, "top.qcow2", "middle.qcow2", Some("qcow2"));
    // qemu-img does not write such a file any more: the extension that says it is made one that nobody knows.
    let mut bytes = fs::read(&top).unwrap();
    let at = bytes.windows(4).position(|word| word == [0xE2, 0x79, 0x2A, 0xCA]).expect("the format below");
    bytes[at..at + 4].copy_from_slice(&[1, 2, 3, 4]);
    fs::write(&top, bytes).unwrap();
    assert_eq!(users_of(&image, libvirt(room, SHUT_OFF, &top, "qcow2")).len(), 1);
}

#[test]
fn the_kernel_is_asked_with_and_without_libvirt() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image.raw");
    fs::write(&file, "x").unwrap();
    let _ours = File::open(&file).unwrap();
    assert_eq!(file_users(None).look().unwrap()(&file).unwrap(), [""; 0], "this process's own");
    let holder = Holder::of(File::open(&file).unwrap());
    let users = file_users(None).look().unwrap()(&file).unwrap();
    assert_eq!(users, [format!("process {} (sleep) has it open", holder.id())]);
    let gone = file_users(Some(Libvirt::new("test:///nonexistent/node.xml"))).look();
    assert_eq!(gone.err().unwrap().code(), ErrorCode::LibvirtUnavailable);
}
