use std::time::Duration;

use super::*;
use crate::process::End;

fn output(code: i32, stdout: &str, stderr: &str) -> Output {
    Output {
        command: "ctr".into(),
        end: End::Exited(code),
        stdout: stdout.into(),
        stderr: stderr.into(),
        took: Duration::ZERO,
    }
}

#[test]
fn ctr_takes_the_id_behind_the_image_and_docker_in_front_of_it() {
    let container = ctr(BUSYBOX).bare().command(["true"]);
    assert_eq!(
        container.arguments(Runtime::Forkvm, "one").join(" "),
        "ctr run --rm --runtime io.containerd.forkvm.v2 forkvm.local/busybox:1 one true"
    );
    let container = docker(BUSYBOX).bare().command(["true"]);
    assert_eq!(
        container.arguments(Runtime::Runc, "one").join(" "),
        "docker run --rm --runtime runc --name one --network none forkvm.local/busybox:1 true"
    );
}

#[test]
fn expectations_can_fail() {
    let row = ctr(BUSYBOX).exits(3).stdout("a").stderr_has(["b", "c"]);
    assert!(row.judge(output(3, "a", "c b")).is_ok());
    assert!(row.judge(output(0, "a", "c b")).is_err());
    assert!(row.judge(output(3, "a\n", "c b")).is_err());
    assert!(row.judge(output(3, "a", "b")).is_err());
}

#[test]
fn a_refusal_is_one_line_with_the_words() {
    let row = ctr(BUSYBOX).refused(["PID namespace"]);
    let refusal = "ctr: the host's pid namespace cannot be shared\n";
    assert!(row.judge(output(1, "", refusal)).is_ok());
    assert!(row.judge(output(0, "", refusal)).is_err());
    assert!(row.judge(output(1, "", "ctr: failed\n")).is_err());
    let two = format!("{refusal}goroutine 1\n");
    assert!(row.judge(output(1, "", &two)).is_err());
}
