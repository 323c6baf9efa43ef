//! Commands of the workspace: `cargo run -p xtask -- proto [--check]`, `cargo run -p xtask -- agent --out DIR`, `… keeper …`.

mod agent;
#[cfg(feature = "proto")]
mod proto;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::agent::Profile;

const USAGE: &str =
    "usage: cargo run -p xtask -- proto [--check] | agent|keeper --out DIR [--profile agent|quick]";

/// Root of the workspace, whatever the current directory is.
fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn run(arguments: &[&str]) -> Result<()> {
    match arguments {
        #[cfg(feature = "proto")]
        ["proto"] => proto::generate(&workspace_root()),
        #[cfg(feature = "proto")]
        ["proto", "--check"] => proto::check(&workspace_root()),
        ["agent", "--out", out] => agent::build(&workspace_root(), Path::new(out), Profile::Agent),
        ["agent", "--out", out, "--profile", profile] => {
            agent::build(&workspace_root(), Path::new(out), profile.parse()?)
        }
        ["keeper", "--out", out] => agent::build_keeper(&workspace_root(), Path::new(out), Profile::Agent),
        ["keeper", "--out", out, "--profile", profile] => {
            agent::build_keeper(&workspace_root(), Path::new(out), profile.parse()?)
        }
        _ => bail!("{USAGE}"),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
