//! `lvp provision`: submit, and follow to the end.

use std::process::ExitCode;

use lvp_api::{ByteSize, Created, CreatedKind, ErrorBody, ErrorCode, Plan, ProvisionRequest, VolumeAction};
use lvp_engine::Error;

use super::{Outcome, job};
use crate::{
    cli::{Output, Provision},
    connection::{Connection, body},
    output,
};

/// Runs the command.
pub async fn run(connection: &Connection, command: Provision, output: Output) -> Outcome {
    let detach = command.detach;
    let dry_run = command.dry_run;
    let request = request(command)?;
    if dry_run {
        let plan = connection.client.plan(&request).await?;
        output::print(&plan, output, show_plan)?;
        return Ok(ExitCode::SUCCESS);
    }
    refuse_detached_local(connection, detach)?;
    let submitted = connection.client.provision(&request).await?;
    job::follow_or_print(connection, submitted, detach, output).await
}

/// A job in this process ends with it.
pub(super) fn refuse_detached_local(connection: &Connection, detach: bool) -> Result<(), Box<ErrorBody>> {
    if detach && connection.is_local() {
        let error =
            Error::new(ErrorCode::InvalidField, "--detach needs a daemon, because a job in this process ends with it");
        return Err(body(error.hint("start `lvp serve`, or leave out --detach")));
    }
    Ok(())
}

/// A path as it is meant here becomes absolute, because the daemon stands elsewhere.
pub(super) fn image_url(image: String) -> Result<String, Box<ErrorBody>> {
    if image.contains("://") {
        return Ok(image);
    }
    let path = std::path::absolute(&image)
        .map_err(|error| body(Error::new(ErrorCode::InvalidUrl, format!("'{image}' is not a path")).source(error)))?;
    Ok(path.display().to_string())
}

fn request(command: Provision) -> Result<ProvisionRequest, Box<ErrorBody>> {
    Ok(ProvisionRequest {
        image_url: image_url(command.image)?,
        volume_name: command.name.to_string(),
        volume_size_gb: None,
        size: Some(command.size),
        image_type: command.image_type,
        correlation_id: command.correlation_id,
        checksum: command.checksum.map(|digest| digest.to_string()),
        target: command.target,
        limit_rate: command.limit_rate,
        dry_run: command.dry_run,
    })
}

fn show_plan(plan: &Plan) -> String {
    let image = match plan.volume_action {
        VolumeAction::Clone | VolumeAction::Link => "not needed".to_owned(),
        _ if plan.cache_hit => "cached".to_owned(),
        _ => format!("to download, {}", ByteSize(plan.bytes_to_fetch)),
    };
    let volume = match plan.volume_action {
        VolumeAction::Create => "to create",
        VolumeAction::Clone => "to create as a copy of the image's base",
        VolumeAction::Link => "to create as an overlay on the image's base",
        VolumeAction::Reuse => "exists, to overwrite",
    };
    let mut target = format!("{}, {} free", plan.target, ByteSize(plan.target_free_bytes));
    if plan.target_promised_bytes > 0 {
        target.push_str(&format!(", of which running jobs will still take {}", ByteSize(plan.target_promised_bytes)));
    }
    output::facts(vec![
        ("image", Some(format!("{} ({image})", plan.image_url))),
        ("digest", plan.image_digest.as_ref().map(ToString::to_string)),
        ("disk in it", plan.virtual_size_bytes.map(|bytes| ByteSize(bytes).to_string())),
        ("volume", Some(format!("{} ({volume})", plan.volume))),
        ("size", Some(ByteSize(plan.volume_size_bytes).to_string())),
        ("to write", plan.bytes_to_write.map(|bytes| ByteSize(bytes).to_string())),
        ("to zero", plan.bytes_to_zero.map(|bytes| ByteSize(bytes).to_string())),
        ("makes", Some(plan.creates.iter().map(created).collect::<Vec<_>>().join(", ")).filter(|all| !all.is_empty())),
        ("target", Some(target)),
        ("takes about", plan.seconds_estimated.map(|seconds| format!("{seconds} s, by what was done before"))),
    ])
}

fn created(created: &Created) -> String {
    let what = match created.kind {
        CreatedKind::Volume => "the volume",
        CreatedKind::Base => "the image's base",
        CreatedKind::CachedImage => "the image in the cache",
    };
    match created.size_bytes {
        Some(bytes) => format!("{what} ({})", ByteSize(bytes)),
        None => what.to_owned(),
    }
}
