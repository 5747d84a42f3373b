//! `pgmap serve`.
use std::process::ExitCode;

use crate::args::ServeArgs;

pub(crate) fn serve(_args: &ServeArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("nothing to serve yet")
}
