//! Reports of LVM as text; and LVM itself, on a machine that has device-mapper (the feature `lvm-tests`).

use super::*;

/// From LVM 2.03.16 on Debian 12.
const LVS: &str = r#"{"report": [{"lv": [
    {"lv_name":"pool0", "lv_size":"1610612736", "lv_path":"", "lv_tags":"", "lv_attr":"twi-aotz--", "lv_device_open":"", "pool_lv":"", "data_percent":""},
    {"lv_name":"web-1", "lv_size":"1073741824", "lv_path":"/dev/vg0/web-1", "lv_tags":"lvp,lvp.job=0193f2b0-0000-7000-8000-000000000001", "lv_attr":"-wi-ao----", "lv_device_open":"open", "pool_lv":"", "data_percent":""},
    {"lv_name":"frozen", "lv_size":"4194304", "lv_path":"/dev/vg0/frozen", "lv_tags":"backup", "lv_attr":"-ri-a-----", "lv_device_open":"", "pool_lv":"", "data_percent":""},
    {"lv_name":"lvp-base-0123456789abcdef-7r2gLc", "lv_size":"16777216", "lv_path":"/dev/vg0/lvp-base-0123456789abcdef-7r2gLc", "lv_tags":"lvp,lvp.base=sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "lv_attr":"Vri---tz-k", "lv_device_open":"", "pool_lv":"pool0", "data_percent":""},
    {"lv_name":"lvp-base-new-0193f2b0-0000-7000-8000-000000000001", "lv_size":"16777216", "lv_path":"/dev/vg0/lvp-base-new-0193f2b0-0000-7000-8000-000000000001", "lv_tags":"lvp,lvp.job=0193f2b0-0000-7000-8000-000000000001", "lv_attr":"Vwi-a-tz--", "lv_device_open":"", "pool_lv":"pool0", "data_percent":"0.39"},
    {"lv_name":"thin", "lv_size":"4194304", "lv_path":"/dev/vg0/thin", "lv_tags":"", "lv_attr":"Vwi-a-tz--", "lv_device_open":"", "pool_lv":"pool0", "data_percent":"50.00"},
    {"lv_name":"cached", "lv_size":"4194304", "lv_path":"/dev/vg0/cached", "lv_tags":"", "lv_attr":"Cwi-a-C---", "lv_device_open":"", "pool_lv":"[fast_cpool]", "data_percent":"1.00"},
    {"lv_name":"lvp-base-ment", "lv_size":"4194304", "lv_path":"/dev/vg0/lvp-base-ment", "lv_tags":"", "lv_attr":"-wi-a-----", "lv_device_open":"", "pool_lv":"", "data_percent":""}
]}]}"#;

fn volumes() -> Vec<Volume> {
    rows::<LogicalVolume>(LVS, "lv").unwrap().into_iter().filter_map(|row| row.into_volume().unwrap()).collect()
}

#[test]
fn a_report_becomes_volumes() {
    let volumes = volumes();
    assert_eq!(volumes[0].unsuitable, Some("it is a thin pool"));
    let web = &volumes[1];
    assert_eq!((web.name.as_str(), web.size, web.open, web.unsuitable), ("web-1", 1 << 30, true, None));
    assert!(web.tags.made_by_lvp && web.tags.job.is_some());
    assert_eq!(volumes[2].unsuitable, Some("it is read-only"));
    assert!(!volumes[2].tags.made_by_lvp);
    for base in &volumes[3..5] {
        assert!(base.unsuitable.unwrap().starts_with("it is a base of lvp's"), "{base:?}");
    }
    assert_eq!((volumes[5].pool.as_deref(), volumes[5].allocated), (Some("pool0"), Some(2 << 20)));
    assert_eq!(volumes[6].pool, None, "a cache is no thin pool");
    assert_eq!(volumes[7].unsuitable, None, "a name alone makes no base");
}

