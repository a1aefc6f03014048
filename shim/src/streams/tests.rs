use std::sync::atomic::AtomicU64 as Counter;

use proptest::prelude::*;
use tokio::net::UnixStream;

use super::*;
use crate::machine::mock::Mock;

struct Fifos {
    _folder: tempfile::TempDir,
    stdio: Stdio,
}

fn fifos(terminal: bool) -> Fifos {
    let folder = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = folder.path().join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        path.display().to_string()
    };
    let stdio = Stdio {
        terminal,
        stdin: make("in"),
        stdout: make("out"),
        stderr: if terminal { String::new() } else { make("err") },
    };
    Fifos {
        _folder: folder,
        stdio,
    }
}

/// The client's ends: it opens its own before it calls `Create`, as containerd's client does.
fn reader(path: &str) -> pipe::Receiver {
    pipe::OpenOptions::new().open_receiver(path).unwrap()
}

fn writer(path: &str) -> pipe::Sender {
    pipe::OpenOptions::new().open_sender(path).unwrap()
}

async fn opened(stdio: &Stdio, mock: &Mock) -> (Streams, Open) {
    let counter = Counter::new(1);
    open(stdio, &LogPrograms::for_test(), mock, || {
        counter.fetch_add(1, Ordering::Relaxed)
    })
    .await
    .unwrap()
}

fn guest(mock: &Mock, id: u64) -> UnixStream {
    mock.streams.lock().unwrap().remove(&id).unwrap()
}

async fn read_exactly(pipe: &mut pipe::Receiver, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    pipe.read_exact(&mut bytes).await.unwrap();
    bytes
}

#[tokio::test]
async fn outputs_are_copied_apart_and_end_with_the_guest() {
    let fifos = fifos(false);
    let (mut out, mut err) = (reader(&fifos.stdio.stdout), reader(&fifos.stdio.stderr));
    let mock = Mock::default();
    let (names, open) = opened(&fifos.stdio, &mock).await;
    let (mut guest_out, mut guest_err) = (guest(&mock, names.stdout), guest(&mock, names.stderr));
    guest_out.write_all(b"to out").await.unwrap();
    guest_err.write_all(b"to err").await.unwrap();
    assert_eq!(read_exactly(&mut out, 6).await, b"to out");
    assert_eq!(read_exactly(&mut err, 6).await, b"to err");
    drop((guest_out, guest_err));
    open.outputs().drained().await;
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn stdin_lasts_until_it_is_closed_by_name() {
    let fifos = fifos(false);
    let mock = Mock::default();
    let (names, open) = opened(&fifos.stdio, &mock).await;
    let mut guest_in = guest(&mock, names.stdin);
    let mut bytes = vec![0; 5];
    for text in [b"first", b"again"] {
        // A client that detaches and one that attaches anew.
        let mut client = writer(&fifos.stdio.stdin);
        client.write_all(text).await.unwrap();
        drop(client);
        guest_in.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes, text);
    }
    let mut client = writer(&fifos.stdio.stdin);
    client.write_all(b"last!").await.unwrap();
    open.close_stdin();
    drop(client);
    let mut rest = Vec::new();
    guest_in.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"last!");
}

#[tokio::test]
async fn a_terminal_is_one_connection_both_ways() {
    let mut fifos = fifos(true);
    // containerd's client names a FIFO for it all the same, and does not make it.
    fifos.stdio.stderr = format!("{}-stderr", fifos.stdio.stdout);
    let mut out = reader(&fifos.stdio.stdout);
    let mock = Mock::default();
    let (names, _open) = opened(&fifos.stdio, &mock).await;
    assert_eq!((names.stdout, names.stderr), (0, 0));
    assert!(names.terminal);
    let mut guest = guest(&mock, names.stdin);
    let mut client = writer(&fifos.stdio.stdin);
    client.write_all(b"ls\n").await.unwrap();
    let mut bytes = vec![0; 3];
    guest.read_exact(&mut bytes).await.unwrap();
    assert_eq!(bytes, b"ls\n");
    guest.write_all(b"bin\r\n").await.unwrap();
    assert_eq!(read_exactly(&mut out, 5).await, b"bin\r\n");
}

#[tokio::test]
async fn streams_that_nobody_wants_have_no_connection() {
    let mock = Mock::default();
    let (names, open) = opened(&Stdio::default(), &mock).await;
    assert_eq!((names.stdin, names.stdout, names.stderr), (0, 0, 0));
    assert!(mock.streams.lock().unwrap().is_empty());
    open.outputs().drained().await;
}

#[tokio::test]
async fn output_survives_a_client_that_goes_away() {
    let fifos = fifos(false);
    let out = reader(&fifos.stdio.stdout);
    let mock = Mock::default();
    let (names, open) = opened(&fifos.stdio, &mock).await;
    let mut guest_out = guest(&mock, names.stdout);
    drop(out);
    guest_out.write_all(b"kept").await.unwrap();
    let mut again = reader(&fifos.stdio.stdout);
    assert_eq!(read_exactly(&mut again, 4).await, b"kept");
    drop(open);
}

#[test]
fn names_of_streams() {
    assert_eq!(Place::parse("").unwrap(), Place::Nowhere);
    assert_eq!(
        Place::parse("/run/x").unwrap(),
        Place::Fifo(Path::new("/run/x"))
    );
    assert_eq!(
        Place::parse("fifo:///run/x").unwrap(),
        Place::Fifo(Path::new("/run/x"))
    );
    assert_eq!(
        Place::parse("file:///var/log/x").unwrap(),
        Place::File(Path::new("/var/log/x"))
    );
    assert_eq!(
        Place::parse("binary:///bin/logger?a=b").unwrap(),
        Place::Program("/bin/logger?a=b")
    );
    let refused = Place::parse("npipe:///x").unwrap_err().to_string();
    assert!(refused.contains("npipe://"), "{refused}");
}

#[tokio::test]
async fn a_stream_that_is_not_there_is_named() {
    let stdio = Stdio {
        stdout: "/nonexistent/out".into(),
        ..Default::default()
    };
    let error = open(&stdio, &LogPrograms::for_test(), &Mock::default(), || 1)
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("/nonexistent/out"), "{error}");
    let stdio = Stdio {
        stdin: "file:///etc/passwd".into(),
        ..Default::default()
    };
    assert!(
        stdio
            .check()
            .unwrap_err()
            .to_string()
            .contains("stdin must be a FIFO")
    );
}

proptest! {
    #[test]
    fn any_name_is_survived(name in "\\PC{0,40}") {
        let _ = Place::parse(&name);
    }
}
