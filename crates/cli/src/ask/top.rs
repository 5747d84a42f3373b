//! `pgmap top`: what happens now, in all managers.

use core::fmt::Write as _;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use pgmap_server::control::protocol::{Answer, Counters, Request};

use super::args::TopArgs;
use super::{find, show};
use crate::output::{self, Reader};

/// Numbers that only grow, by manager, thing and name.
type Seen = BTreeMap<(u32, String, String), u64>;

pub(super) fn top(args: &TopArgs) -> anyhow::Result<ExitCode> {
    let mut before = Seen::new();
    let mut looked = Instant::now();
    let mut left = args.count;
    loop {
        let elapsed = looked.elapsed().as_secs_f64();
        looked = Instant::now();
        let (seen, text) = look(args, &before, elapsed)?;
        if output::print_on(text.as_bytes())? == Reader::Gone {
            return Ok(ExitCode::SUCCESS);
        }
        before = seen;
        left = left.map(|left| left.saturating_sub(1));
        if left == Some(0) {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(args.interval);
    }
}

/// The lines for one look, with rates since the one before.
fn look(args: &TopArgs, before: &Seen, elapsed: f64) -> anyhow::Result<(Seen, String)> {
    let (mut seen, mut text) = (Seen::new(), String::new());
    for mut client in find::all(&args.whom)? {
        let manager = client.manager().clone();
        // It may end between two looks.
        let Ok(Answer::Counters(all)) = client.ask(&Request::Counters) else {
            continue;
        };
        let _ = writeln!(text, "{}", show::manager(&manager));
        for counters in all {
            let _ = writeln!(text, "  {}", line(&counters, manager.pid, before, elapsed));
            for (name, count) in counters.counters {
                seen.insert((manager.pid, counters.of.clone(), name), count);
            }
        }
    }
    if text.is_empty() {
        text = "no manager of yours runs\n".into();
    }
    Ok((seen, text))
}

fn line(counters: &Counters, pid: u32, before: &Seen, elapsed: f64) -> String {
    let mut text = format!("{:12}", counters.of);
    for (name, value) in &counters.gauges {
        let value = match name.strip_suffix("_bytes") {
            Some(_) => show::bytes(*value),
            None => value.to_string(),
        };
        let name = name.strip_suffix("_bytes").unwrap_or(name);
        let _ = write!(text, "  {name} {value}");
    }
    for (name, count) in &counters.counters {
        let key = (pid, counters.of.clone(), name.clone());
        // The first look has nothing to compare with, and shows sums.
        let Some(old) = before.get(&key) else {
            if *count > 0 {
                let _ = write!(text, "  {name} {count}");
            }
            continue;
        };
        #[allow(
            clippy::cast_precision_loss,
            reason = "a rate is shown without digits after the point"
        )]
        let rate = count.saturating_sub(*old) as f64 / elapsed.max(0.001);
        if rate > 0.0 {
            let _ = write!(text, "  {name} {rate:.0}/s");
        }
    }
    text
}
