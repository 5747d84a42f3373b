//! Who we are, and whom we trust, under TLS: the files that nbdkit and qemu know.
//!
//! Read once, when the server starts. What must never happen here: that a file which is there, and cannot be used, is passed over.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

/// Whether clients speak TLS.
#[derive(Clone, Debug)]
pub enum Security {
    /// They do not.
    Plain,
    /// They may.
    Offered(Credentials),
    /// They do before anything else.
    Required(Credentials),
}

impl Security {
    pub(super) const fn credentials(&self) -> Option<&Credentials> {
        match self {
            Self::Plain => None,
            Self::Offered(credentials) | Self::Required(credentials) => Some(credentials),
        }
    }
}

/// Which clients a server talks to under TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peers {
    /// All.
    Anybody,
    /// Those with a certificate of our authority.
    Verified,
}

/// A server's certificate and key, and whom it trusts. Clones are the same.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub(super) config: Arc<ServerConfig>,
}

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum BadCredentials {
    /// A file is not there, or is no PEM of what belongs in it.
    #[error("cannot use {}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: pem::Error,
    },
    /// The certificate and the key do not belong together, or are of a kind that nobody uses.
    #[error("server-cert.pem and server-key.pem cannot be used: {0}")]
    Own(rustls::Error),
    /// The authority's certificate is none.
    #[error("ca-cert.pem cannot be used: {0}")]
    Authority(rustls::Error),
    /// Nobody can be verified by the authority and its list.
    #[error("clients cannot be verified by ca-cert.pem and ca-crl.pem: {0}")]
    Verifier(VerifierBuilderError),
}

impl Credentials {
    /// Reads `server-cert.pem` and `server-key.pem` from a directory; if clients are verified, `ca-cert.pem` too, and
    /// `ca-crl.pem` if it is there: the certificates that the authority has taken back.
    ///
    /// # Errors
    ///
    /// See [`BadCredentials`].
    pub fn read(directory: &Path, peers: Peers) -> Result<Self, BadCredentials> {
        let certificates = certificates(directory.join("server-cert.pem"))?;
        let path = directory.join("server-key.pem");
        let key = PrivateKeyDer::from_pem_file(&path)
            .map_err(|error| BadCredentials::File { path, error })?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(BadCredentials::Own)?;
        let verifier = match peers {
            Peers::Anybody => WebPkiClientVerifier::no_client_auth(),
            Peers::Verified => verifier(directory, provider)?,
        };
        let mut config = builder
            .with_client_cert_verifier(verifier)
            .with_single_cert(certificates, key)
            .map_err(BadCredentials::Own)?;
        // A client that comes back shows its certificate again: it may have been taken back.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let config = Arc::new(config);
        Ok(Self { config })
    }
}

fn verifier(
    directory: &Path,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, BadCredentials> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(directory.join("ca-cert.pem"))? {
        roots.add(authority).map_err(BadCredentials::Authority)?;
    }
    let revoked = revoked(directory.join("ca-crl.pem"))?;
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .with_crls(revoked)
        .build()
        .map_err(BadCredentials::Verifier)
}

fn certificates(path: PathBuf) -> Result<Vec<CertificateDer<'static>>, BadCredentials> {
    all(&path).map_err(|error| BadCredentials::File { path, error })
}

/// The lists of what was taken back; none if there is no such file.
fn revoked(path: PathBuf) -> Result<Vec<CertificateRevocationListDer<'static>>, BadCredentials> {
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Ok(_) | Err(_) => all(&path).map_err(|error| BadCredentials::File { path, error }),
    }
}

/// All of a kind that are in a file: at least one.
fn all<T: PemObject>(path: &Path) -> Result<Vec<T>, pem::Error> {
    let found = T::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>()?;
    if found.is_empty() {
        return Err(pem::Error::NoItemsFound);
    }
    Ok(found)
}
