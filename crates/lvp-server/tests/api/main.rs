//! The HTTP API on real parts: an engine with a directory as target, an object store with signatures in this process,
//! listeners on a free port and a Unix socket, driven by an HTTP client. One module per subject.

mod admission;
mod auditor;
mod bad_images;
mod bad_requests;
mod bases;
mod bed;
mod bounds;
mod cache_faults;
mod cancel;
mod compressed;
mod defects;
mod golden;
mod host_faults;
mod images;
mod jobs;
mod leftovers;
mod limits;
mod linked;
mod one_pass;
mod people_faults;
mod qcow2_volumes;
mod receipts;
mod resumed_faults;
mod source_faults;
mod source_tls;
mod surface;
mod volumes;
