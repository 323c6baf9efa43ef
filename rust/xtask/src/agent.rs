//! The builds of the native programs in the wheel: the guest agent, which is static, and the keeper.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

const BINARY: &str = "casemate-agent";
/// The wheel carries it and every guest's memory holds it.
const MAX_BYTES: u64 = 5 << 20;

/// How the agent is compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// As it travels in the wheel: small.
    Agent,
    /// For work on the tree: compiled soon, with debug assertions.
    Quick,
}

impl Profile {
    fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Quick => "quick",
        }
    }
}

impl FromStr for Profile {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "agent" => Ok(Self::Agent),
            "quick" => Ok(Self::Quick),
            _ => bail!("profile is {text:?}, agent or quick is expected"),
        }
    }
}

/// Build the keeper for this host and put it into `out`.
///
/// It runs beside the extension on the same host, so it is built as that is, and shares what was compiled for it.
pub fn build_keeper(root: &Path, out: &Path, profile: Profile) -> Result<()> {
    const KEEPER: &str = "casemate-keeper";
    eprintln!("building {KEEPER}");
    let name = if profile == Profile::Quick { "quick" } else { "release" };
    let mut cargo = cargo(root);
    cargo.args([
        "build",
        "--quiet",
        "--locked",
        "--profile",
        name,
        "--package",
        "casemate-shim",
        "--bin",
        KEEPER,
    ]);
    // The wheel carries no symbols. Of this package alone, so that nothing else is compiled twice.
    cargo.args(["--config", &format!("profile.{name}.package.casemate-shim.strip=true")]);
    if !cargo.status().context("running cargo")?.success() {
        bail!("{KEEPER} could not be built");
    }
    place(&target_directory(root).join(name).join(KEEPER), out)
}

/// Build the agent and put it into `out`. With musl where its target is installed, else with the C library linked statically.
pub fn build(root: &Path, out: &Path, profile: Profile) -> Result<()> {
    let machine = std::env::consts::ARCH;
    let musl = format!("{machine}-unknown-linux-musl");
    let (target, flags) = if is_installed(&musl)? {
        (musl, "")
    } else {
        (format!("{machine}-unknown-linux-gnu"), "-C target-feature=+crt-static")
    };
    eprintln!("building {BINARY} for {target}");
    let mut cargo = cargo(root);
    cargo.args([
        "build",
        "--quiet",
        "--locked",
        "--profile",
        profile.name(),
        "--package",
        BINARY,
        "--target",
        &target,
    ]);
    if profile == Profile::Quick {
        // A panic ends the agent here too. Set this way, what runs at build time is shared with the rest of the profile.
        cargo.args(["--config", "profile.quick.panic=\"abort\"", "--config", "profile.quick.strip=true"]);
    }
    if !flags.is_empty() {
        // Per target, so that build scripts and macros stay dynamic.
        let variable = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
        cargo.env(variable, flags);
    }
    if !cargo.status().context("running cargo")?.success() {
        bail!("{BINARY} could not be built for {target}");
    }
    let built = target_directory(root).join(&target).join(profile.name()).join(BINARY);
    check(&built, profile)?;
    place(&built, out)
}

fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root);
    cargo
}

/// Copy a program into `out`, whole at once: the one that is there may be running.
fn place(built: &Path, out: &Path) -> Result<()> {
    fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    let name = built.file_name().context("a program without a name")?;
    let (placed, temporary) = (out.join(name), out.join(format!(".{}.new", name.display())));
    fs::copy(built, &temporary).with_context(|| format!("copying to {}", temporary.display()))?;
    fs::rename(&temporary, &placed).with_context(|| format!("placing {}", placed.display()))?;
    println!("{}", placed.display());
    Ok(())
}

fn target_directory(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}

fn is_installed(target: &str) -> Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", target])
        .output()
        .context("running rustc")?;
    let directory = String::from_utf8_lossy(&output.stdout);
    Ok(output.status.success() && Path::new(directory.trim()).is_dir())
}

/// It must need no loader, and be small.
fn check(path: &Path, profile: Profile) -> Result<()> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    if has_interpreter(&bytes)? {
        bail!("{} is linked dynamically: no guest could run it", path.display());
    }
    let size = bytes.len() as u64;
    if profile == Profile::Agent && size > MAX_BYTES {
        bail!("{} has {size} bytes, more than {MAX_BYTES}", path.display());
    }
    Ok(())
}

/// Whether a 64-bit little-endian ELF file names a loader (a program header of type PT_INTERP).
fn has_interpreter(elf: &[u8]) -> Result<bool> {
    const PT_INTERP: u64 = 3;
    let number = |offset: usize, width: usize| -> Result<u64> {
        let bytes = elf.get(offset..offset + width).context("the file is cut short")?;
        Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    };
    if elf.get(..6) != Some(b"\x7fELF\x02\x01") {
        bail!("not a 64-bit little-endian ELF file");
    }
    let (table, entry_bytes, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    for index in 0..count {
        if number(usize::try_from(table + index * entry_bytes)?, 4)? == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_has_interpreter_when_program_is_dynamic_then_true() {
        let own = fs::read("/proc/self/exe").expect("readable");
        assert!(has_interpreter(&own).expect("an ELF file"));
        assert!(has_interpreter(b"#!/bin/sh").is_err());
        assert!(has_interpreter(&own[..40]).is_err());
    }
}
