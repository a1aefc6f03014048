//! Drives an agent through its API: execs.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

// Marked so that clippy knows it for a test's.
#[cfg(test)]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;

use std::{path::Path, time::Duration};

use forkvm_api::agent::Streams;
use guest::{Guest, process, status};
use serde_json::json;
use tokio::io::AsyncReadExt;

#[tokio::test]
async fn an_exec_has_the_containers_root_namespaces_filter_and_capabilities() {
    let guest = Guest::with_sleeper().await;
    let script = "
        hostname; id -u; echo $HOME; cat /proc/sys/kernel/random/boot_id
        grep -E 'Cap(Eff|Prm|Bnd|Amb)|Seccomp:' /proc/self/status | tr '\\t' ' '
        ls / | tr '\\n' ' '; echo
        readlink /proc/1/ns/pid > /tmp/a; readlink /proc/self/ns/pid > /tmp/b; cmp /tmp/a /tmp/b && echo same
        grep ^0 /proc/self/cgroup; exit 3
    ";
    for (uid, home, effective, permitted) in [
        (0, "/root", "00000000a80425fb", "00000000a80425fb"),
        (33, "/home/web", "0000000000000000", "0000000000000000"),
    ] {
        let mut process = process(&["sh", "-c", script]);
        process["user"]["uid"] = json!(uid);
        let mut stdout = guest.connect(10 + uid).await;
        let name = format!("exec-{uid}");
        let streams = Streams {
            stdout: 10 + uid,
            ..Default::default()
        };
        guest.exec("one", &name, &process, streams).await.unwrap();
        assert_eq!(guest.wait("one", &name).await.unwrap(), 3);
        let mut output = String::new();
        stdout.read_to_string(&mut output).await.unwrap();
        let expected = format!(
            "container\n{uid}\n{home}\n12345678-1234-1234-1234-123456789abc\nCapPrm: {permitted}\n\
            CapEff: {effective}\nCapBnd: 00000000a80425fb\nCapAmb: 0000000000000000\nSeccomp: 2\n\
            bin dev etc home proc sys tmp \nsame\n0::/\n"
        );
        assert_eq!(output, expected);
    }
}

#[tokio::test]
async fn an_exec_may_have_a_terminal() {
    let guest = Guest::with_sleeper().await;
    let mut process = process(&[
        "sh",
        "-c",
        "stty size; stat -c %u $(tty); test -t 2 && exit 5",
    ]);
    process["terminal"] = json!(true);
    process["user"] = json!({ "uid": 33, "gid": 33 });
    let mut screen = guest.connect(5).await;
    let streams = Streams {
        terminal: true,
        stdin: 5,
        rows: 12,
        columns: 34,
        ..Default::default()
    };
    guest.exec("one", "tty", &process, streams).await.unwrap();
    let mut output = String::new();
    screen.read_to_string(&mut output).await.unwrap();
    assert_eq!(output, "12 34\r\n33\r\n");
    assert_eq!(guest.wait("one", "tty").await.unwrap(), 5);
}

#[tokio::test]
async fn an_exec_that_cannot_be_says_why() {
    let guest = Guest::with_sleeper().await;
    let missing = guest
        .exec("one", "missing", &process(&["no-such"]), Streams::default())
        .await;
    assert_eq!(
        status(missing.unwrap_err()).1,
        "exec: \"no-such\": executable file not found in $PATH"
    );
    let broken = guest
        .exec(
            "one",
            "broken",
            &process(&["not-a-program"]),
            Streams::default(),
        )
        .await;
    assert_eq!(
        status(broken.unwrap_err()).1,
        "exec /bin/not-a-program: exec format error"
    );
    // The answer comes from the process that failed, just before its end: it may be listed a moment longer.
    let alone = async { while guest.pids("one").await.unwrap().len() != 1 {} };
    tokio::time::timeout(std::time::Duration::from_secs(10), alone)
        .await
        .expect("a process that could not be executed stays");
    // A name that failed may be used again.
    guest
        .exec("one", "missing", &process(&["true"]), Streams::default())
        .await
        .unwrap();
    assert_eq!(guest.wait("one", "missing").await.unwrap(), 0);
}

/// As with runc: the container's namespaces are there.
#[tokio::test]
async fn an_exec_may_come_before_the_start() {
    let guest = Guest::identified().await;
    guest.create_sleeper().await;
    let early = process(&[
        "sh",
        "-c",
        "test $(hostname) = container && test -x /bin/true",
    ]);
    guest
        .exec("one", "early", &early, Streams::default())
        .await
        .unwrap();
    assert_eq!(guest.wait("one", "early").await.unwrap(), 0);
    let sleeper = process(&["sleep", "1000"]);
    guest
        .exec("one", "late", &sleeper, Streams::default())
        .await
        .unwrap();
    guest.run("one").await.unwrap();
    guest.signal("one", "", 9, false).await.unwrap();
    assert_eq!(guest.wait("one", "late").await.unwrap(), 137);
}

#[tokio::test]
async fn from_the_second_on_execs_find_a_worker_that_waits() {
    let minute = Duration::from_secs(60);
    tokio::time::timeout(minute, worker_that_waits())
        .await
        .expect("a worker neither comes nor goes");
}

async fn worker_that_waits() {
    let guest = Guest::with_sleeper().await;
    assert_eq!(guest.waiting_worker(), None, "nobody asked for an exec yet");
    let exec = async |name: &str| {
        let process = process(&["true"]);
        guest.exec("one", name, &process, Streams::default()).await
    };
    // The worker that waits when the exec `name` has ended: another one than that which made it.
    let next = async |name: &str, used: Option<&str>| {
        exec(name).await.unwrap();
        assert_eq!(guest.wait("one", name).await.unwrap(), 0);
        loop {
            match guest.waiting_worker() {
                Some(worker) if used != Some(&worker) => return worker,
                _ => tokio::task::yield_now().await,
            }
        }
    };
    let first = next("one", None).await;
    let second = next("two", Some(&first)).await;
    assert!(
        !Path::new("/proc").join(&first).exists(),
        "worker {first} waited and was not used"
    );
    // One that is gone when it is needed is replaced.
    let killed = std::process::Command::new("kill")
        .args(["-KILL", &second])
        .status();
    assert!(killed.unwrap().success());
    // Its end of the socket is closed for sure when it has been reaped.
    while Path::new("/proc").join(&second).exists() {
        tokio::task::yield_now().await;
    }
    exec("three").await.unwrap();
    assert_eq!(guest.wait("one", "three").await.unwrap(), 0);
}
