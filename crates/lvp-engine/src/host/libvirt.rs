//! The connection to libvirt: the storage pool of the image cache, and the disks of domains.
//!
//! Every call opens its own connection in its own thread and gives up after a limit, because a libvirtd that hangs
//! must not hang a job (libvirt's client has no time-out of its own). As long as it hangs, it is not asked the same again and again.
//! It leaves out domain life cycle.

use std::{
    path::{Path, PathBuf},
    sync::{Once, mpsc},
    thread,
    time::Duration,
};

use lvp_api::ErrorCode;
use quick_xml::{
    Reader,
    events::{BytesStart, Event},
};
use virt::{connect::Connect, error::ErrorNumber, sys};

use super::outstanding::Outstanding;
use crate::error::{Error, Result};

/// What was asked and is not answered, by whom and for what.
static OUTSTANDING: Outstanding = Outstanding::new();
/// How long libvirt may take for one call. A refresh of a pool with thousands of files takes seconds.
const LIMIT: Duration = Duration::from_secs(30);

/// The domains that have a state to lose, saved ones before active ones: one that is started in between, as at the host's
/// start, is then seen twice and not missed. A domain is saved to disk by a managed save: `virsh managedsave`, or
/// libvirt-guests when the host stops.
const DOMAINS: [(u32, bool); 2] = [
    (sys::VIR_CONNECT_LIST_DOMAINS_INACTIVE | sys::VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE, true),
    (sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE, false),
];

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedDisk {
    /// The domain's name.
    pub domain: String,
    /// Whether the domain is not active but saved to disk, to go on where it was: it has the disk's content in its memory.
    pub is_saved: bool,
    /// The file or device, of the disk itself or of a link in its backing chain.
    pub path: PathBuf,
    /// Whether the domain reads it as qcow2, so that it may name a file below.
    pub is_qcow2: bool,
}

/// libvirt at a URI. Holds no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Libvirt {
    uri: String,
}

impl Libvirt {
    /// libvirt at this URI, such as `qemu:///system`. Connects to nothing yet.
    pub fn new(uri: impl Into<String>) -> Self {
        Self { uri: uri.into() }
    }

    /// Whether libvirt answers; gives its version as text. Blocks.
    pub fn version(&self) -> Result<String> {
        let number = self.call("asking for the version", |connection| Ok(connection.lib_version()?))?;
        Ok(format!("{}.{}.{}", number / 1_000_000, number / 1000 % 1000, number % 1000))
    }

    /// The storage pool of this name: its directory, and whether it is started. Blocks.
    pub fn pool(&self, name: &str) -> Result<Option<(PathBuf, bool)>> {
        let name = name.to_owned();
        self.call("looking at the storage pool", move |connection| {
            let Ok(pool) = connection.lookup_storage_pool_by_name(&name) else { return Ok(None) };
            let path = target_path(&pool.xml_desc(0)?).unwrap_or_default();
            Ok(Some((PathBuf::from(path), pool.is_active()?)))
        })
    }

    /// The disks of all active and saved domains. Of a saved one those of its definition: what was attached to it only as long
    /// as it ran is not seen. Blocks.
    ///
    /// # Errors
    /// `libvirt_unavailable`, also where one domain alone cannot be read, or one of its disks not be found.
    pub fn disks_in_use(&self) -> Result<Vec<AttachedDisk>> {
        self.call("listing the disks of domains", |connection| {
            let mut disks = Vec::new();
            for (which, is_saved) in DOMAINS {
                for domain in connection.list_all_domains(which)? {
                    // A domain that ends between the list and this has no disks in use.
                    let Some((name, xml)) = there(domain.name().and_then(|name| Ok((name, domain.xml_desc(0)?))))?
                    else {
                        continue;
                    };
                    let own = attached(connection, &name, &xml)?.into_iter();
                    disks.extend(own.map(|disk| AttachedDisk { is_saved, ..disk }));
                }
            }
            Ok(disks)
        })
    }

    /// The disks of all domains, active or not, as they are and as they will be at the next start. Of a domain that does
    /// not run, only the disks themselves are named, and not what is below. Blocks.
    ///
    /// # Errors
    /// As [`Libvirt::disks_in_use`].
    pub fn all_disks(&self) -> Result<Vec<AttachedDisk>> {
        self.call("listing the disks of all domains", |connection| {
            let mut disks = Vec::new();
            for domain in connection.list_all_domains(0)? {
                let name = domain.name()?;
                for form in [0, sys::VIR_DOMAIN_XML_INACTIVE] {
                    if let Some(xml) = there(domain.xml_desc(form))? {
                        disks.extend(attached(connection, &name, &xml)?);
                    }
                }
            }
            Ok(disks)
        })
    }

