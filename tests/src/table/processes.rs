//! The container's process: what it is given, what it writes, how it ends.

use sha2::{Digest, Sha256};

use crate::{
    case::{Case, row, scenario},
    container::{BUSYBOX, PYTHON, ctr},
    failure::{Failure, ensure},
    process::Output,
    scene::Scene,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        row(
            "process/echo",
            ctr(BUSYBOX).command(["echo", "hello"]).stdout("hello\n"),
        ),
        row(
            "process/arguments-are-kept",
            ctr(BUSYBOX)
                .command(["printf", "<%s>", "a b", "", "c\"d'", "$x *", "é\n"])
                .stdout("<a b><><c\"d'><$x *><é\n>"),
        ),
        row("process/exit-0", ctr(BUSYBOX).sh("exit 0")),
        row("process/exit-1", ctr(BUSYBOX).sh("exit 1").exits(1)),
        row("process/exit-42", ctr(BUSYBOX).sh("exit 42").exits(42)),
        row("process/exit-255", ctr(BUSYBOX).sh("exit 255").exits(255)),
        row(
            "process/exit-139-by-a-fault",
            ctr(PYTHON)
                .python("import ctypes; ctypes.string_at(0)")
                .exits(139),
        ),
        row(
            "process/children-are-reaped-and-their-status-kept",
            ctr(BUSYBOX)
                .sh("sh -c 'kill -9 $$'; echo $?; (exit 7); echo $?; sleep 0.1 & wait $!; echo $?")
                .stdout("137\n7\n0\n"),
        ),
        row(
            "process/environment",
            ctr(BUSYBOX)
                .option(&["--env", "GREETING=good day", "--env", "EMPTY="])
                .sh(r#"echo "$GREETING|${EMPTY-unset}|${OTHER-unset}|$PATH""#)
                .stdout_has(["good day||unset|/usr/local/sbin:"]),
        ),
        row(
            "process/working-directory",
            ctr(BUSYBOX)
                .option(&["--cwd", "/usr"])
                .command(["pwd"])
                .stdout("/usr\n"),
        ),
        row(
            "process/working-directory-is-made",
            ctr(BUSYBOX)
                .option(&["--cwd", "/not/there/yet"])
                .command(["pwd"])
                .stdout("/not/there/yet\n"),
        ),
        row(
            "process/user",
            ctr(BUSYBOX)
                .option(&["--user", "1234:5678"])
                .sh("id -u; id -g; grep -E '^(Uid|Gid):' /proc/self/status")
                .stdout("1234\n5678\nUid:\t1234\t1234\t1234\t1234\nGid:\t5678\t5678\t5678\t5678\n"),
        ),
        row(
            "process/stdin-to-its-end",
            ctr(BUSYBOX)
                .stdin("one\ntwo without a newline")
                .command(["cat"])
                .stdout("one\ntwo without a newline"),
        ),
        row(
            "process/stdout-and-stderr-are-apart",
            ctr(BUSYBOX)
                .sh("echo out; echo err >&2; echo out again")
                .stdout("out\nout again\n")
                .stderr("err\n"),
        ),
        row(
            "process/a-closed-stdout-is-no-end",
            ctr(BUSYBOX)
                .sh("echo out; exec >&-; echo err >&2; exit 5")
                .exits(5)
                .stdout("out\n")
                .stderr("err\n"),
        ),
        row(
            "process/not-there",
            ctr(BUSYBOX)
                .command(["/no/such/program"])
                .refused(["/no/such/program", "no such file or directory"]),
        ),
        row(
            "process/not-executable",
            ctr(BUSYBOX)
                .command(["/etc/passwd"])
                .refused(["/etc/passwd", "permission denied"]),
        ),
        scenario("process/8-mib-of-output", large_output),
        scenario("process/8-mib-of-input", large_input),
        scenario("process/8-mib-to-both-streams-at-once", large_both),
    ]
}

const SIZE: usize = 8 << 20;

/// The last byte has to arrive before the exit does.
fn large_output(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = format!("head -c {SIZE} /dev/urandom >/f; sha256sum </f >&2; exec cat /f");
    let output = scene.run(&ctr(BUSYBOX).sh(&script))?;
    let written = output.error_text();
    check_digest(&output, &output.stdout, &written)
}

fn large_input(scene: &Scene<'_>) -> Result<(), Failure> {
    let input: Vec<u8> = (0..SIZE / 8)
        .flat_map(|number| {
            (number as u64)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes()
        })
        .collect();
    let output = scene.run(&ctr(BUSYBOX).stdin(input.clone()).command(["sha256sum"]))?;
    let read = output.text();
    check_digest(&output, &input, &read)
}

fn large_both(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = format!("head -c {SIZE} /dev/zero >&2 & head -c {SIZE} /dev/zero; wait");
    let output = scene.run(&ctr(BUSYBOX).sh(&script))?;
    ensure(
        [&output.stdout, &output.stderr]
            .iter()
            .all(|stream| stream.len() == SIZE && stream.iter().all(|&byte| byte == 0)),
        || {
            format!(
                "expected {SIZE} zero bytes on each stream, found {} and {} bytes",
                output.stdout.len(),
                output.stderr.len()
            )
        },
    )
}

fn check_digest(output: &Output, bytes: &[u8], line: &str) -> Result<(), Failure> {
    let digest: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if bytes.len() == SIZE && line.starts_with(&digest) {
        return Ok(());
    }
    Err(output.failure(format!(
        "{} bytes with the digest {digest} do not match {SIZE} bytes with {}",
        bytes.len(),
        line.trim_end()
    )))
}
