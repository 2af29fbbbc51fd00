//! Everything that can go wrong, under stable codes: one table gives each code its HTTP status, its exit code and
//! whether trying again can help. It leaves out the sentences, which are made where the error happens.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Process exit codes of the command line; documented in `docs/reference/errors.md`.
pub mod exit {
    /// A defect of lvp or an error of the host's tools.
    pub const INTERNAL: u8 = 1;
    /// The request cannot be right: change it.
    pub const USAGE: u8 = 2;
    /// What was named is not there.
    pub const NOT_FOUND: u8 = 3;
    /// What was asked conflicts with what is there: in use, incompatible, not ours.
    pub const CONFLICT: u8 = 4;
    /// The image was refused or does not match its checksum.
    pub const IMAGE: u8 = 5;
    /// The image's source could not be read.
    pub const SOURCE: u8 = 6;
    /// There is not enough space.
    pub const SPACE: u8 = 7;
    /// A part of the host (daemon, database, volume group, libvirt) is not usable now.
    pub const UNAVAILABLE: u8 = 8;
    /// The job was cancelled (128 + SIGINT, as shells do it).
    pub const CANCELLED: u8 = 130;
}

macro_rules! error_codes {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $status:literal, $exit:ident, $retryable:literal;)+) => {
        /// A stable code for one kind of error. In JSON and in logs: its snake_case name.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum ErrorCode {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl ErrorCode {
            /// All codes, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The stable name, such as `volume_in_use`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The HTTP status when this error answers a request.
            pub fn http_status(self) -> u16 {
                match self { $(Self::$variant => $status,)+ }
            }

            /// The exit code of the command line.
            pub fn exit_code(self) -> u8 {
                match self { $(Self::$variant => exit::$exit,)+ }
            }

            /// Whether the same request can succeed later with nothing changed by the user.
            pub fn retryable(self) -> bool {
                match self { $(Self::$variant => $retryable,)+ }
            }

            /// What the code means, for the reference table in the documentation.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii(),)+ }
            }
        }
    };
}

