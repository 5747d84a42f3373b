//! `pgmap serve`: regions as block devices and as direct memory, until a signal ends it.
//!
//! Here are the options, the sockets and the end; what is served is [`Service`]. What must never happen here: an end that
//! loses what a client was told is done.

mod complaints;
mod old_pins;

use core::fmt::Write as _;
use core::net::SocketAddr;
use core::time::Duration;
use std::fs;
use std::net::{TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail, ensure};
use pgmap_server::control::protocol::{Answer, Kind, Namespace, Region, Request};
use pgmap_server::control::{Client, Listener, place};
use pgmap_server::nbd::{self, Credentials, Exports, Limits, Peers, Security, Stopped};
use pgmap_server::service::{Metrics, PmemSpec, Service, Uri};
use serde::{Deserialize, Deserializer};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{ServeArgs, Tls};
use crate::ask::show;
use crate::output;
use complaints::Complaints;
use old_pins::OldPins;

/// How long clients have at the end to take the replies that they wait for.
const LAST_REPLIES: Duration = Duration::from_secs(10);
/// When a pin is old if nobody says so.
const OLD_PINS: Duration = Duration::from_mins(10);

/// The options, wherever they come from: the fields of the configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Options {
    #[serde(deserialize_with = "one_or_more")]
    pmem: Vec<String>,
    #[serde(deserialize_with = "one_or_more")]
    nbd: Vec<String>,
    socket: Option<PathBuf>,
    metrics: Option<String>,
    #[serde(deserialize_with = "time")]
    old_pins: Option<Duration>,
    tls: Tls,
    tls_certificates: Option<PathBuf>,
    tls_verify_peer: bool,
    quiet: bool,
}

/// A text, or a list of texts.
fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a text or a list of texts")]
    enum OneOrMore {
        One(String),
        More(Vec<String>),
    }
    Ok(match OneOrMore::deserialize(deserializer)? {
        OneOrMore::One(text) => vec![text],
        OneOrMore::More(texts) => texts,
    })
}

/// A time, as on the command line.
fn time<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let time = humantime::parse_duration(&text);
    time.map(Some).map_err(serde::de::Error::custom)
}

pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let options = Options::new(args)?;
    ensure!(
        !options.pmem.is_empty(),
        "nothing to serve: give at least one --pmem, such as --pmem disk.img,size=1G"
    );
    let security = options.security()?;
    // Before there are threads: none of them is to die of a signal that we wait for.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("cannot wait for signals")?;
    let regions = options.regions()?;
    let service = Service::new()?;
    let nbd = nbd::Server::new(
        Arc::clone(&service) as Arc<dyn Exports>,
        Limits::default(),
        security,
    )?;
    let complaints = Complaints::new();
    if !options.quiet {
        let complaints = Arc::clone(&complaints);
        nbd.report_ends(move |client, end| complaints.hear(client, end));
    }
    let control = control_path(&options)?;
    let (fronts, sockets) = Fronts::bind(&options, &control)?;
    service.set_nbd(nbd.clone(), fronts.uris());
    // Nobody is served before nothing can fail any more: what is made until then can be taken back.
    let started = start(&service, &options, &regions, &control);
    let (metrics, listener) = started.inspect_err(|_| service.give_up())?;
    for socket in sockets {
        nbd.serve(socket).context("NBD clients cannot be served")?;
    }
    if !options.quiet {
        announce(&control, metrics.as_ref())?;
    }
    let old_pins = options.watch_pins(&service)?;
    signals.forever().next();
    // Another one ends us at once: who sends it does not want to wait for the clients' last replies.
    std::thread::spawn(move || {
        for signal in signals.forever() {
            // It is one of the three above, which all end a process.
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
    drop(old_pins);
    // Before their connections end, and with them what they hold.
    for line in service.holders() {
        output::tell(format_args!("pgmap: still held at the end: {line}\n"));
    }
    drop((metrics, listener));
    let ended = end(&service, &nbd, fronts);
    complaints.finish();
    ended
}

/// All that may fail at the start, the sockets of those who ask at last.
fn start(
    service: &Arc<Service>,
    options: &Options,
    regions: &[PmemSpec],
    control: &Path,
) -> anyhow::Result<(Option<Metrics>, Listener)> {
    for spec in regions {
        let plugged = service.plug(spec);
        plugged.map_err(|error| anyhow!("--pmem {spec}: {error}"))?;
    }
    let metrics = options.metrics.as_deref();
    let metrics = metrics.map(|address| self::metrics(address, service));
    let metrics = metrics.transpose()?;
    let listener = Listener::start(control, Arc::clone(service) as _)
        .with_context(|| format!("cannot listen at {}", control.display()))?;
    Ok((metrics, listener))
}

/// Answers what is under way, makes everything durable, and goes.
fn end(service: &Service, nbd: &nbd::Server, fronts: Fronts) -> anyhow::Result<ExitCode> {
    if let Stopped::Left(clients) = nbd.stop(LAST_REPLIES) {
        output::tell(format_args!(
            "pgmap: {clients} clients have not taken their last replies\n"
        ));
    }
    drop(fronts);
    if let Err(failed) = service.flush() {
        let failed = failed
            .iter()
            .map(|(name, error)| format!("{name}: {error}"));
        bail!(
            "what was written last may be lost: {}",
            failed.collect::<Vec<_>>().join("; ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

impl Options {
    /// Those of the file, and those of the command line on top.
    fn new(args: &ServeArgs) -> anyhow::Result<Self> {
        let mut options = match &args.config {
            Some(path) => Self::read(path)?,
            None => Self::default(),
        };
        options.pmem.extend(args.regions.iter().cloned());
        options.nbd.extend(args.nbd.iter().cloned());
        options.socket = args.socket.clone().or(options.socket);
        options.metrics = args.metrics.clone().or(options.metrics);
        options.old_pins = args.old_pins.or(options.old_pins);
        options.tls = args.tls.unwrap_or(options.tls);
        options.tls_certificates = args.tls_certificates.clone().or(options.tls_certificates);
        options.tls_verify_peer |= args.tls_verify_peer;
        options.quiet |= args.quiet;
        Ok(options)
    }

    fn watch_pins(&self, service: &Arc<Service>) -> anyhow::Result<Option<OldPins>> {
        let limit = self.old_pins.unwrap_or(OLD_PINS);
        let is_wanted = !self.quiet && !limit.is_zero();
        let watch = is_wanted.then(|| OldPins::watch(service, limit));
        watch.transpose()
    }

    fn regions(&self) -> anyhow::Result<Vec<PmemSpec>> {
        let parsed = self.pmem.iter().map(|spec| {
            let parsed = spec.parse();
            parsed.map_err(|error| anyhow!("--pmem {spec}: {error}"))
        });
        parsed.collect()
    }

    fn peers(&self) -> Peers {
        if self.tls_verify_peer {
            Peers::Verified
        } else {
            Peers::Anybody
        }
    }

    fn security(&self) -> anyhow::Result<Security> {
        let security = match self.tls {
            Tls::Off => {
                // Whoever gives these means to be safe.
                ensure!(
                    self.tls_certificates.is_none() && !self.tls_verify_peer,
                    "TLS is off: give --tls require, or --tls on if clients may do without"
                );
                return Ok(Security::Plain);
            }
            Tls::On => Security::Offered,
            Tls::Require => Security::Required,
        };
        let directory = self
            .tls_certificates
            .as_deref()
            .context("TLS needs a certificate: name its directory with --tls-certificates")?;
        Ok(security(Credentials::read(directory, self.peers())?))
    }

    /// Who may reach us by TCP. NBD has no passwords: who is not on this machine shows a certificate.
    fn reach(&self) -> Reach {
        match (self.tls, self.peers()) {
            (Tls::Require, Peers::Verified) => Reach::Anywhere,
            (Tls::Require, Peers::Anybody) | (Tls::On | Tls::Off, _) => Reach::ThisMachine,
        }
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).map_err(|error| {
            // The first line says where, the others show it.
            let text = error.to_string();
            let line: Vec<_> = text.lines().map(str::trim).collect();
            anyhow!("{}: {}", path.display(), line.join(" "))
        })
    }
}

fn control_path(options: &Options) -> anyhow::Result<PathBuf> {
    if let Some(path) = &options.socket {
        return Ok(path.clone());
    }
    let directory = place::directory();
    place::prepare(&directory).with_context(|| {
        format!(
            "cannot use {} for sockets: name one with --socket",
            directory.display()
        )
    })?;
    Ok(place::own(&directory, Kind::Serve))
}

/// Where TCP clients may be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reach {
    ThisMachine,
    Anywhere,
}

/// The sockets of NBD clients.
#[derive(Debug, Default)]
struct Fronts {
    unix: Vec<PathBuf>,
    tcp: Vec<SocketAddr>,
    /// How URIs begin: `nbds` if clients have to speak TLS.
    scheme: &'static str,
}

impl Fronts {
    /// Takes the addresses. Who connects waits until somebody serves there.
    fn bind(options: &Options, control: &Path) -> anyhow::Result<(Self, Vec<nbd::Listener>)> {
        let scheme = match options.tls {
            Tls::Require => "nbds",
            Tls::On | Tls::Off => "nbd",
        };
        let mut fronts = Self {
            scheme,
            unix: Vec::new(),
            tcp: Vec::new(),
        };
        let beside = format!("unix:{}", control.with_extension("nbd").display());
        let places = match options.nbd.as_slice() {
            [] => vec![beside],
            given => given.to_vec(),
        };
        let mut sockets = Vec::new();
        for place in places {
            let cannot = || format!("NBD clients cannot be served at {place}");
            let listener = if let Some(path) = place.strip_prefix("unix:") {
                let path = std::path::absolute(path)?;
                let listener = pgmap_server::unix::listen(&path).with_context(cannot)?;
                fronts.unix.push(path);
                nbd::Listener::Unix(listener)
            } else {
                let listener =
                    TcpListener::bind(tcp(&place, options.reach())?).with_context(cannot)?;
                fronts.tcp.push(listener.local_addr()?);
                nbd::Listener::Tcp(listener)
            };
            sockets.push(listener);
        }
        Ok((fronts, sockets))
    }

    fn uris(&self) -> Vec<Uri> {
        let scheme = self.scheme;
        let unix = self.unix.iter().map(|path| Uri {
            before: format!("{scheme}+unix:///"),
            after: format!("?socket={}", path.display()),
        });
        let tcp = self.tcp.iter().map(|address| Uri {
            before: format!("{scheme}://{address}/"),
            after: String::new(),
        });
        unix.chain(tcp).collect()
    }
}

impl Drop for Fronts {
    fn drop(&mut self) {
        for path in &self.unix {
            // Whoever removed it before has done our work.
            let _ = fs::remove_file(path);
        }
    }
}

/// An address that nobody reaches who may not.
fn tcp(place: &str, reach: Reach) -> anyhow::Result<SocketAddr> {
    let usage =
        || format!("`{place}` is no place for NBD clients: write unix:PATH or 127.0.0.1:10809");
    let mut addresses = place.to_socket_addrs().with_context(usage)?;
    let address = addresses.next().with_context(usage)?;
    ensure!(
        reach == Reach::Anywhere || address.ip().is_loopback(),
        "{place} can be reached from other machines, and NBD knows no passwords: use 127.0.0.1, or --tls require with --tls-verify-peer"
    );
    Ok(address)
}

fn metrics(address: &str, service: &Arc<Service>) -> anyhow::Result<Metrics> {
    let usage = || format!("metrics cannot be served at {address}: write 127.0.0.1:9464");
    let mut addresses = address.to_socket_addrs().with_context(usage)?;
    let first = addresses.next().with_context(usage)?;
    Metrics::serve(first, service).with_context(|| format!("metrics cannot be served at {address}"))
}

/// What is served and how it is found, as the control socket tells it.
fn namespaces(region: &Region) -> impl Iterator<Item = &Namespace> {
    region.namespaces.iter()
}

fn announce(control: &Path, metrics: Option<&Metrics>) -> anyhow::Result<()> {
    let mut client = Client::connect(control)?;
    let Answer::Listing(listing) = client.ask(&Request::List)? else {
        bail!("no listing");
    };
    let mut text = String::new();
    let in_region = |region| namespaces(region).map(move |namespace| (region, namespace));
    for (region, namespace) in listing.regions.iter().flat_map(in_region) {
        // Of a namespace that has its region to itself, all of the region's metadata is its own.
        let metadata = match namespaces(region).count() {
            1 => show::region_metadata(region),
            _ => namespace.metadata_size,
        };
        let _ = writeln!(text, "{}", show::namespace(namespace, metadata));
        for uri in namespace.uris() {
            let _ = writeln!(text, "  {uri}");
        }
        if namespace.map.is_some() && namespace.state == "enabled" {
            let _ = writeln!(text, "  direct: pgmap map {}", namespace.device());
        }
    }
    if let Some(metrics) = metrics {
        let _ = writeln!(text, "metrics: http://{}/metrics", metrics.address()?);
    }
    let _ = writeln!(text, "control: {}", control.display());
    output::print(text.as_bytes())
}