    /// Finds, or defines, and starts the directory pool `name`. Blocks.
    ///
    /// A pool of that name is taken with the directory that it has, whatever `path` says. Where another pool already
    /// has the directory `path`, that one is taken: libvirt refuses two pools on one directory.
    pub fn ensure_pool(&self, name: &str, path: &Path) -> Result<StoragePool> {
        let (name, path) = (name.to_owned(), path.to_owned());
        let libvirt = self.clone();
        self.call("preparing the storage pool", move |connection| {
            let wanted = path.to_string_lossy().into_owned();
            let found = connection
                .lookup_storage_pool_by_name(&name)
                .or_else(|_| connection.lookup_storage_pool_by_target_path(&wanted));
            let pool = match found {
                Ok(pool) => pool,
                Err(_) => {
                    let pool = connection.define_storage_pool_xml(&pool_xml(&name, &wanted), 0)?;
                    pool.set_autostart(true)?;
                    pool
                }
            };
            if !pool.is_active()? {
                pool.create(0)?;
            }
            let target = target_path(&pool.xml_desc(0)?).unwrap_or(wanted);
            Ok(StoragePool { libvirt, name: pool.name()?, path: PathBuf::from(target) })
        })
    }

    /// Runs `work` with a fresh connection in its own thread, [`LIMIT`] at most.
    fn call<T: Send + 'static>(
        &self,
        doing: &str,
        work: impl FnOnce(&Connect) -> Result<T, Said> + Send + 'static,
    ) -> Result<T> {
        static SILENCE: Once = Once::new();
        // libvirt prints every error to stderr unless told otherwise.
        SILENCE.call_once(virt::error::clear_error_callback);
        let unavailable = |why: String| {
            Error::new(ErrorCode::LibvirtUnavailable, format!("{doing} failed: libvirt at {} {why}", self.uri))
                .hint("check that libvirtd (or virtqemud and virtstoraged) runs: systemctl status libvirtd")
        };
        let turn = OUTSTANDING
            .begin(&format!("{} {doing}", self.uri), LIMIT)
            .map_err(|out| unavailable(format!("was asked {} s ago and has not answered yet", out.as_secs())))?;
        let (sender, receiver) = mpsc::channel();
        let uri = self.uri.clone();
        thread::spawn(move || {
            let opened = Connect::open(Some(&uri)).map_err(Said::from);
            let answer = opened.and_then(|connection| work(&connection));
            // Before the answer is seen, so that who asks in turn waits for nobody.
            drop(turn);
            let _ = sender.send(answer);
        });
        match receiver.recv_timeout(LIMIT) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Said { words, hint })) => {
                let error = unavailable(format!("says: {words}"));
                Err(match hint {
                    Some(hint) => error.hint(hint),
                    None => error,
                })
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(unavailable(format!("did not answer within {} s", LIMIT.as_secs())))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(unavailable("broke the connection".to_owned())),
        }
    }
}

/// A started directory pool of libvirt.
#[derive(Debug, Clone)]
pub struct StoragePool {
    libvirt: Libvirt,
    /// Its name, such as `images`.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
}

impl StoragePool {
    /// Has libvirt read the directory again, so that its list of volumes is true. Blocks.
    pub fn refresh(&self) -> Result<()> {
        let name = self.name.clone();
        self.libvirt.call("refreshing the storage pool", move |connection| {
            Ok(connection.lookup_storage_pool_by_name(&name)?.refresh(0).map(drop)?)
        })
    }
}

fn pool_xml(name: &str, path: &str) -> String {
    let escape = quick_xml::escape::escape;
    format!("<pool type='dir'><name>{}</name><target><path>{}</path></target></pool>", escape(name), escape(path))
}

/// Where the bytes of a disk are, as a domain's XML names it.
#[derive(Debug, PartialEq, Eq)]
enum DiskSource {
    Path(String),
    Volume { pool: String, volume: String },
}

/// The elements that have a source and its format: a disk, what it shows below, and where it is being moved to.
const LINKS: [&str; 3] = ["disk", "backingStore", "mirror"];

