//! The command line: what can be typed. It leaves out what happens then.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use lvp_api::{ByteSize, Digest, ImageFormat, JobId, JobStatus, VolumeName};

use crate::config::Flags;

/// From a VM image in an object store to a volume on this KVM host.
///
/// Commands talk to the daemon of this machine when one runs, and do the work themselves when none does.
#[derive(Debug, Parser)]
#[command(name = "lvp", version, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
}

/// Flags of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// How results are printed
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Talk to the daemon at this URL
    #[arg(long, global = true, env = "LVP_SERVER", value_name = "URL")]
    pub server: Option<String>,
    /// Do the work in this process, with no daemon
    #[arg(long, global = true)]
    pub local: bool,
    /// Configuration file
    #[arg(long, global = true, env = "LVP_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the database, the lock and the socket
    #[arg(long, global = true, value_name = "DIR")]
    state_dir: Option<String>,
    /// Directory of the image cache
    #[arg(long, global = true, value_name = "DIR")]
    cache_dir: Option<String>,
    /// What is logged to stderr: error, warn, info, debug, trace
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For programs, and for people who prefer it.
    Yaml,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write an image to a volume
    Provision(Provision),
    /// Run the daemon
    Serve(Serve),
    /// Show and cancel jobs
    #[command(subcommand)]
    Job(Job),
    /// Show and change the image cache
    #[command(subcommand)]
    Image(Image),
    /// Show, verify, adopt, release and delete volumes
    #[command(subcommand)]
    Volume(Volume),
    /// Keep the job database safe
    #[command(subcommand)]
    Db(Db),
    /// Show the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Check this host and say how to fix what is wrong
    Doctor,
    /// Print the completions of a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Write an image to a volume
#[derive(Debug, Args)]
pub struct Provision {
    /// The image: s3://bucket/key, https://host/path, file:///path or a path
    #[arg(value_name = "URL")]
    pub image: String,
    /// The volume's name
    #[arg(value_parser = parse::<VolumeName>)]
    pub name: VolumeName,
    /// The volume's size, such as 50G (powers of 1024) or bytes
    #[arg(long, short, allow_hyphen_values = true, value_parser = parse::<ByteSize>)]
    pub size: ByteSize,
    /// Where the volume lives: a configured target, lvm:GROUP, lvm:GROUP/POOL or dir:/PATH
    #[arg(long, short)]
    pub target: Option<String>,
    /// The image's type; without it, the URL's ending says it
    #[arg(long = "type", value_name = "qcow2|raw|raw.gz|raw.zst|raw.xz", value_parser = parse::<ImageFormat>)]
    pub image_type: Option<ImageFormat>,
    /// The image's digest, sha256:… or sha512:…
    #[arg(long, value_parser = parse::<Digest>)]
    pub checksum: Option<Digest>,
    /// An id of yours, to find the job again in logs
    #[arg(long, value_name = "ID")]
    pub correlation_id: Option<String>,
    /// Fetch at most this many bytes a second, and write as many, such as 100M
    #[arg(long, value_name = "RATE", value_parser = parse::<ByteSize>)]
    pub limit_rate: Option<ByteSize>,
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// Do not wait: print the job's id
    #[arg(long, conflicts_with = "dry_run")]
    pub detach: bool,
}

/// Run the daemon
#[derive(Debug, Args)]
pub struct Serve {
    /// Address to listen on; loopback only
    #[arg(long)]
    host: Option<String>,
    /// Port to listen on
    #[arg(long)]
    port: Option<String>,
    /// Unix socket to listen on
    #[arg(long, value_name = "FILE")]
    socket: Option<String>,
}

/// Show and cancel jobs
#[derive(Debug, Subcommand)]
pub enum Job {
    /// List jobs, newest first
    List {
        /// Only jobs with this status
        #[arg(long, value_parser = parse::<JobStatus>)]
        status: Option<JobStatus>,
        /// This many at most
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
        limit: u32,
    },
    /// Show a job
    Show {
        /// Its id
        #[arg(value_parser = parse::<JobId>)]
        id: JobId,
    },
    /// Follow a job until it ends
    Watch {
        /// Its id
        #[arg(value_parser = parse::<JobId>)]
        id: JobId,
    },
    /// Cancel a job and take back what it did
    Cancel {
        /// Its id
        #[arg(value_parser = parse::<JobId>)]
        id: JobId,
    },
}

