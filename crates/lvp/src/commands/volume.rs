//! `lvp volume`: list, show, delete.

use std::process::ExitCode;

use lvp_api::{ByteSize, Volume};

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
            if volume.made_by_lvp { "lvp" } else { "" }.to_owned(),
            volume.device_path.clone(),
            volume.image_digest.as_ref().map(|digest| digest.hex()[..16].to_owned()).unwrap_or_default(),
        ]
    });
    output::table(&["volume", "size", "made by", "device", "image"], rows.collect(), "no volumes")
}

fn show(volume: &Volume) -> String {
    output::facts(vec![
        ("volume", Some(volume.name.to_string())),
        ("target", Some(volume.target.clone())),
        ("device", Some(volume.device_path.clone())),
        ("size", Some(format!("{} ({} bytes)", ByteSize(volume.size_bytes), volume.size_bytes))),
        ("made by lvp", Some(if volume.made_by_lvp { "yes" } else { "no" }.to_owned())),
        ("job", volume.job_id.map(|id| id.to_string())),
        ("image", volume.image_digest.as_ref().map(ToString::to_string)),
        ("in use", Some(volume.in_use.clone().unwrap_or_else(|| "no".to_owned()))),
    ])
}