/// All `<source>` elements inside `<disk>` elements, and whether each is read as qcow2: of the disks and of their backing
/// chains (libvirt's domain XML format, section "Hard drives, floppy disks, CDROMs").
fn disk_sources(xml: &str) -> Vec<(DiskSource, bool)> {
    let mut reader = Reader::from_str(xml);
    // For each link that we are inside of, which of the sources are its own, and whether it is qcow2.
    let mut inside: Vec<(Vec<usize>, bool)> = Vec::new();
    let mut sources: Vec<(DiskSource, bool)> = Vec::new();
    loop {
        match reader.read_event() {
            Ok(Event::Start(element)) if is_link(&element, !inside.is_empty()) => inside.push((Vec::new(), false)),
            Ok(Event::End(element)) if LINKS.contains(&element.name().as_ref()) => {
                let (own, is_qcow2) = inside.pop().unwrap_or_default();
                own.into_iter().for_each(|index| sources[index].1 = is_qcow2);
            }
            Ok(Event::Start(element) | Event::Empty(element)) => {
                let Some((own, is_qcow2)) = inside.last_mut() else { continue };
                match element.name().as_ref() {
                    "source" => {
                        if let Some(source) = source(&element) {
                            own.push(sources.len());
                            sources.push((source, false));
                        }
                    }
                    "driver" | "format" => *is_qcow2 |= attribute(&element, "type").as_deref() == Some("qcow2"),
                    _ => {}
                }
            }
            Ok(Event::Eof) | Err(_) => return sources,
            Ok(_) => {}
        }
    }
}

/// Outside of disks only a disk is one.
fn is_link(element: &BytesStart<'_>, inside: bool) -> bool {
    let name = element.name();
    name.as_ref() == "disk" || (inside && LINKS.contains(&name.as_ref()))
}

