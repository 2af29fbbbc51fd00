//! `cargo xtask`: development tasks. It leaves out everything but reading the command line.

use std::process::ExitCode;

use anyhow::{Result, bail};
use xtask::{cache, cargo_fuzz, machine::Machine, minio, roots};

const USAGE: &str = "\
usage: cargo xtask TASK
  bed build     build the LVM test machine if its inputs changed, and print where it is
  bed shell     boot the test machine and open a shell in it; its disks are gone afterwards
  minio build   build MinIO if its version changed, and print where it is
  roots build   build the Debian roots that benchmarks copy, and print where they are
  cargo-fuzz build
                build cargo-fuzz if its version changed, and print the directory of its program
  cache         print where built things are kept (TEST_BED_CACHE sets it)";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match perform(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(arguments: &[&str]) -> Result<()> {
    match arguments {
        ["bed", "build"] => println!("{}", Machine::ensure()?.directory().display()),
        ["bed", "shell"] => shell()?,
        ["minio", "build"] => println!("{}", minio::ensure()?.join("minio").display()),
        ["roots", "build"] => {
            for root in [roots::SMALL, roots::LARGE] {
                println!("{}", roots::ensure(root)?.path(roots::Kind::Raw).display());
            }
        }
        ["cargo-fuzz", "build"] => println!("{}", cargo_fuzz::ensure()?.join("bin").display()),
        ["cache"] => println!("{}", cache::root()?.display()),
        _ => bail!("no such task\n{USAGE}"),
    }
    Ok(())
}

fn shell() -> Result<()> {
    let machine = Machine::ensure()?;
    let scratch = cache::scratch("shell")?;
    println!("booting; the console's log is {}", machine.console(scratch.path()).display());
    let running = machine.boot(scratch.path())?;
    // Whatever the last command in the shell returned is its user's business.
    running.ssh().arg("-t").arg("bash -l").status()?;
    running.power_off()
}
