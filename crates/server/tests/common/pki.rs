//! Certificates of an authority that lives for a test, in the files that programs look for.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgmap_server::nbd::{Credentials, Peers};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

/// The number of every client's certificate.
const CLIENT: u64 = 77;

/// A directory with the authority's, a server's and a client's certificate.
pub(crate) struct Pki {
    directory: tempfile::TempDir,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, "an authority");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let pki = Self {
            directory,
            authority,
        };
        pki.put("ca-cert.pem", &pki.authority.pem());
        pki.sign("server", "localhost");
        pki.sign("client", "a client");
        pki
    }

    fn sign(&self, whose: &str, name: &str) {
        let key = KeyPair::generate().unwrap();
        let mut params =
            CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.serial_number = Some(SerialNumber::from(CLIENT));
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        self.put(&format!("{whose}-cert.pem"), &certificate.pem());
        self.put(&format!("{whose}-key.pem"), &key.serialize_pem());
    }

    /// Takes the clients' certificates back.
    pub(crate) fn revoke(&self) {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(CLIENT),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(4000, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.authority).unwrap();
        self.put("ca-crl.pem", &list.pem().unwrap());
    }

    pub(crate) fn put(&self, name: &str, text: &str) {
        fs::write(self.path().join(name), text).unwrap();
    }

    /// The same files, less those of the client.
    pub(crate) fn without_client(&self) -> tempfile::TempDir {
        let other = tempfile::tempdir().unwrap();
        fs::copy(
            self.path().join("ca-cert.pem"),
            other.path().join("ca-cert.pem"),
        )
        .unwrap();
        other
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn server(&self, peers: Peers) -> Credentials {
        Credentials::read(self.path(), peers).unwrap()
    }

    /// A client that trusts the authority, and shows its certificate.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        let file = |name: &str| -> PathBuf { self.path().join(name) };
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(file("ca-cert.pem")).unwrap())
            .unwrap();
        let certificate = CertificateDer::from_pem_file(file("client-cert.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(file("client-key.pem")).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)
            .unwrap();
        Arc::new(config)
    }
}