fn source(element: &BytesStart<'_>) -> Option<DiskSource> {
    if let Some(path) = attribute(element, "file").or_else(|| attribute(element, "dev")) {
        return Some(DiskSource::Path(path));
    }
    Some(DiskSource::Volume { pool: attribute(element, "pool")?, volume: attribute(element, "volume")? })
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Option<String> {
    let attribute = element.try_get_attribute(name).ok()??;
    Some(attribute.normalized_value(quick_xml::XmlVersion::Implicit1_0).ok()?.into_owned())
}

/// What libvirt says that went wrong, and what to do about it, if that is known.
struct Said {
    words: String,
    hint: Option<String>,
}

impl From<virt::error::Error> for Said {
    fn from(error: virt::error::Error) -> Self {
        Self { words: error.message().to_owned(), hint: None }
    }
}

/// What was asked of a domain; `None`: it was undefined, or ended, since the list was made.
fn there<T>(asked: Result<T, virt::error::Error>) -> Result<Option<T>, virt::error::Error> {
    match asked {
        Ok(it) => Ok(Some(it)),
        Err(error) if error.code() == ErrorNumber::NoDomain.into() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The disks in a domain's XML. One that cannot be found is an error: nobody knows then what it is.
fn attached(connection: &Connect, domain: &str, xml: &str) -> Result<Vec<AttachedDisk>, Said> {
    let mut disks = Vec::new();
    for (source, is_qcow2) in disk_sources(xml) {
        let path = match source {
            DiskSource::Path(path) => Some(path),
            DiskSource::Volume { pool, volume } => {
                volume_path(connection, &pool, &volume).map_err(|error| not_found(domain, &pool, &volume, &error))?
            }
        };
        let disk = |path| AttachedDisk { domain: domain.to_owned(), is_saved: false, path, is_qcow2 };
        disks.extend(path.map(PathBuf::from).map(disk));
    }
    Ok(disks)
}

fn not_found(domain: &str, pool: &str, volume: &str, error: &virt::error::Error) -> Said {
    Said {
        words: format!(
            "the disk {volume} of the domain {domain} is not found in the storage pool {pool}: {}",
            error.message()
        ),
        hint: Some(format!(
            "`virsh pool-info {pool}` shows whether the pool is defined and virtstoraged answers; define it, or undefine the \
             domain {domain}, if nobody needs it"
        )),
    }
}

/// Where a volume of a pool is. A pool that is not started, or was not read since, does not say: then it lies in its
/// directory. `None`: it is in no file or device of this host.
fn volume_path(connection: &Connect, pool: &str, volume: &str) -> Result<Option<String>, virt::error::Error> {
    let pool = connection.lookup_storage_pool_by_name(pool)?;
    let known = pool.lookup_storage_vol_by_name(volume).and_then(|volume| volume.path());
    match known {
        Ok(path) => Ok(Some(path)),
        Err(_) => Ok(target_path(&pool.xml_desc(0)?).map(|directory| format!("{directory}/{volume}"))),
    }
}

/// The text of `<target><path>` in a pool's XML.
fn target_path(xml: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Pool {
        target: Target,
    }
    #[derive(serde::Deserialize)]
    struct Target {
        path: String,
    }
    quick_xml::de::from_str::<Pool>(xml).ok().map(|pool| pool.target.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disks_of_a_domain_include_its_backing_chain() {
        let xml = "<domain><devices>
            <disk type='block' device='disk'><driver name='qemu' type='raw'/>
              <source dev='/dev/vg0/web' index='1'/><backingStore/></disk>
            <disk type='file'><driver name='qemu' type='qcow2'/><source file='/srv/a &amp; b.qcow2'><privateData/></source>
              <backingStore type='file'><format type='qcow2'/><source file='/srv/middle.qcow2'/>
                <backingStore type='block'><source dev='/dev/mapper/vg0-base'/><format type='raw'/></backingStore>
              </backingStore></disk>
            <disk type='file'><source file='/srv/old.raw'/>
              <mirror type='block' job='copy'><format type='raw'/><source dev='/dev/vg0/new'/></mirror></disk>
            <disk type='volume'><source pool='images' volume='x.qcow2'/><driver type='qcow2'/></disk>
            <interface type='network'><source network='default'/></interface>
          </devices></domain>";
        assert_eq!(
            disk_sources(xml),
            [
                (DiskSource::Path("/dev/vg0/web".into()), false),
                (DiskSource::Path("/srv/a & b.qcow2".into()), true),
                (DiskSource::Path("/srv/middle.qcow2".into()), true),
                (DiskSource::Path("/dev/mapper/vg0-base".into()), false),
                (DiskSource::Path("/srv/old.raw".into()), false),
                (DiskSource::Path("/dev/vg0/new".into()), false),
                (DiskSource::Volume { pool: "images".into(), volume: "x.qcow2".into() }, true),
            ]
        );
    }

    #[test]
    fn libvirt_answers_lists_and_makes_a_pool() {
        let libvirt = Libvirt::new("test:///default");
        assert!(!libvirt.version().unwrap().is_empty());
        libvirt.disks_in_use().unwrap();
        let pool = libvirt.ensure_pool("default-pool", Path::new("/elsewhere")).unwrap();
        assert_eq!((pool.name.as_str(), pool.path.as_path()), ("default-pool", Path::new("/default-pool")));
        pool.refresh().unwrap();
        assert_eq!(libvirt.pool("default-pool").unwrap(), Some((PathBuf::from("/default-pool"), true)));
        assert_eq!(libvirt.pool("absent").unwrap(), None);
        let made = libvirt.ensure_pool("images", Path::new("/srv/a & b")).unwrap();
        assert_eq!(made.path, Path::new("/srv/a & b"));
    }

    #[test]
    fn a_disk_that_is_not_found_in_its_pool_is_not_nobodys() {
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().join("host.xml");
        std::fs::write(
            &host,
            "<node><domain type='test'><name>web</name><memory>8192</memory><os><type>hvm</type></os><devices>
             <disk type='volume'><source pool='gone' volume='web.raw'/><target dev='vda'/></disk>
             </devices></domain></node>",
        )
        .unwrap();
        let libvirt = Libvirt::new(format!("test://{}", host.display()));
        for asked in [libvirt.disks_in_use(), libvirt.all_disks()] {
            let error = asked.unwrap_err();
            assert_eq!(error.code(), ErrorCode::LibvirtUnavailable, "{error:?}");
            assert!(error.chain().contains("the disk web.raw of the domain web is not found in the storage pool gone"));
            assert!(error.to_body().hint.is_some_and(|hint| hint.contains("virsh pool-info gone")), "{error:?}");
        }
    }

    #[test]
    fn an_absent_libvirt_is_said_with_its_address() {
        let error = Libvirt::new("qemu+unix:///system?socket=/nonexistent/sock").version().unwrap_err();
        assert_eq!(error.code(), ErrorCode::LibvirtUnavailable);
        assert!(error.chain().contains("/nonexistent/sock"), "{error:?}");
    }
}
