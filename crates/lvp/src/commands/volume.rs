//! `lvp volume`: list, show, verify, adopt, release, delete.

use std::process::ExitCode;

use lvp_api::{ByteSize, ErrorCode, Receipt, Volume, VolumeVerification};

use super::Outcome;
use crate::{
    cli::{self, Output},
    connection::Connection,
    output,
};

/// Runs the command.
pub async fn run(connection: &Connection, command: cli::Volume, output: Output) -> Outcome {
    let client = &connection.client;
    match command {
        cli::Volume::List { target } => {
            output::print(&client.volumes(target.as_deref()).await?, output, |volumes| show_list(volumes))?;
        }
        cli::Volume::Show { name, target } => {
            output::print(&client.volume(name.as_str(), target.as_deref()).await?, output, show)?;
        }
        cli::Volume::Verify { name, target } => {
            let verification = client.verify_volume(name.as_str(), target.as_deref()).await?;
            output::print(&verification, output, verdict)?;
            if !verification.intact {
                return Ok(ExitCode::from(ErrorCode::ChecksumMismatch.exit_code()));
            }
        }
        cli::Volume::Adopt { name, target } => {
            output::print(&client.adopt_volume(name.as_str(), target.as_deref()).await?, output, show)?;
        }
        cli::Volume::Release { name, target } => {
            output::print(&client.release_volume(name.as_str(), target.as_deref()).await?, output, show)?;
        }
        cli::Volume::Delete { name, target, force } => {
            client.delete_volume(name.as_str(), target.as_deref(), force).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show_list(volumes: &[Volume]) -> String {
    let rows = volumes.iter().map(|volume| {
        vec![
            volume.name.to_string(),
            ByteSize(volume.size_bytes).to_string(),
            match (volume.made_by_lvp, volume.incomplete) {
                (true, true) => "lvp, incomplete",
                (true, false) => "lvp",
                _ => "",
            }
            .to_owned(),
            volume.device_path.clone(),
            volume.image_digest.as_ref().map(|digest| digest.hex()[..16].to_owned()).unwrap_or_default(),
            if volume.linked_to.is_some() { "to its base" } else { "" }.to_owned(),
        ]
    });
    output::table(&["volume", "size", "made by", "device", "image", "linked"], rows.collect(), "no volumes")
}

fn verdict(found: &VolumeVerification) -> String {
    let name = &found.name;
    if found.intact {
        return format!("{name} holds what its receipt says: {}", found.actual);
    }
    match found.first_difference {
        Some(offset) => format!("{name} DIFFERS from its image, from byte {offset} on"),
        None => format!(
            "{name} DIFFERS from its receipt (the image is not in the cache, so it is not known where)\n\
             expected {}\nfound    {}",
            found.expected, found.actual
        ),
    }
}

fn show(volume: &Volume) -> String {
    let mut facts = vec![
        ("volume", Some(volume.name.to_string())),
        ("target", Some(volume.target.clone())),
        ("device", Some(volume.device_path.clone())),
        ("size", Some(format!("{} ({} bytes)", ByteSize(volume.size_bytes), volume.size_bytes))),
        ("made by lvp", Some(if volume.made_by_lvp { "yes" } else { "no" }.to_owned())),
        ("incomplete", volume.incomplete.then(|| "yes: its job has not come to its end".to_owned())),
        ("job", volume.job_id.map(|id| id.to_string())),
        ("image", volume.image_digest.as_ref().map(ToString::to_string)),
        ("linked to", volume.linked_to.clone()),
        ("in use", Some(volume.in_use.clone().unwrap_or_else(|| "no".to_owned()))),
    ];
    facts.extend(volume.receipt.iter().flat_map(receipt));
    output::facts(facts)
}

fn receipt(receipt: &Receipt) -> Vec<(&'static str, Option<String>)> {
    let bytes = |bytes: u64| (bytes > 0).then(|| ByteSize(bytes).to_string());
    let stages = receipt.stages.iter().map(|time| format!("{} {} ms", time.stage, time.milliseconds));
    vec![
        ("provisioned", Some(output::moment(receipt.finished_at))),
        ("by job", Some(receipt.job_id.to_string())),
        ("content", Some(receipt.content_digest.to_string())),
        ("fetched", Some(bytes(receipt.bytes_fetched).unwrap_or_else(|| "nothing, the image was cached".to_owned()))),
        ("written", bytes(receipt.bytes_written)),
        ("zeroed", bytes(receipt.bytes_zeroed)),
        ("zero before", bytes(receipt.bytes_skipped)),
        ("left as was", bytes(receipt.bytes_left)),
        ("shared", bytes(receipt.bytes_shared)),
        ("time", Some(stages.collect::<Vec<_>>().join(", "))),
    ]
}
