//! Certificates that servers of tests show: good ones, and those that nobody should take.
//!
//! It leaves out certificates of clients.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer},
    },
};

/// A year that is over.
const PAST: i32 = 2020;

/// What a server shows, and whom to trust to take it.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
    authority: String,
}

/// What is over, of an authority, an authority below it and a certificate of that one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
    /// Nothing.
    Nothing,
    /// The server's own certificate.
    Certificate,
    /// The authority between, which the server sends along.
    Between,
    /// The authority that is trusted.
    Authority,
}

impl Identity {
    /// A certificate for this name or address, signed by itself.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn self_signed(name: &str) -> Self {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
        Self { chain: vec![made.cert.der().clone()], key: made.signing_key, authority: made.cert.pem() }
    }

    /// A certificate for this name or address, of an authority below an authority.
    ///
    /// # Panics
    /// When they cannot be made.
    pub fn signed(name: &str, expired: Expired) -> Self {
        let key = || KeyPair::generate().expect("a key");
        let authority = parameters(&[], Some("authority"), expired == Expired::Authority);
        let (authority_key, between_key, leaf_key) = (key(), key(), key());
        let root = authority.self_signed(&authority_key).expect("an authority");
        let root_issuer = Issuer::new(authority, authority_key);
        let between = parameters(&[], Some("between"), expired == Expired::Between);
        let signed_between = between.signed_by(&between_key, &root_issuer).expect("an authority");
        let between_issuer = Issuer::new(between, between_key);
        let leaf = parameters(&[name.to_owned()], None, expired == Expired::Certificate);
        let leaf = leaf.signed_by(&leaf_key, &between_issuer).expect("a certificate");
        let chain = vec![leaf.der().clone(), signed_between.der().clone()];
        Self { chain, key: leaf_key, authority: root.pem() }
    }

    /// The certificate to trust, as PEM.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).expect("a key");
        let settings = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), key)
            .expect("a TLS configuration");
        TlsAcceptor::from(Arc::new(settings))
    }
}

fn parameters(names: &[String], authority: Option<&str>, expired: bool) -> CertificateParams {
    let mut made = CertificateParams::new(names).expect("names");
    if let Some(name) = authority {
        made.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Two of one name would be taken for one whose signature is wrong.
        made.distinguished_name.push(rcgen::DnType::CommonName, format!("{name} {}", fastrand::u64(..)));
    }
    if expired {
        (made.not_before, made.not_after) = (date_time_ymd(PAST - 1, 1, 1), date_time_ymd(PAST, 1, 1));
    }
    made
}
