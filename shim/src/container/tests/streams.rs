//! The streams of an exec from its `Exec` on, without a guest.

use tokio::io::AsyncReadExt as _;

use super::*;
use crate::streams::tests::{fifos, reader, writer};

#[tokio::test]
async fn a_client_finds_the_streams_of_an_exec_open_before_its_start() {
    let test = started().await;
    let fifos = fifos(false);
    let stdio = &fifos.stdio;
    test.container
        .exec("e1", stdio.clone(), b"{}".to_vec())
        .unwrap();
    // Nobody opens a FIFO for writing that nobody has open for reading.
    let mut client = writer(&stdio.stdin);
    client.write_all(b"before the start").await.unwrap();
    drop(client);
    test.container.close_stdin("e1").unwrap();
    test.container.start("e1").await.unwrap();
    let names = test.mock.names.lock().unwrap()["e1"].clone();
    let mut guest = test
        .mock
        .streams
        .lock()
        .unwrap()
        .remove(&names.stdin)
        .unwrap();
    let mut input = Vec::new();
    guest.read_to_end(&mut input).await.unwrap();
    assert_eq!(input, b"before the start");
}

#[tokio::test]
async fn the_streams_of_an_exec_that_is_never_started_end_with_it() {
    let test = started().await;
    let fifos = fifos(false);
    let mut client = reader(&fifos.stdio.stdout);
    test.container
        .exec("e1", fifos.stdio.clone(), b"{}".to_vec())
        .unwrap();
    // Somebody holds the other end: there is nothing to read, but no end.
    let read = rustix::io::read(&client, &mut [0]);
    assert_eq!(read, Err(rustix::io::Errno::AGAIN));
    test.container.delete("e1").await.unwrap();
    assert_eq!(client.read_to_end(&mut Vec::new()).await.unwrap(), 0);
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
