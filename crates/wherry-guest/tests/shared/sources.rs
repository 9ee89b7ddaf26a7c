//! The guest's sources, which `cargo fmt` and `cargo clippy` do not see because cargo does not compile them.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};

const GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/guest");

/// Runs a tool of the toolchain. `None` where it is not installed.
fn run<S: AsRef<OsStr>>(tool: &str, arguments: impl IntoIterator<Item = S>) -> Option<Output> {
    let workspace = Path::new(GUEST).ancestors().nth(3).unwrap();
    let output = Command::new(tool).args(arguments).current_dir(GUEST).env("CLIPPY_CONF_DIR", workspace).output();
    match output {
        // rustup's stand-in for a component that is not there says so.
        Ok(output) if String::from_utf8_lossy(&output.stderr).contains("is not installed for the toolchain") => None,
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => panic!("cannot start {tool}: {error}"),
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn the_guest_is_formatted_like_the_rest() {
    let Some(output) = run("rustfmt", ["--edition=2024", "--check", "lib.rs", "probe/main.rs"]) else {
        println!("SKIPPED: rustfmt is not installed");
        return;
    };
    assert!(output.status.success(), "run rustfmt on the guest:\n{}", text(&output));
}

#[test]
fn the_guest_has_no_lint() {
    let directory = tempfile::tempdir().unwrap();
    let library = directory.path().join("libwherry_guest_kernel.rlib");
    let common = ["--edition=2024", "-Cpanic=abort", "-Dwarnings", "-Dclippy::undocumented_unsafe_blocks"];
    let lint = ["-Dclippy::unwrap_used", "-o"];
    let build = ["lib.rs", "--crate-name=wherry_guest_kernel", "--crate-type=rlib"].into_iter().chain(common);
    let Some(output) = run("clippy-driver", build.chain(lint).map(OsStr::new).chain([library.as_os_str()])) else {
        println!("SKIPPED: clippy is not installed");
        return;
    };
    assert!(output.status.success(), "{}", text(&output));
    let library = format!("--extern=wherry_guest_kernel={}", library.display());
    let metadata = directory.path().join("probe.rmeta");
    let build = ["probe/main.rs", "--crate-name=probe", "--crate-type=bin", "--emit=metadata", &library];
    let arguments = build.into_iter().chain(common).chain(lint).map(OsStr::new).chain([metadata.as_os_str()]);
    let output = run("clippy-driver", arguments).unwrap();
    assert!(output.status.success(), "{}", text(&output));
}