error_codes! {
    /// The body is not JSON.
    MalformedJson = "malformed_json", 400, USAGE, false;
    /// A field is missing, has the wrong type or a value that cannot be.
    InvalidField = "invalid_field", 400, USAGE, false;
    /// A field that the API does not know.
    UnknownField = "unknown_field", 400, USAGE, false;
    /// A size that is zero, negative, or more than can be.
    InvalidSize = "invalid_size", 400, USAGE, false;
    /// A volume name that LVM refuses.
    InvalidVolumeName = "invalid_volume_name", 400, USAGE, false;
    /// An image URL that cannot be read as one.
    InvalidUrl = "invalid_url", 400, USAGE, false;
    /// An image URL with a user name or a password in it, which would be logged and stored.
    UrlHasCredentials = "url_has_credentials", 400, USAGE, false;
    /// An image URL of a scheme that is not served.
    UnsupportedScheme = "unsupported_scheme", 400, USAGE, false;
    /// A checksum that is not sha256 or sha512 in hexadecimal.
    InvalidChecksum = "invalid_checksum", 400, USAGE, false;
    /// A job id that is not a UUID.
    InvalidJobId = "invalid_job_id", 400, USAGE, false;
    /// A target that cannot be read as one.
    InvalidTarget = "invalid_target", 400, USAGE, false;
    /// A setting that is unknown or has a value that cannot be.
    InvalidConfiguration = "invalid_configuration", 400, USAGE, false;
    /// A request that only the machine's own administrator may make (over the Unix socket).
    NotPermitted = "not_permitted", 403, USAGE, false;
    /// No such path in the API.
    RouteNotFound = "route_not_found", 404, NOT_FOUND, false;
    /// No job has this id.
    JobNotFound = "job_not_found", 404, NOT_FOUND, false;
    /// No cached image has this name or digest.
    ImageNotFound = "image_not_found", 404, NOT_FOUND, false;
    /// No volume has this name.
    VolumeNotFound = "volume_not_found", 404, NOT_FOUND, false;
    /// Nothing is known of what the volume should hold.
    ReceiptNotFound = "receipt_not_found", 404, NOT_FOUND, false;
    /// No target has this name.
    TargetNotFound = "target_not_found", 404, NOT_FOUND, false;
    /// The path exists, but not for this method.
    MethodNotAllowed = "method_not_allowed", 405, USAGE, false;
    /// The volume is open, locked, mounted, below other devices, a physical volume, or attached to a running domain.
    VolumeInUse = "volume_in_use", 409, CONFLICT, true;
    /// The volume exists with another size than asked, or too small for the image.
    VolumeIncompatible = "volume_incompatible", 409, CONFLICT, false;
    /// The volume was not made by lvp, so lvp does not remove it.
    VolumeNotOurs = "volume_not_ours", 409, CONFLICT, false;
    /// The volume was made by lvp; removing it needs `force`.
    ForceRequired = "force_required", 409, CONFLICT, false;
    /// The cached image is used by a running job, or volumes are linked to its base.
    ImageInUse = "image_in_use", 409, CONFLICT, true;
    /// The cached image is pinned.
    ImagePinned = "image_pinned", 409, CONFLICT, false;
    /// The idempotency key was used for another request.
    IdempotencyConflict = "idempotency_conflict", 409, CONFLICT, false;
    /// The job has ended, so it cannot be cancelled.
    JobFinished = "job_finished", 409, CONFLICT, false;
    /// A file that lvp did not make stands where a cache entry or volume would go.
    FileInTheWay = "file_in_the_way", 409, CONFLICT, false;
    /// The request's body did not come in time.
    RequestTimeout = "request_timeout", 408, UNAVAILABLE, true;
    /// The request's body is larger than the limit.
    BodyTooLarge = "body_too_large", 413, USAGE, false;
    /// The body's content type is not JSON.
    UnsupportedMediaType = "unsupported_media_type", 415, USAGE, false;
    /// So many jobs wait already that no more are taken.
    QueueFull = "queue_full", 429, UNAVAILABLE, true;
    /// The image's virtual size is larger than the volume.
    ImageTooLarge = "image_too_large", 422, IMAGE, false;
    /// The declared image type contradicts the header.
    ImageTypeMismatch = "image_type_mismatch", 422, IMAGE, false;
    /// The image is damaged: truncated, corrupt, or with tables that cannot be.
    ImageInvalid = "image_invalid", 422, IMAGE, false;
    /// The image uses a feature that is refused: backing file, external data file, encryption, unknown features.
    ImageRefused = "image_refused", 422, IMAGE, false;
    /// The bytes do not have the digest that was promised.
    ChecksumMismatch = "checksum_mismatch", 422, IMAGE, false;
    /// The published checksum file cannot be read as one.
    ChecksumUnreadable = "checksum_unreadable", 422, SOURCE, false;
    /// The source says that there is no such image.
    SourceNotFound = "source_not_found", 422, SOURCE, false;
    /// The source refuses the credentials, or needs some.
    SourceDenied = "source_denied", 422, SOURCE, false;
    /// No connection to the source: name not resolved, refused, TLS failure, time-out.
    SourceUnreachable = "source_unreachable", 502, SOURCE, true;
    /// The source answers with an error or cuts the transfer.
    SourceFailed = "source_failed", 502, SOURCE, true;
    /// The source's content changed while it was read.
    SourceChanged = "source_changed", 502, SOURCE, true;
    /// The volume group, thin pool or directory has not enough space.
    InsufficientSpace = "insufficient_space", 507, SPACE, true;
    /// The image cache has not enough space, even after eviction.
    CacheFull = "cache_full", 507, SPACE, true;
    /// The volume group, pool or directory of a target is not there or not usable.
    TargetUnavailable = "target_unavailable", 503, UNAVAILABLE, true;
    /// libvirt does not answer.
    LibvirtUnavailable = "libvirt_unavailable", 503, UNAVAILABLE, true;
    /// The job database cannot be used.
    DatabaseUnavailable = "database_unavailable", 503, UNAVAILABLE, true;
    /// Another lvp process owns the state or cache directory.
    StateLocked = "state_locked", 503, UNAVAILABLE, true;
    /// So many clients follow jobs already that no more are let in.
    TooManyFollowers = "too_many_followers", 503, UNAVAILABLE, true;
    /// The daemon is stopping.
    ShuttingDown = "shutting_down", 503, UNAVAILABLE, true;
    /// No daemon answers at the given address.
    DaemonUnreachable = "daemon_unreachable", 503, UNAVAILABLE, true;
    /// The job was cancelled.
    Cancelled = "cancelled", 409, CANCELLED, false;
    /// The process that ran the job ended before it, and the job is not resumed.
    Interrupted = "interrupted", 500, INTERNAL, true;
    /// A program of the host failed.
    CommandFailed = "command_failed", 500, INTERNAL, true;
    /// Reading or writing a file or device failed.
    InputOutput = "input_output", 500, INTERNAL, true;
    /// A defect of lvp.
    Internal = "internal", 500, INTERNAL, false;
}

