//! Builds and locates the programs that the walk starts: the coordinator and the three services.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, bail};
use tokio::process::Command;

/// The folder of the programs.
#[derive(Debug, Clone)]
pub(crate) struct Binaries {
    folder: PathBuf,
}

/// Prefixes of the environment variables with which cargo describes the running package.
const ABOUT_THIS_PACKAGE: [&[u8]; 3] = [b"CARGO_PKG_", b"CARGO_MANIFEST_", b"OUT_DIR"];

const PROGRAMS: [&str; 4] = ["handfast", "order", "inventory", "points"];

impl Binaries {
    /// Builds the programs that are missing or outdated, with the same cargo and target folder as this program. Cargo shows its
    /// progress on stderr.
    pub(crate) async fn build() -> anyhow::Result<Self> {
        let this = env::current_exe().context("cannot tell where this program is")?;
        let folder = this.parent().context("this program is in no folder")?.to_owned();
        if let Some(cargo) = env::var_os("CARGO") {
            build(&cargo, &folder).await?;
        }
        let binaries = Self { folder };
        for program in PROGRAMS {
            if !binaries.path(program).is_file() {
                let folder = binaries.folder.display();
                bail!(
                    "there is no program `{program}` in {folder}: start the shop with `cargo shop`, which builds it"
                );
            }
        }
        Ok(binaries)
    }

    pub(crate) fn path(&self, program: &str) -> PathBuf {
        self.folder.join(program)
    }
}

async fn build(cargo: &OsStr, folder: &Path) -> anyhow::Result<()> {
    // The folders target/debug and target/release belong to the profiles `dev` and `release`. Other folders have their profile's
    // name.
    let profile = match folder.file_name().and_then(OsStr::to_str) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let target = folder.parent().context("this program is not where cargo puts programs")?;
    let mut command = Command::new(cargo);
    command
        .args(["build", "--profile", profile])
        .args(["--package", "handfast-coordinator", "--bin", "handfast"])
        .args(["--package", "handfast-shop", "--bin", "order", "--bin", "inventory"])
        .args(["--bin", "points", "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    // `cargo run` sets variables about this package. Build scripts that read them would run again, and all dependents would be
    // rebuilt. So remove the variables.
    for (name, _) in env::vars_os() {
        if ABOUT_THIS_PACKAGE.iter().any(|start| name.as_encoded_bytes().starts_with(start)) {
            command.env_remove(name);
        }
    }
    let status = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await
        .with_context(|| format!("cannot run {}", cargo.display()))?;
    if !status.success() {
        bail!("the coordinator or a service cannot be built: see above");
    }
    Ok(())
}
