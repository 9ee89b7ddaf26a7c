//! Builds the probe kernel, a freestanding ELF, with the compiler that builds this crate and nothing else.
//!
//! Cargo cannot build one package for two targets with different linking, so `rustc` is called here: once for the
//! guest library, once for the probe. Both are always optimised; debug and release embed the same guest.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// The code is freestanding; the target only gives it an ABI and a `core`.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let guest = root.join("guest");
    for path in [
        "build.rs",
        "guest",
        "src/accel.rs",
        "src/report.rs",
        "src/params.rs",
        "src/data.rs",
        "src/disk.rs",
        "src/edu.rs",
        "src/hotplug.rs",
        "src/net.rs",
        "src/ram.rs",
        "src/testdma.rs",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }

    let library = out.join("libwherry_guest_kernel.rlib");
    compile(&guest.join("lib.rs"), &library, |rustc| {
        rustc.args(["--crate-name=wherry_guest_kernel", "--crate-type=rlib"]);
    });
    let probe = out.join("probe.elf");
    compile(&guest.join("probe/main.rs"), &probe, |rustc| {
        rustc.args(["--crate-name=probe", "--crate-type=bin"]);
        rustc.arg(format!("--extern=wherry_guest_kernel={}", library.display()));
        rustc.arg(format!("-Clink-arg=-Wl,-T,{}", guest.join("link.ld").display()));
        for arg in ["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,norelro"] {
            rustc.arg(format!("-Clink-arg={arg}"));
        }
    });
    let size = fs::metadata(&probe).expect("the probe was just built").len();
    assert!(size < 4 << 20, "the probe has {size} bytes: the linker script was not obeyed");
}

fn compile(source: &Path, output: &Path, add: impl FnOnce(&mut Command)) {
    let mut rustc = Command::new(env::var_os("RUSTC").expect("cargo sets RUSTC"));
    rustc
        .args(["--edition=2024", "--target", TARGET])
        .args(["-Cpanic=abort", "-Copt-level=3", "-Ccodegen-units=1", "-Cdebuginfo=0", "-Cstrip=debuginfo"])
        .args(["-Crelocation-model=static", "-Cforce-unwind-tables=no", "-Ctarget-cpu=x86-64"])
        // Paths in panic messages: the same on every machine.
        .arg(format!("--remap-path-prefix={}=wherry-guest", env::var("CARGO_MANIFEST_DIR").expect("set by cargo")))
        .arg("-o")
        .arg(output)
        .arg(source);
    add(&mut rustc);
    let result = rustc.output().unwrap_or_else(|error| panic!("cannot start {rustc:?}: {error}"));
    let messages = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "building the probe guest failed: {rustc:?}\n{messages}");
    for line in messages.lines() {
        println!("cargo::warning={line}");
    }
}
