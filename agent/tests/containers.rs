//! Drives an agent through its API: containers, streams, signals.

// Marked so that clippy knows it for a test's.
#[cfg(test)]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;

use forkvm_api::agent::Streams;
use guest::{Guest, process, spec, status};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::Code;

#[tokio::test]
async fn output_and_exit_status_come_back() {
    let guest = Guest::identified().await;
    let spec = spec(
        &guest.rootfs(),
        &["sh", "-c", "echo hello; echo oops >&2; exit 7"],
    );
    assert_eq!(
        guest.output("one", &spec).await,
        ("hello\noops\n".to_owned(), 7)
    );
    assert_eq!(guest.left_over(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn nothing_but_an_identity_is_taken_first() {
    let guest = Guest::start().await;
    let spec = spec(&guest.rootfs(), &["true"]);
    let (code, _) = status(
        guest
            .create("one", &spec, Streams::default())
            .await
            .unwrap_err(),
    );
    assert_eq!(code, Code::FAILED_PRECONDITION);
    let (code, _) = status(guest.pids("one").await.unwrap_err());
    assert_eq!(code, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn what_a_container_has_used_is_told() {
    let guest = Guest::identified().await;
    let (code, _) = status(guest.stats("one").await.unwrap_err());
    assert_eq!(code, Code::NOT_FOUND);
    // No limits: which controllers there are is this machine's affair. The end-to-end table has a container with limits.
    guest.create_sleeper().await;
    guest.run("one").await.unwrap();
    let stats = guest.stats("one").await.unwrap();
    assert!(stats.cpu_stat["usage_usec"] > 0);
    assert!(stats.memory_total > 0);
    guest.signal("one", "", 9, false).await.unwrap();
    guest.wait("one", "").await.unwrap();
}

#[tokio::test]
async fn standard_input_ends_with_the_half_close_only() {
    let guest = Guest::identified().await;
    let spec = spec(&guest.rootfs(), &["sh", "-c", "cat; echo end"]);
    let mut stdin = guest.connect(1).await;
    let mut stdout = guest.connect(2).await;
    guest
        .create(
            "one",
            &spec,
            Streams {
                stdin: 1,
                stdout: 2,
                ..Default::default()
            },
        )
        .await
        .unwrap();
    guest.run("one").await.unwrap();
    stdin.write_all(b"first\n").await.unwrap();
    let mut line = [0; 6];
    stdout.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"first\n");
    stdin.write_all(b"second\n").await.unwrap();
    stdin.shutdown().await.unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "second\nend\n");
    assert_eq!(guest.wait("one", "").await.unwrap(), 0);
}

#[tokio::test]
async fn all_output_is_delivered_before_the_exit() {
    let guest = Guest::identified().await;
    let spec = spec(
        &guest.rootfs(),
        &["sh", "-c", "dd if=/dev/zero bs=1000 count=3000 2>/dev/null"],
    );
    let mut stdout = guest.connect(2).await;
    guest
        .create(
            "one",
            &spec,
            Streams {
                stdout: 2,
                ..Default::default()
            },
        )
        .await
        .unwrap();
    guest.run("one").await.unwrap();
    let reader = tokio::spawn(async move {
        let mut all = Vec::new();
        stdout.read_to_end(&mut all).await.unwrap();
        all.len()
    });
    assert_eq!(guest.wait("one", "").await.unwrap(), 0);
    assert_eq!(reader.await.unwrap(), 3_000_000);
}

#[tokio::test]
async fn signals_end_processes_and_then_find_none() {
    let guest = Guest::with_sleeper().await;
    guest
        .exec(
            "one",
            "other",
            &process(&["sleep", "1000"]),
            Streams::default(),
        )
        .await
        .unwrap();
    assert_eq!(guest.pids("one").await.unwrap().len(), 2);
    guest.signal("one", "other", 15, false).await.unwrap();
    assert_eq!(guest.wait("one", "other").await.unwrap(), 143);
    let (code, _) = status(guest.signal("one", "other", 15, false).await.unwrap_err());
    assert_eq!(code, Code::NOT_FOUND);
    let (code, _) = status(guest.delete("one").await.unwrap_err());
    assert_eq!(code, Code::FAILED_PRECONDITION);
    // Its name is free again: it was forgotten when its end was told.
    guest
        .exec(
            "one",
            "other",
            &process(&["sleep", "1000"]),
            Streams::default(),
        )
        .await
        .unwrap();
    guest.signal("one", "", 9, true).await.unwrap();
    assert_eq!(guest.wait("one", "").await.unwrap(), 137);
    assert_eq!(guest.wait("one", "other").await.unwrap(), 137);
    let (code, _) = status(guest.signal("one", "", 9, false).await.unwrap_err());
    assert_eq!(code, Code::NOT_FOUND);
    guest.delete("one").await.unwrap();
    assert_eq!(guest.left_over(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn the_end_of_init_ends_its_execs() {
    let guest = Guest::with_sleeper().await;
    guest
        .exec(
            "one",
            "other",
            &process(&["sleep", "1000"]),
            Streams::default(),
        )
        .await
        .unwrap();
    guest.signal("one", "", 9, false).await.unwrap();
    assert_eq!(guest.wait("one", "").await.unwrap(), 137);
    assert_eq!(guest.wait("one", "other").await.unwrap(), 137);
}

#[tokio::test]
async fn a_container_is_what_its_spec_says() {
    let guest = Guest::identified().await;
    let script = "
        hostname; id -u; id -g; pwd; echo $HOME; cat /proc/sys/kernel/random/boot_id
        grep -c . /proc/1/mountinfo >/dev/null && echo pid1 $$
        grep -E 'Cap(Eff|Bnd)|Seccomp:|SigIgn|SigBlk' /proc/self/status | tr '\\t' ' '
        ls / | tr '\\n' ' '; echo
        echo to-null >/dev/null && echo null-ok
        readlink /proc/self/fd/0
        (echo x > /proc/sys/kernel/hostname) 2>/dev/null || echo sys-read-only
        cat /proc/sys/net/ipv4/ip_unprivileged_port_start
    ";
    let spec = spec(&guest.rootfs(), &["sh", "-c", script]);
    let (output, status) = guest.output("one", &spec).await;
    assert_eq!(status, 0, "{output}");
    // The C library's own signals 32 and 33, which its posix_spawn ignores in what a test starts.
    let output = output.replace("SigIgn: 0000000180000000", "SigIgn: 0000000000000000");
    let expected = "container\n0\n0\n/\n/root\n12345678-1234-1234-1234-123456789abc\npid1 1\n\
        SigBlk: 0000000000000000\nSigIgn: 0000000000000000\n\
        CapEff: 00000000a80425fb\nCapBnd: 00000000a80425fb\nSeccomp: 2\n\
        bin dev etc home proc sys tmp \nnull-ok\n/dev/null\nsys-read-only\n0\n";
    assert_eq!(output, expected);
}

#[tokio::test]
async fn a_plain_user_may_open_its_standard_output_anew() {
    let guest = Guest::identified().await;
    let mut spec = spec(
        &guest.rootfs(),
        &[
            "sh",
            "-c",
            "echo again > /dev/stdout; echo err > /dev/stderr",
        ],
    );
    spec["process"]["user"] = json!({ "uid": 33, "gid": 33 });
    assert_eq!(
        guest.output("one", &spec).await,
        ("again\nerr\n".to_owned(), 0)
    );
}

#[tokio::test]
async fn a_terminal_has_a_size_and_belongs_to_the_user() {
    let guest = Guest::identified().await;
    let script = "stty size; tty; stat -c %u $(tty); stat -c %u /dev/console; read line; echo got $line; stty size; exit 4";
    let mut spec = spec(&guest.rootfs(), &["sh", "-c", script]);
    spec["process"]["terminal"] = json!(true);
    spec["process"]["user"] = json!({ "uid": 33, "gid": 33 });
    let mut screen = guest.connect(5).await;
    let streams = Streams {
        terminal: true,
        stdin: 5,
        rows: 33,
        columns: 101,
        ..Default::default()
    };
    guest.create("one", &spec, streams).await.unwrap();
    guest.run("one").await.unwrap();
    let resize = forkvm_api::agent::ResizePtyRequest {
        container_id: "one".to_owned(),
        rows: 50,
        columns: 60,
        ..Default::default()
    };
    let mut output = String::new();
    let mut buffer = [0; 256];
    while output.lines().count() < 4 {
        let length = screen.read(&mut buffer).await.unwrap();
        assert_ne!(length, 0, "{output}");
        output.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
    }
    guest
        .client
        .resize_pty(ttrpc::context::with_duration(guest::MINUTE), &resize)
        .await
        .unwrap();
    screen.write_all(b"typed\n").await.unwrap();
    screen.read_to_string(&mut output).await.unwrap();
    assert_eq!(
        output.replace('\r', ""),
        "33 101\n/dev/pts/0\n33\n33\ntyped\ngot typed\n50 60\n"
    );
    assert_eq!(guest.wait("one", "").await.unwrap(), 4);
}

#[tokio::test]
async fn what_cannot_be_is_one_clear_sentence_and_leaves_nothing() {
    let guest = Guest::identified().await;
    let root = guest.rootfs();
    let good = spec(&root, &["true"]);
    let mut no_root = good.clone();
    no_root["root"]["path"] = json!("/run/forkvm/host/rootfs");
    let mut no_source = good.clone();
    no_source["mounts"].as_array_mut().unwrap().push(
        json!({ "destination": "/data", "source": "/run/forkvm/host/vol-0", "type": "bind", "options": ["rbind"] }),
    );
    let mut host_pid = good.clone();
    host_pid["linux"]["namespaces"][2]["path"] = json!("/proc/1/ns/pid");
    let cases = [
        (
            no_root,
            "root file system /run/forkvm/host/rootfs is not there",
        ),
        (
            no_source,
            "the source /run/forkvm/host/vol-0 of the mount on /data is not there",
        ),
        (
            host_pid,
            "the pid namespace /proc/1/ns/pid is not one of this guest",
        ),
        (
            spec(&root, &["no-such"]),
            "exec: \"no-such\": executable file not found in $PATH",
        ),
        (
            spec(&root, &["/no/such"]),
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
        (spec(&root, &["/etc"]), "exec: \"/etc\": is a directory"),
        (
            spec(&root, &["/etc/passwd"]),
            "exec: \"/etc/passwd\": permission denied",
        ),
    ];
    for (spec, expected) in cases {
        let (_, message) = status(
            guest
                .create("one", &spec, Streams::default())
                .await
                .unwrap_err(),
        );
        assert_eq!(message, expected);
        assert_eq!(guest.left_over(), Vec::<std::path::PathBuf>::new());
    }
    let (code, message) = status(
        guest
            .create("../x", &good, Streams::default())
            .await
            .unwrap_err(),
    );
    assert_eq!(
        (code, message.as_str()),
        (Code::INVALID_ARGUMENT, "\"../x\" is not a container id")
    );
    guest
        .create("one", &good, Streams::default())
        .await
        .unwrap();
    let (code, _) = status(
        guest
            .create("one", &good, Streams::default())
            .await
            .unwrap_err(),
    );
    assert_eq!(code, Code::ALREADY_EXISTS);
    guest.delete("one").await.unwrap();
    assert_eq!(guest.left_over(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn a_file_that_is_no_program_says_so_on_standard_error() {
    let guest = Guest::identified().await;
    let spec = spec(&guest.rootfs(), &["not-a-program"]);
    let (output, status) = guest.output("one", &spec).await;
    assert_eq!(output, "exec /bin/not-a-program: exec format error\n");
    assert_eq!(status, 255);
}

#[test]
fn the_warm_up_runs_a_container_and_leaves_nothing() {
    assert!(guest::warm_up());
}