impl ErrorCode {
    /// What usually helps, where the place of the error has nothing better to say.
    pub fn usual_hint(self) -> Option<&'static str> {
        Some(match self {
            Self::MalformedJson => "send one JSON object; /api/openapi.json has the schema of each request",
            Self::InvalidField | Self::UnknownField => "see the schema of the request in /api/openapi.json",
            Self::InvalidSize => "write volume_size_gb: 50 or size: \"50G\"",
            Self::InvalidVolumeName => "use 1 to 127 letters, digits and + _ . -, and no '-' at the front",
            Self::InvalidUrl => "write s3://bucket/key or https://host/path, and % and two digits for what is special",
            Self::InvalidChecksum => "give sha256: and what sha256sum prints for the image",
            Self::InvalidJobId => "use the job_id of the answer to the request; the list of jobs has it too",
            Self::InvalidTarget => "name a target of the configuration; `lvp config show` lists them",
            Self::RouteNotFound | Self::MethodNotAllowed => "see /api/openapi.json",
            Self::UnsupportedMediaType => "send the header Content-Type: application/json",
            Self::BodyTooLarge => "send the request alone; an image is named by its URL, not sent",
            Self::ImageNotFound => "see the list of images; a digest needs 12 digits or more",
            Self::VolumeNotFound => "see the list of volumes; one of another target needs its target",
            Self::ReceiptNotFound => {
                "only what lvp provisioned last has a receipt; provision the volume again to get one"
            }
            Self::JobFinished => "nothing is to be done; delete the volume if it is not wanted",
            Self::ImageInUse => "wait until the job that uses it has ended",
            Self::ImagePinned => "unpin it first",
            Self::ImageTypeMismatch => "set image_type to what `qemu-img info` says of the image",
            Self::ImageInvalid => "check the file with `qemu-img check`, and upload it again",
            Self::ImageRefused => "make an image that stands alone: qemu-img convert -O qcow2",
            Self::ChecksumMismatch => "check which one is right: the image or the published checksum",
            Self::NotPermitted => "use the command line on the machine itself, or the daemon's Unix socket",
            Self::SourceNotFound => "check the bucket and the path; upper and lower case differ",
            Self::SourceFailed | Self::SourceChanged => "try again; if it stays so, look at the source's own log",
            Self::SourceUnreachable => "check the name and the port, and that this machine may connect there",
            Self::InputOutput | Self::CommandFailed => "see the log of the daemon and of the kernel",
            Self::QueueFull => "try again when jobs have ended, or raise LVP_MAX_QUEUED_JOBS",
            Self::RequestTimeout => "send the body together with the head of the request",
            Self::TooManyFollowers => "ask for the job's status instead, or try again when others have gone",
            Self::ShuttingDown => "try again when the daemon has started",
            _ => return None,
        })
    }
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The body of every answer that is an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The stable code.
    pub error: ErrorCode,
    /// What happened, to what, why: one sentence.
    pub message: String,
    /// The HTTP status, repeated.
    pub code: u16,
    /// Whether the same request can succeed later.
    pub retryable: bool,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The request's correlation id (the `X-Request-ID` of the answer).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// Facts for programs: sizes, names, digests.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    #[schema(value_type = Object)]
    pub details: serde_json::Map<String, serde_json::Value>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_and_the_wire_have_the_same_names() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
            assert!((400..600).contains(&code.http_status()), "{code}");
            assert!(code.meaning().ends_with('.'), "{code}");
        }
    }
}