/// From LVM 2.03.16 on Debian 12: a pool in use, and the same one when it is not active.
const POOLS: &str = r#"{"report": [{"lv": [
    {"lv_uuid":"7r2gLc-QTG3-1wtp-fWrR-HQyV-eExW-lfYOQY", "lv_size":"2147483648", "lv_attr":"twi-aotz--", "data_percent":"25.00", "metadata_percent":"11.13", "lv_metadata_size":"4194304", "chunk_size":"65536", "zero":"zero"},
    {"lv_uuid":"7r2gLc-QTG3-1wtp-fWrR-HQyV-eExW-lfYOQY", "lv_size":"2147483648", "lv_attr":"twi---tz--", "data_percent":"", "metadata_percent":"", "lv_metadata_size":"4194304", "chunk_size":"65536", "zero":""}
]}]}"#;

#[test]
fn a_pool_tells_its_room_for_data_and_for_metadata() {
    let pools = rows::<ThinPool>(POOLS, "lv").unwrap();
    let space = pools[0].space().unwrap();
    assert_eq!((space.total, space.free), (2 << 30, (2 << 30) / 4 * 3));
    let pool = space.pool.unwrap();
    let metadata = pool.metadata.unwrap();
    assert_eq!((metadata.total, pool.chunk), (4 << 20, 64 << 10));
    // 11.13 % are used.
    assert_eq!(metadata.free, (4 << 20) - 466_827);
    let inactive = pools[1].space().unwrap();
    assert_eq!((inactive.total, inactive.free, inactive.pool.unwrap().metadata), (2 << 30, 2 << 30, None));
    assert_eq!((pool.zeroes, inactive.pool.unwrap().zeroes), (true, false));
}

#[test]
fn a_report_in_another_form_is_an_error_not_an_empty_list() {
    for output in ["", "no JSON", "{}", r#"{"report": 3}"#, r#"{"report": [{"lv": [{"lv_name": "a"}]}]}"#] {
        assert_eq!(rows::<LogicalVolume>(output, "lv").unwrap_err().code(), ErrorCode::CommandFailed, "{output}");
    }
    assert!(number("1.5g").is_err());
}

#[test]
fn only_locks_are_tried_again() {
    assert!(is_lock_contention("  Can't get lock for vg0.\n  Cannot process volume group vg0"));
    assert!(!is_lock_contention("  Volume group \"vg0\" has insufficient free space (0 extents): 13 required."));
}

#[test]
fn an_absent_group_is_named() {
    let lvm = Lvm::new("no-such-group".into(), None, LockRetry { attempts: 0, backoff: Vec::new() });
    let error = lvm.space().unwrap_err();
    assert_eq!(error.code(), ErrorCode::TargetUnavailable, "{error:?}");
    assert!(error.to_string().contains("no-such-group"));
}

/// On a machine with device-mapper and an empty group `vg0` with the thin pool `pool0`, as the test bed has. One at a
/// time: they use the same names.
#[cfg(feature = "lvm-tests")]
mod real {
    use std::path::{Path, PathBuf};

    use e2e::images::run;
    use lvp_api::MIB;

    use super::*;
    use crate::{
        host::block::OpenTarget,
        volume::conformance::{self, SIZE, base_of, clone_of, content, digest, expect, job, write},
    };

    fn lvm(pool: Option<&str>) -> Lvm {
        let retry = LockRetry { attempts: 2, backoff: vec![Duration::from_millis(100)] };
        Lvm::new("vg0".to_owned(), pool.map(str::to_owned), retry)
    }

