//! `lvp image`: the image cache.

use std::process::ExitCode;

use lvp_api::{BaseVolume, ByteSize, ErrorCode, Image, PrefetchRequest};

use super::{
    Outcome, job,
    provision::{image_url, refuse_detached_local},
};
use crate::{
    cli::{self, Output},
    connection::Connection,
    output,
};

/// Runs the command.
pub async fn run(connection: &Connection, command: cli::Image, output: Output) -> Outcome {
    let client = &connection.client;
    match command {
        cli::Image::List => {
            output::print(&client.images().await?, output, |images| show_list(images))?;
            let bases = client.bases().await?;
            if output == Output::Table && !bases.is_empty() {
                println!("\n{}", show_bases(&bases));
            }
        }
        cli::Image::Bases => output::print(&client.bases().await?, output, |bases| show_bases(bases))?,
        cli::Image::Show { image } => output::print(&client.image(&image).await?, output, show)?,
        cli::Image::Prefetch { image, image_type, checksum, limit_rate, detach } => {
            refuse_detached_local(connection, detach)?;
            let checksum = checksum.map(|digest| digest.to_string());
            let image_url = image_url(image)?;
            let request = PrefetchRequest { image_url, image_type, checksum, correlation_id: None, limit_rate };
            let submitted = client.prefetch(&request).await?;
            return job::follow_or_print(connection, submitted, detach, output).await;
        }
        cli::Image::Verify { image } => {
            let verification = client.verify_image(&image).await?;
            output::print(&verification, output, |found| {
                let verdict = if found.intact { "is intact" } else { "is DAMAGED" };
                format!("{} {verdict}: {}", found.name, found.actual)
            })?;
            if !verification.intact {
                return Ok(ExitCode::from(ErrorCode::ChecksumMismatch.exit_code()));
            }
        }
        cli::Image::Pin { image } => pin(connection, &image, true, output).await?,
        cli::Image::Unpin { image } => pin(connection, &image, false, output).await?,
        cli::Image::Delete { image } => client.delete_image(&image).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn pin(
    connection: &Connection,
    image: &str,
    pinned: bool,
    output: Output,
) -> Result<(), Box<lvp_api::ErrorBody>> {
    let image = connection.client.pin_image(image, pinned).await?;
    output::print(&image, output, |image| {
        format!("{} is {}", image.name, if image.pinned { "pinned" } else { "not pinned" })
    })
}

fn show_list(images: &[Image]) -> String {
    let rows = images.iter().map(|image| {
        vec![
            image.name.clone(),
            ByteSize(image.size_bytes).to_string(),
            image.virtual_size_bytes.map_or_else(|| "?".to_owned(), |bytes| ByteSize(bytes).to_string()),
            output::moment(image.last_used_at),
            marks(image),
        ]
    });
    output::table(&["image", "file", "disk", "last used", "marks"], rows.collect(), "the cache is empty")
}

fn show_bases(bases: &[BaseVolume]) -> String {
    let rows = bases.iter().map(|base| {
        vec![
            base.name.clone(),
            base.target.clone(),
            ByteSize(base.size_bytes).to_string(),
            base.used_bytes.map(|bytes| ByteSize(bytes).to_string()).unwrap_or_default(),
            base.linked_volumes.map_or_else(|| "?".to_owned(), |number| number.to_string()),
            base.image_digest.hex()[..16].to_owned(),
        ]
    });
    output::table(&["base", "target", "disk", "used", "linked", "image"], rows.collect(), "no bases")
}

fn marks(image: &Image) -> String {
    let marks = [(image.pinned, "pinned"), (image.in_use, "in use"), (!image.verified, "no checksum was published")];
    marks.iter().filter(|(set, _)| *set).map(|(_, word)| *word).collect::<Vec<_>>().join(", ")
}

fn show(image: &Image) -> String {
    output::facts(vec![
        ("image", Some(image.name.clone())),
        ("digest", Some(image.digest.to_string())),
        ("path", Some(image.path.clone())),
        ("format", Some(image.format.to_string())),
        ("file", Some(ByteSize(image.size_bytes).to_string())),
        ("disk", image.virtual_size_bytes.map(|bytes| ByteSize(bytes).to_string())),
        ("source", Some(image.source.clone())),
        ("fetched", Some(output::moment(image.fetched_at))),
        ("last used", Some(output::moment(image.last_used_at))),
        ("marks", Some(marks(image)).filter(|marks| !marks.is_empty())),
    ])
}
