//! When the streams of an exec are opened, without a guest.

use tokio::net::unix::pipe;

use super::*;

#[tokio::test]
async fn the_streams_of_an_exec_are_opened_by_its_start() {
    // Not before: `ctr` may otherwise copy all of its stdin before it knows that it has to close it (docs/shim.md, "Streams").
    let test = started().await;
    let folder = tempfile::tempdir().unwrap();
    let stdin = folder.path().join("in");
    rustix::fs::mkfifoat(rustix::fs::CWD, &stdin, 0o600.into()).unwrap();
    let stdio = Stdio {
        stdin: stdin.display().to_string(),
        ..Stdio::default()
    };
    test.container.exec("e1", stdio, b"{}".to_vec()).unwrap();
    // Nobody opens a FIFO for writing that nobody has open for reading.
    let client = || pipe::OpenOptions::new().open_sender(&stdin);
    let error = client().unwrap_err();
    assert_eq!(
        rustix::io::Errno::from_io_error(&error),
        Some(rustix::io::Errno::NXIO)
    );
    test.container.start("e1").await.unwrap();
    client().unwrap();
}

#[tokio::test]
async fn a_stream_that_is_not_there_is_told_when_the_exec_is_started() {
    let test = started().await;
    let stdio = Stdio {
        stdout: "/nonexistent/out".into(),
        ..Stdio::default()
    };
    test.container.exec("e1", stdio, b"{}".to_vec()).unwrap();
    let error = test.container.start("e1").await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/out"), "{error}");
}
