//! The verbs that ask a running manager over its control socket: `pgmap list`, `unplug`, `memory` and so on.
//!
//! Here is which request each makes, and what is shown of the answer. A refusal is one line that says why, and a line for
//! each who stands in the way.

pub(crate) mod args;
mod find;
mod map;
pub(crate) mod show;
mod top;

use core::time::Duration;
use std::process::ExitCode;

use pgmap_server::control::Client;
use pgmap_server::control::protocol::{Answer, CreateNamespace, Failure, Kind, Listing, Request};
use serde_json::{Value, json};

use crate::output;
use args::{
    CreateArgs, DestroyArgs, HoldersArgs, IomemArgs, ListArgs, MemoryAction, MemoryArgs, ScrubArgs,
    Verb, Whom,
};

/// Does what a verb asks for.
pub(crate) fn ask(verb: Verb) -> anyhow::Result<ExitCode> {
    let done = match verb {
        Verb::List(args) => list(&args),
        Verb::Iomem(args) => iomem(&args),
        Verb::Holders(args) => holders(&args),
        Verb::Top(args) => return top::top(&args),
        Verb::Map(args) => return map::map(&args),
        Verb::CreateNamespace(args) => create(args),
        Verb::DestroyNamespace(args) => destroy(&args),
        Verb::Enable(args) => {
            let namespace = args.namespace.clone();
            tell_of(
                &args.whom,
                &args.namespace,
                "enable",
                &Request::Enable { namespace },
            )
        }
        Verb::Disable(args) => disable(&args.whom, &args.namespace, args.patience.timeout),
        Verb::Plug(args) => plug(&args.whom, args.spec),
        Verb::Unplug(args) => {
            let request = Request::Unplug {
                device: args.device.clone(),
                timeout_ms: ms(args.patience.timeout),
            };
            tell_of(&args.whom, &args.device, "unplug", &request)
        }
        Verb::InjectError(args) => {
            let request = Request::InjectError {
                namespace: args.namespace.clone(),
                block: args.block,
                count: args.count,
            };
            tell_of(
                &args.whom,
                &args.namespace,
                "inject an error into",
                &request,
            )
        }
        Verb::ClearError(args) => {
            let request = Request::ClearError {
                namespace: args.namespace.clone(),
                block: args.block,
                count: args.count,
            };
            tell_of(&args.whom, &args.namespace, "clear errors of", &request)
        }
        Verb::Scrub(args) => scrub(&args),
        Verb::Memory(args) => memory(&args),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// The refusal in one line, and a line for each who stands in the way.
fn refused(failure: &Failure) -> anyhow::Error {
    if failure.holders.is_empty() {
        return anyhow::anyhow!("{}", failure.message);
    }
    let mut text = failure.message.clone();
    for line in show::holders(&failure.holders).lines() {
        text += "\n  ";
        text += line;
    }
    anyhow::anyhow!(text)
}

fn ms(time: Option<Duration>) -> Option<u64> {
    time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// Asks the manager that has a thing to do something to it, and says nothing if it did.
fn tell_of(whom: &Whom, name: &str, verb: &str, request: &Request) -> anyhow::Result<()> {
    let mut client = find::with(whom, name)?;
    find::ask(&mut client, request, &format!("cannot {verb} {name}")).map(drop)
}

fn disable(whom: &Whom, namespace: &str, timeout: Option<Duration>) -> anyhow::Result<()> {
    let request = Request::Disable {
        namespace: namespace.to_owned(),
        timeout_ms: ms(timeout),
    };
    tell_of(whom, namespace, "disable", &request)
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let (mut text, mut json) = (String::new(), Vec::new());
    let managers = find::all(&args.whom)?;
    let none = managers.is_empty();
    for mut client in managers {
        let Ok(mut listing) = find::listing(&mut client) else {
            // It ended between two lines.
            continue;
        };
        choose(args, &mut listing);
        as_json(args, &listing, &mut json)?;
        // Who has nothing of what was asked for is not named.
        if args.is_all() || !(listing.regions.is_empty() && listing.devices.is_empty()) {
            text += &show::listing(client.manager(), &listing);
        }
    }
    if args.json {
        text = format!("{:#}\n", Value::Array(json));
    } else if none {
        output::tell("pgmap: no manager of yours runs\n");
    } else if text.is_empty() {
        output::tell("pgmap: nothing of that kind: `pgmap list` shows all that there is\n");
    }
    output::print(text.as_bytes())
}

/// Leaves out what was not asked for.
fn choose(args: &ListArgs, listing: &mut Listing) {
    let anything = args.is_all();
    if !(args.devices || anything) {
        listing.devices.clear();
    }
    if !(args.namespaces || args.regions || anything) {
        listing.regions.clear();
    }
    for region in &mut listing.regions {
        if args.regions && !args.namespaces {
            region.namespaces.clear();
        }
        if !args.media_errors {
            for namespace in &mut region.namespaces {
                namespace.badblocks.clear();
            }
        }
    }
}

/// Namespaces by themselves, unless regions were asked for, as ndctl does it.
fn as_json(args: &ListArgs, listing: &Listing, json: &mut Vec<Value>) -> anyhow::Result<()> {
    for region in &listing.regions {
        if args.regions {
            json.push(serde_json::to_value(region)?);
            continue;
        }
        for namespace in &region.namespaces {
            json.push(serde_json::to_value(namespace)?);
        }
    }
    for device in &listing.devices {
        json.push(serde_json::to_value(device)?);
    }
    Ok(())
}

fn iomem(args: &IomemArgs) -> anyhow::Result<()> {
    let (mut text, mut json) = (String::new(), Vec::new());
    for mut client in find::all(&args.whom)? {
        let resources = match client.ask(&Request::Iomem) {
            Ok(Answer::Iomem(resources)) => resources,
            Ok(answer) => return Err(find::unexpected(&answer)),
            Err(error) if args.whom.socket.is_some() => return Err(error.into()),
            // It ended between two lines.
            Err(_) => continue,
        };
        let manager = client.manager();
        text += &show::manager(manager);
        text += "\n";
        text += &show::iomem(&resources);
        json.push(json!({ "kind": manager.kind, "pid": manager.pid, "resources": resources }));
    }
    if args.json {
        text = format!("{:#}\n", Value::Array(json));
    }
    output::print(text.as_bytes())
}

fn holders(args: &HoldersArgs) -> anyhow::Result<()> {
    let mut client = find::with(&args.whom, &args.device)?;
    let device = args.device.clone();
    let what = format!("cannot say who holds {device}");
    let answer = find::ask(&mut client, &Request::Holders { device }, &what)?;
    let Answer::Holders(holders) = answer else {
        return Err(find::unexpected(&answer));
    };
    if args.json {
        return output::print(format!("{:#}\n", json!(holders)).as_bytes());
    }
    if holders.is_empty() {
        return output::print(format!("nobody holds {}\n", args.device).as_bytes());
    }
    output::print(show::holders(&holders).as_bytes())
}

fn create(args: CreateArgs) -> anyhow::Result<()> {
    let mut client = match &args.region {
        Some(region) => find::with(&args.whom, region)?,
        None => find::one(&args.whom, Some(Kind::Serve))?,
    };
    let request = Request::CreateNamespace(CreateNamespace {
        region: args.region,
        mode: args.mode,
        size: args.size,
        align: args.align,
        map: args.map,
        name: args.name,
    });
    let answer = find::ask(&mut client, &request, "cannot create the namespace")?;
    let Answer::Namespace(namespace) = answer else {
        return Err(find::unexpected(&answer));
    };
    let text = if args.json {
        format!("{:#}\n", json!(namespace))
    } else {
        format!("{}\n", show::namespace(&namespace, namespace.metadata_size))
    };
    output::print(text.as_bytes())
}

fn destroy(args: &DestroyArgs) -> anyhow::Result<()> {
    if args.force {
        disable(&args.whom, &args.namespace, args.patience.timeout)?;
    }
    let namespace = args.namespace.clone();
    let request = Request::DestroyNamespace { namespace };
    tell_of(&args.whom, &args.namespace, "destroy", &request)
}

fn plug(whom: &Whom, spec: String) -> anyhow::Result<()> {
    let mut client = find::one(whom, None)?;
    let what = format!("cannot add {spec}");
    let answer = find::ask(&mut client, &Request::Plug { spec }, &what)?;
    let Answer::Name(name) = answer else {
        return Err(find::unexpected(&answer));
    };
    output::print(format!("{name}\n").as_bytes())
}

fn scrub(args: &ScrubArgs) -> anyhow::Result<()> {
    let mut client = match &args.namespace {
        Some(namespace) => find::with(&args.whom, namespace)?,
        None => find::one(&args.whom, Some(Kind::Serve))?,
    };
    let request = Request::Scrub {
        namespace: args.namespace.clone(),
        wait: args.wait,
    };
    let answer = find::ask(&mut client, &request, "cannot scrub")?;
    let Answer::Scrub(scrub) = answer else {
        return Err(find::unexpected(&answer));
    };
    let state = if scrub.complete { "done" } else { "under way" };
    let text = format!("{state}: {} bad blocks\n", scrub.badblock_count);
    output::print(text.as_bytes())
}

fn memory(args: &MemoryArgs) -> anyhow::Result<()> {
    let mut client: Client = find::one(&args.whom, None)?;
    match &args.action {
        Some(MemoryAction::Online { block, zone }) => {
            let request = Request::Online {
                block: *block,
                zone: (*zone).into(),
            };
            let what = format!("cannot take block {block} on line");
            find::ask(&mut client, &request, &what).map(drop)
        }
        Some(MemoryAction::Offline { block, patience }) => {
            let request = Request::Offline {
                block: *block,
                timeout_ms: ms(patience.timeout),
            };
            let what = format!("cannot take block {block} off line");
            find::ask(&mut client, &request, &what).map(drop)
        }
        None => {
            let answer = find::ask(&mut client, &Request::Memory, "cannot list blocks")?;
            let Answer::Memory(memory) = answer else {
                return Err(find::unexpected(&answer));
            };
            if args.json {
                return output::print(format!("{:#}\n", json!(memory)).as_bytes());
            }
            output::print(show::memory(&memory).as_bytes())
        }
    }
}