/// Show and change the image cache
#[derive(Debug, Subcommand)]
pub enum Image {
    /// List cached images, and base volumes if there are any
    List,
    /// List the base volumes that hold decoded images, for volumes to share
    Bases,
    /// Show a cached image
    Show {
        /// Its name, or its digest
        image: String,
    },
    /// Fetch an image into the cache
    Prefetch {
        /// The image's URL
        #[arg(value_name = "URL")]
        image: String,
        /// The image's type; without it, the URL's ending says it
        #[arg(long = "type", value_name = "qcow2|raw|raw.gz|raw.zst|raw.xz", value_parser = parse::<ImageFormat>)]
        image_type: Option<ImageFormat>,
        /// The image's digest, sha256:… or sha512:…
        #[arg(long, value_parser = parse::<Digest>)]
        checksum: Option<Digest>,
        /// Fetch at most this many bytes a second, such as 100M
        #[arg(long, value_name = "RATE", value_parser = parse::<ByteSize>)]
        limit_rate: Option<ByteSize>,
        /// Do not wait: print the job's id
        #[arg(long)]
        detach: bool,
    },
    /// Check a cached image against its digest
    Verify {
        /// Its name, or its digest
        image: String,
    },
    /// Keep an image whatever the cache's size
    Pin {
        /// Its name, or its digest
        image: String,
    },
    /// Let an image be evicted again
    Unpin {
        /// Its name, or its digest
        image: String,
    },
    /// Delete a cached image
    Delete {
        /// Its name, or its digest
        image: String,
    },
}

/// Show and delete volumes
#[derive(Debug, Subcommand)]
pub enum Volume {
    /// List the volumes of a target
    List {
        /// The target; without it, the default one
        #[arg(long, short)]
        target: Option<String>,
    },
    /// Show a volume, and who uses it
    Show {
        /// Its name
        #[arg(value_parser = parse::<VolumeName>)]
        name: VolumeName,
        /// The target; without it, the default one
        #[arg(long, short)]
        target: Option<String>,
    },
    /// Read a volume again and check it against its receipt
    Verify {
        /// Its name
        #[arg(value_parser = parse::<VolumeName>)]
        name: VolumeName,
        /// The target; without it, the default one
        #[arg(long, short)]
        target: Option<String>,
    },
    /// Take over a volume that lvp did not make: from then on `delete` removes it
    Adopt {
        /// Its name
        #[arg(value_parser = parse::<VolumeName>)]
        name: VolumeName,
        /// The target; without it, the default one
        #[arg(long, short)]
        target: Option<String>,
    },
    /// Give up a volume: lvp takes its marks off it, and will not remove it any more
    Release {
        /// Its name
        #[arg(value_parser = parse::<VolumeName>)]
        name: VolumeName,
        /// The target; without it, the default one
        #[arg(long, short)]
        target: Option<String>,
    },
    /// Delete a volume that lvp made; its content is lost
    Delete {
        /// Its name
        #[arg(value_parser = parse::<VolumeName>)]
        name: VolumeName,
        /// The target; without it, the default one
        #[arg(long, short)]
        target: Option<String>,
        /// Say that the content may be lost
        #[arg(long)]
        force: bool,
    },
}

/// Keep the job database safe
#[derive(Debug, Subcommand)]
pub enum Db {
    /// Copy the database to a new file, also while the daemon runs
    Backup {
        /// The file to make
        file: PathBuf,
    },
}

/// Show the configuration
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum ConfigCommand {
    /// Print each setting, its value and where it came from
    Show,
}

impl Cli {
    /// The settings that the command line gives.
    pub fn flags(&self) -> Flags {
        let global = &self.global;
        let mut given =
            vec![("state_dir", &global.state_dir), ("cache_dir", &global.cache_dir), ("log_level", &global.log_level)];
        if let Command::Serve(serve) = &self.command {
            given.extend([("host", &serve.host), ("port", &serve.port), ("socket", &serve.socket)]);
        }
        given.into_iter().filter_map(|(key, text)| text.clone().map(|text| (key, text))).collect()
    }
}

/// Reads a value of the vocabulary.
fn parse<T: std::str::FromStr<Err = lvp_api::Invalid>>(text: &str) -> Result<T, lvp_api::Invalid> {
    text.parse()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_flag_is_a_setting() {
        let cli = Cli::parse_from(["lvp", "serve", "--port", "9", "--state-dir", "/s"]);
        for (key, _) in cli.flags() {
            let setting = crate::config::SETTINGS.iter().find(|setting| setting.key == key).expect(key);
            assert!(setting.flag.is_some(), "{key}");
        }
        assert_eq!(cli.flags().len(), 2);
    }
}
