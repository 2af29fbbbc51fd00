//! The one pass onto a block device, as a process of its own: what [`lvp_engine::bench`] does.
//!
//! It leaves out the job, its record and the API, which a volume of LVM would have.

use std::{ffi::OsString, path::Path};

use anyhow::{Context, Result, bail};
use lvp_api::{Digest, ImageFormat};
use lvp_engine::{
    Credentials, Secret, SourceSettings,
    bench::{ToDevice, to_device},
    format::PopulateOptions,
    host::block::BlockTarget,
    parse_endpoint,
};

/// The argument that makes this program one transfer.
pub const ONE_TRANSFER: &str = "--one-transfer";

/// The arguments of one transfer; the object store is in the environment, as for lvp.
pub fn arguments(url: &str, format: &str, digest: &str, cache: &Path, device: &Path, size: u64) -> Vec<OsString> {
    let words = [ONE_TRANSFER, url, format, digest].map(OsString::from).into_iter();
    words.chain([cache.into(), device.into(), size.to_string().into()]).collect()
}

/// Does it.
pub fn transfer(arguments: &[&str]) -> Result<()> {
    let [url, format, digest, cache, device, size] = arguments else { bail!("wrong arguments") };
    let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
    let credentials = Credentials {
        access_key: Secret::new(variable("MINIO_ACCESS_KEY")?),
        secret_key: Secret::new(variable("MINIO_SECRET_KEY")?),
    };
    let sources = SourceSettings {
        endpoint: Some(parse_endpoint(&variable("MINIO_ENDPOINT")?)?),
        credentials: Some(credentials),
        ..SourceSettings::default()
    };
    let wanted = ToDevice {
        url: (*url).to_owned(),
        format: format.parse::<ImageFormat>()?,
        checksum: digest.parse::<Digest>()?,
        cache: cache.into(),
        sources,
        target: BlockTarget { path: device.into(), offset: 0, size: size.parse()?, reads_zero: true },
        options: PopulateOptions { workers: variable("WORKERS")?.parse()?, ..PopulateOptions::default() },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(to_device(wanted))?;
    Ok(())
}
