//! Which manager is meant.

use anyhow::{Context, bail};
use pgmap_server::control::protocol::{Answer, Kind, Listing, Request};
use pgmap_server::control::{Client, ClientError};

use super::args::Whom;

/// What to do if there is none.
const NONE: &str = "no manager of yours runs: start one with `pgmap serve` or `pgmap run`";
/// The same, where a run is of no help.
const NO_SERVER: &str = "no `pgmap serve` of yours runs: start one";

/// All managers that are meant.
pub(super) fn all(whom: &Whom) -> anyhow::Result<Vec<Client>> {
    match &whom.socket {
        Some(path) => Ok(vec![Client::connect(path)?]),
        None => Ok(Client::all()),
    }
}

/// The one manager that has something of this name.
pub(super) fn with(whom: &Whom, name: &str) -> anyhow::Result<Client> {
    let mut found = Vec::new();
    let managers = all(whom)?;
    if managers.is_empty() {
        bail!(NONE);
    }
    for mut client in managers {
        // A manager that ends just now has nothing of that name.
        if listing(&mut client).is_ok_and(|listing| has(&listing, name)) {
            found.push(client);
        }
    }
    match found.len() {
        0 => bail!("no manager has `{name}`: `pgmap list` shows what there is"),
        1 => Ok(found.remove(0)),
        _ => bail!("{} have `{name}`: choose one with --socket", names(&found)),
    }
}

/// The one manager of this kind; of any kind if that is not said.
pub(super) fn one(whom: &Whom, kind: Option<Kind>) -> anyhow::Result<Client> {
    let mut managers = all(whom)?;
    if whom.socket.is_none() {
        managers.retain(|client| kind.is_none_or(|kind| client.manager().kind == kind));
    }
    match (managers.len(), kind) {
        (0, Some(Kind::Serve)) => bail!(NO_SERVER),
        (0, Some(Kind::Run) | None) => bail!(NONE),
        (1, _) => Ok(managers.remove(0)),
        _ => bail!(
            "there are several managers ({}): choose one with --socket",
            names(&managers)
        ),
    }
}

/// What a manager has.
pub(super) fn listing(client: &mut Client) -> anyhow::Result<Listing> {
    let answer = client.ask(&Request::List)?;
    if let Answer::Listing(listing) = answer {
        return Ok(listing);
    }
    Err(unexpected(&answer))
}

/// The manager has answered something else than was asked.
pub(super) fn unexpected(answer: &Answer) -> anyhow::Error {
    anyhow::anyhow!("the manager answered something else than was asked: {answer:?}")
}

fn has(listing: &Listing, name: &str) -> bool {
    let regions = &listing.regions;
    let mut namespaces = regions.iter().flat_map(|region| &region.namespaces);
    namespaces.any(|namespace| namespace.is_called(name))
        || regions.iter().any(|region| region.dev == name)
        || listing.devices.iter().any(|device| device.dev == name)
}

fn names(clients: &[Client]) -> String {
    let mut names = Vec::new();
    for client in clients {
        let manager = client.manager();
        let verb = match manager.kind {
            Kind::Serve => "serve",
            Kind::Run => "run",
        };
        names.push(format!("{verb}-{}", manager.pid));
    }
    names.join(", ")
}

/// Asks; `what` says what could not be done if it is refused.
pub(super) fn ask(client: &mut Client, request: &Request, what: &str) -> anyhow::Result<Answer> {
    let answer = client.ask(request).map_err(|error| {
        if let ClientError::Refused(failure) = error {
            super::refused(&failure)
        } else {
            error.into()
        }
    });
    answer.with_context(|| what.to_owned())
}
