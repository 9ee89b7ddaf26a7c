//! `wherry accel` as its user sees it: the example of the documents, moves, and jobs that are wrong.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/examples/accel-job.toml")
}

fn wherry(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wherry")).arg("accel").args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Runs a job given as text: exit status, answer, errors.
fn job(text: &str, more: &[&str]) -> (i32, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("job.toml");
    std::fs::write(&path, text).unwrap();
    let output = wherry(&[&["run", path.to_str().unwrap()], more].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn the_example_of_the_documents_runs_on_any_number_of_workers_and_with_a_move() {
    let example = example();
    let path = example.to_str().unwrap();
    for more in [&["--workers", "1"][..], &["--workers", "3"], &["--move-to", "1"], &["--move-to", "7"]] {
        let output = wherry(&[&["run", path, "--json"], more].concat());
        assert_eq!(output.status.code(), Some(0), "{more:?}: {output:?}");
        let answer = json(&output);
        assert_eq!((&answer["good"], answer["steps"].as_array().unwrap().len()), (&Value::Bool(true), 7));
        assert_eq!(answer["moved_bytes"].as_u64().is_some(), more[0] == "--move-to");
        let submitted = |context: usize| {
            let slots = answer["contexts"][context]["slots"].as_array().unwrap().iter();
            slots.map(|slot| slot["completed"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!((submitted(0), submitted(1)), (vec![2, 3, 1, 0], vec![1]), "{more:?}");
        assert_eq!(answer["contexts"][0]["slots"][0]["engines"], "balance(compress0 compress1)");
    }
    let output = wherry(&["run", path]);
    let text = String::from_utf8(output.stdout).unwrap();
    for word in ["add up", "EBADMSG, as expected", "sums (priority -10)", "compress1", "7 steps in"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn engines_are_listed_with_their_workers_and_operations() {
    let answer = json(&wherry(&["engines", "--workers", "2", "--json"]));
    let engines = answer.as_array().unwrap();
    assert_eq!(engines.len(), 7);
    assert_eq!((&engines[1]["engine"], &engines[1]["worker"]), (&Value::from("copy1"), &Value::from(1)));
    assert!(engines[5]["operations"].as_array().unwrap().contains(&Value::from("run")));
    let text = String::from_utf8(wherry(&["engines", example().to_str().unwrap()]).stdout).unwrap();
    assert!(text.contains("compute0") && !text.contains("code0"), "{text}");
}

#[test]
fn a_job_file_at_fault_is_refused_with_what_is_wrong() {
    let step = |more: &str| format!("[buffers.b]\nsize = \"64\"\n[[step]]\nname = \"a\"\n{more}\n");
    for (text, words) in [
        ("[[step".to_owned(), "line 1"),
        (step("operation = \"move\""), "needs a `source`"),
        (step("operation = \"nop\"\nlevel = 3"), "has no `level`"),
        (step("operation = \"crc\"\nsource = \"b\"\nsize = \"65\""), "65 bytes are more than buffer \"b\""),
        (step("operation = \"sha256\"\nsource = \"c\""), "no buffer \"c\"; there are b"),
        (format!("[contexts.c]\nslots = [\"copy9\"]\n{}", step("operation = \"nop\"")), "ENOENT"),
        (format!("[contexts.c]\nslots = [\"balance(copy0 crypto0)\"]\n{}", step("operation = \"nop\"")), "EINVAL"),
        (format!("[contexts.c]\npriority = 2000\n{}", step("operation = \"nop\"")), "-1023 to 1023"),
        (format!("[keys.k]\nkind = \"rot13\"\nhex = \"00\"\n{}", step("operation = \"nop\"")), "no kind \"rot13\""),
        (format!("[keys.k]\nkind = \"hmac-sha256\"\nhex = \"00\"\n{}", step("operation = \"nop\"")), "1 bytes"),
        (format!("[buffers.f]\nfile = \"nowhere\"\n{}", step("operation = \"nop\"")), "nowhere"),
        (format!("[device.engines]\ncopy = 65\n{}", step("operation = \"nop\"")), "1 to 64 engines"),
    ] {
        let (status, answer, errors) = job(&text, &[]);
        assert_eq!((status, answer.as_str()), (2, ""), "{text}: {errors}");
        assert!(errors.contains(words) && errors.starts_with("error: "), "{text}: {errors}");
    }
    let output = wherry(&["run", "/nonexistent/job.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent/job.toml"));
}

#[test]
fn a_step_that_fails_or_differs_makes_the_exit_status_1_and_says_why() {
    let text = "[buffers.b]\nhex = \"00 00\"\n[[step]]\nname = \"sum\"\noperation = \"crc\"\nsource = \"b\"\n\
                expect = { result = 1 }\n[[step]]\nname = \"elsewhere\"\noperation = \"crc\"\nsource = \"b\"\nslot = 70\n\
                [[step]]\nname = \"behind\"\noperation = \"nop\"\nafter = \"elsewhere\"\n\
                [[step]]\nname = \"wrong class\"\noperation = \"sha256\"\nsource = \"b\"\ndestination = \"b\"\n";
    let (status, answer, errors) = job(text, &[]);
    assert_eq!(status, 1, "{answer} {errors}");
    for words in ["rather than 1", "EINVAL", "since step \"elsewhere\" was refused", "4 of 4 steps did not end"] {
        assert!(answer.contains(words), "{words}: {answer}");
    }
}

#[test]
fn a_program_that_does_not_end_is_given_up_by_name() {
    // A jump to itself.
    let text = "[buffers.p]\nhex = \"0500ffff00000000 9500000000000000\"\n[contexts.c]\nslots = [\"compute0\"]\n[[step]]\n\
                name = \"for ever\"\noperation = \"run\"\nsource = \"p\"\nfuel = 4000000000\n";
    let (status, _, errors) = job(text, &["--timeout", "1"]);
    assert_eq!(status, 1, "{errors}");
    assert!(errors.contains("\"for ever\"") && errors.contains("compute0"), "{errors}");
}

#[test]
fn a_buffer_is_saved_as_long_as_the_result_says() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("job.toml");
    let text = "[buffers.t]\ntext = \"abcabcabcabcabcabcabcabcabcabcabc\"\n[buffers.p]\nsize = \"1K\"\nsave = \"out\"\n\
                save_size_of = \"pack\"\n[contexts.c]\nslots = [\"compress0\"]\n[[step]]\nname = \"pack\"\n\
                operation = \"lz4-compress\"\nsource = \"t\"\ndestination = \"p\"\n";
    std::fs::write(&path, text).unwrap();
    let answer = json(&wherry(&["run", path.to_str().unwrap(), "--json"]));
    let out = std::fs::read(directory.path().join("out")).unwrap();
    assert_eq!(Some(out.len() as u64), answer["steps"][0]["result"].as_u64());
    assert!(out.len() < 33 && out.starts_with(&[0x3f, b'a', b'b', b'c']), "{out:?}");
}