    /// A pool of 128 MiB, removed with all that is in it.
    struct Pool(&'static str);

    impl Pool {
        fn make(name: &'static str, zero: &str) -> Self {
            run("lvcreate", &["-y", "--type", "thin-pool", "-L", "128m", "-Z", zero, "-n", name, "vg0"]).unwrap();
            Self(name)
        }
    }

    impl Drop for Pool {
        fn drop(&mut self) {
            let _ = run("lvremove", &["-y", &format!("vg0/{}", self.0)]);
        }
    }

    #[test]
    fn thick_volumes_conform() {
        assert!(!conformance::run(&lvm(None)), "thick volumes share no blocks");
    }

    #[test]
    fn thin_volumes_conform_and_have_bases() {
        assert!(conformance::run(&lvm(Some("pool0"))));
    }

    #[test]
    fn a_volume_that_was_readied_is_put_back() {
        for lvm in [lvm(None), lvm(Some("pool0"))] {
            let volume = lvm.create(&NewVolume { name: &"web-1".parse().unwrap(), size: SIZE, job: job() }).unwrap();
            assert!(volume.path.exists());
            for _ in 0..2 {
                lvm.put_back(&volume).unwrap();
                assert!(!volume.path.exists());
                lvm.target(&volume, false).unwrap();
                assert!(volume.path.exists());
            }
            let held = OpenTarget::open(&lvm.target(&volume, false).unwrap()).unwrap();
            assert_eq!(lvm.put_back(&volume).unwrap_err().code(), ErrorCode::CommandFailed);
            assert!(volume.path.exists(), "it was taken from who has it open");
            drop(held);
            lvm.remove(&volume.name).unwrap();
        }
    }

    #[test]
    fn a_pool_that_does_not_zero_has_no_bases() {
        let pool = Pool::make("pool1", "n");
        let lvm = lvm(Some(pool.0));
        assert!(lvm.bases().unwrap().is_none());
        let volume = lvm.create(&NewVolume { name: &"web-1".parse().unwrap(), size: SIZE, job: job() }).unwrap();
        assert!(!lvm.target(&volume, true).unwrap().reads_zero);
    }

    #[test]
    fn a_full_pool_takes_no_volume() {
        let pool = Pool::make("pool1", "y");
        run("lvchange", &["--errorwhenfull", "y", "vg0/pool1"]).unwrap();
        let lvm = lvm(Some(pool.0));
        let store = lvm.bases().unwrap().unwrap();
        let base = base_of(&*store, &digest("a0"), 1);
        let volume = clone_of(&*store, &base, "web-1", 256 * MIB);
        let file = format!("of={}", volume.path.display());
        run("dd", &["if=/dev/zero", &file, "bs=1M", "oflag=direct"]).unwrap_err();
        assert_eq!(lvm.space().unwrap().free, 0);
        let new = NewVolume { name: &"web-2".parse().unwrap(), size: SIZE, job: job() };
        assert_eq!(lvm.create(&new).unwrap_err().code(), ErrorCode::InsufficientSpace);
        assert_eq!(store.clone_base(&base, &new).unwrap_err().code(), ErrorCode::InsufficientSpace);
        assert_eq!(store.create(SIZE, job()).unwrap_err().code(), ErrorCode::InsufficientSpace);
        // What is there stays whole.
        lvm.remove(&volume.name).unwrap();
        expect(&clone_of(&*store, &base, "web-1", SIZE).path, SIZE, &[(0, 1), (SIZE - MIB, 1)]);
    }

    #[test]
    fn a_pool_tells_how_full_its_metadata_is() {
        let lvm = lvm(Some("pool0"));
        let before = lvm.space().unwrap();
        let pool = before.pool.unwrap();
        let metadata = pool.metadata.unwrap();
        assert!(metadata.free > 0 && metadata.free < metadata.total, "{metadata:?}");
        assert_eq!(pool.chunk, 64 << 10);
        let volume = lvm.create(&NewVolume { name: &"web-1".parse().unwrap(), size: 512 * MIB, job: job() }).unwrap();
        let file = format!("of={}", volume.path.display());
        run("dd", &["if=/dev/zero", &file, "bs=1M", "count=64", "conv=fsync"]).unwrap();
        let after = lvm.space().unwrap();
        assert!(before.free - after.free >= 63 * MIB, "{before:?} {after:?}");
        // 1024 chunks at 48 bytes, about.
        let taken = metadata.free - after.pool.unwrap().metadata.unwrap().free;
        assert!((16 << 10..256 << 10).contains(&taken), "{taken} bytes for 64 MiB");
        lvm.remove(&volume.name).unwrap();
    }

    #[test]
    fn the_largest_thin_volume_can_be_made_and_a_larger_one_not() {
        let lvm = lvm(Some("pool0"));
        let (name, largest) = ("web-1".parse().unwrap(), lvm.capabilities().unwrap().largest);
        assert!(lvm.create(&NewVolume { name: &name, size: largest + 1, job: job() }).is_err());
        assert_eq!(lvm.create(&NewVolume { name: &name, size: largest, job: job() }).unwrap().size, largest);
        lvm.remove(&name).unwrap();
    }

    /// Names are the group's, so two pools must not take each other's.
    #[test]
    fn each_pool_has_its_own_bases() {
        let pool = Pool::make("pool1", "y");
        let (here, there) = (lvm(Some("pool0")), lvm(Some(pool.0)));
        let (one, other) = (here.bases().unwrap().unwrap(), there.bases().unwrap().unwrap());
        let (first, second) = (base_of(&*one, &digest("a0"), 1), base_of(&*other, &digest("a0"), 2));
        assert_ne!(first.name, second.name);
        assert_eq!(one.list().unwrap(), std::slice::from_ref(&first));
        assert_eq!(other.list().unwrap(), std::slice::from_ref(&second));
        let unsealed = job();
        one.create(SIZE, unsealed).unwrap();
        assert_eq!((one.unsealed().unwrap(), other.unsealed().unwrap()), (vec![unsealed], Vec::new()));
        other.discard(unsealed).unwrap();
        assert_eq!(one.unsealed().unwrap(), [unsealed]);
        one.discard(unsealed).unwrap();
        expect(&clone_of(&*other, &second, "web-2", SIZE).path, SIZE, &[(0, 2), (SIZE - MIB, 2)]);
        // A pool that gets another name keeps its bases.
        run("lvrename", &["vg0", pool.0, "pool2"]).unwrap();
        let renamed = Pool("pool2");
        let there = lvm(Some(renamed.0));
        let other = there.bases().unwrap().unwrap();
        assert_eq!(other.list().unwrap(), [second]);
        one.remove(&digest("a0")).unwrap();
        assert_eq!(other.list().unwrap().len(), 1);
    }

    #[test]
    fn a_crash_while_sealing_leaves_what_is_no_base_and_can_be_sealed() {
        let lvm = lvm(Some("pool0"));
        let store = PoolBases::of(&lvm, "pool0", lvm.thin_pool().unwrap().unwrap()).unwrap();
        let (job, digest, content) = (job(), digest("a0"), content(1));
        write(&store.create(SIZE, job).unwrap().path, 0, 1);
        let row = |lvm: &Lvm| lvm.logical_volumes().unwrap().into_iter().find(|row| row.pool_lv == "pool0").unwrap();
        // Under another digest than it is sealed with in the end: the last word counts.
        store.mark(&row(&lvm), &conformance::digest("b0"), &conformance::content(2)).unwrap();
        store.mark(&row(&lvm), &digest, &content).unwrap();
        assert!(row(&lvm).lv_attr.starts_with("Vri-"), "read-only and not active: {}", row(&lvm).lv_attr);
        assert_eq!((store.find(&digest).unwrap(), store.list().unwrap()), (None, Vec::new()));
        assert_eq!(store.unsealed().unwrap(), [job]);
        assert!(lvm.list().unwrap().is_empty(), "it is no volume either");
        // A crash within the command, where LVM did not write all of it at once.
        run("lvchange", &["-prw", "--deltag", &format!("lvp.content={content}"), &lvm.full_name(&row(&lvm).lv_name)])
            .unwrap();
        assert_eq!((store.list().unwrap(), store.unsealed().unwrap()), (Vec::new(), vec![job]));
        let base = store.seal(job, &digest, &content).unwrap();
        assert!((MIB..2 * MIB).contains(&base.used_bytes.unwrap()), "{base:?}");
        assert_eq!(store.list().unwrap(), std::slice::from_ref(&base));
        expect(&clone_of(&store, &base, "web-1", SIZE).path, SIZE, &[(0, 1)]);
        store.remove(&digest).unwrap();
        lvm.remove(&"web-1".parse().unwrap()).unwrap();
    }

    #[test]
    fn a_base_is_not_active_and_takes_no_write_when_it_is() {
        let lvm = lvm(Some("pool0"));
        let store = lvm.bases().unwrap().unwrap();
        let base = base_of(&*store, &digest("a0"), 1);
        let device = PathBuf::from("/dev/vg0").join(&base.name);
        // As at boot.
        run("vgchange", &["-ay", "vg0"]).unwrap();
        assert!(!device.exists());
        let name = lvm.full_name(&base.name);
        run("lvchange", &["-ay", "-K", &name]).unwrap();
        let writes = |path: &Path| {
            let file = format!("of={}", path.display());
            run("dd", &["if=/dev/zero", &file, "bs=4k", "count=1", "conv=nocreat,notrunc,fsync"]).is_ok()
        };
        assert!(device.exists() && !writes(&device));
        run("lvchange", &["-an", &name]).unwrap();
        let volume = clone_of(&*store, &base, "web-1", SIZE);
        assert!(writes(&volume.path), "a clone is written");
        lvm.remove(&volume.name).unwrap();
        store.remove(&base.digest).unwrap();
    }

    #[test]
    fn an_unsealed_base_that_is_held_is_not_removed() {
        let lvm = lvm(Some("pool0"));
        let store = lvm.bases().unwrap().unwrap();
        let job = job();
        // As another daemon holds it while it writes.
        let held = OpenTarget::open(&store.create(SIZE, job).unwrap()).unwrap();
        let error = store.discard(job).unwrap_err();
        assert_eq!((error.code(), error.retryable()), (ErrorCode::ImageInUse, true), "{error:?}");
        assert_eq!(store.unsealed().unwrap(), [job]);
        drop(held);
        store.discard(job).unwrap();
        assert_eq!(store.unsealed().unwrap(), []);
    }

    /// A volume of a user's that happens to have the name of a base.
    #[test]
    fn what_lvp_did_not_make_is_no_base() {
        let lvm = lvm(Some("pool0"));
        let store = PoolBases::of(&lvm, "pool0", lvm.thin_pool().unwrap().unwrap()).unwrap();
        let (job, digest) = (job(), digest("a0"));
        let names = [format!("lvp-base-new-{job}"), store.sealed_name(&digest)];
        for name in &names {
            run("lvcreate", &["-y", "-n", name, "-V", "16m", "--thinpool", "pool0", "vg0"]).unwrap();
            assert_eq!(lvm.find(&name.parse().unwrap()).unwrap().unwrap().unsuitable, None);
        }
        assert_eq!((store.list().unwrap(), store.unsealed().unwrap()), (Vec::new(), Vec::new()));
        assert_eq!(store.create(SIZE, job).unwrap_err().code(), ErrorCode::FileInTheWay);
        let other = conformance::job();
        store.create(SIZE, other).unwrap();
        assert_eq!(store.seal(other, &digest, &content(1)).unwrap_err().code(), ErrorCode::FileInTheWay);
        store.discard(job).unwrap();
        store.discard(other).unwrap();
        store.remove(&digest).unwrap();
        assert_eq!(lvm.list().unwrap().len(), 2, "both are still there");
        names.iter().for_each(|name| drop(run("lvremove", &["-y", &format!("vg0/{name}")]).unwrap()));
    }
}
