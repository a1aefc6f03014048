//! Pausing and resuming, without a guest.

use super::*;
use crate::container::pause::Motion;

fn refusal(result: Result<impl std::fmt::Debug, impl ToString>) -> String {
    result.unwrap_err().to_string()
}

#[tokio::test]
async fn a_container_is_paused_and_resumed_with_an_event_each() {
    let mut test = started().await;
    test.container.pause().await.unwrap();
    let state = test.container.state("").unwrap();
    assert_eq!(
        (state.phase, state.motion),
        (Phase::Running, Motion::Paused)
    );
    test.container.resume().await.unwrap();
    assert_eq!(test.container.motion(), Motion::Running);
    assert_eq!(*test.mock.paused.lock().unwrap(), [true, false]);
    assert_eq!(test.topics(), ["create", "start", "paused", "resumed"]);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_the_state() {
    let test = created().await;
    assert_eq!(
        refusal(test.container.pause().await),
        "cannot pause process c1: it is created"
    );
    test.container.start("").await.unwrap();
    assert_eq!(
        refusal(test.container.resume().await),
        "cannot resume process c1: it is running"
    );
    test.container
        .exec("early", Stdio::default(), b"{}".to_vec())
        .unwrap();
    test.container.pause().await.unwrap();
    assert_eq!(
        refusal(test.container.pause().await),
        "cannot pause process c1: it is paused"
    );
    assert_eq!(
        refusal(test.container.exec("e", Stdio::default(), Vec::new())),
        "cannot exec in process c1: it is paused"
    );
    assert_eq!(
        refusal(test.container.start("early").await),
        "cannot start process early: it is paused"
    );
    assert_eq!(
        refusal(test.container.delete("").await),
        "cannot delete process c1: it is running"
    );
    // What was refused may be asked for again.
    test.container.resume().await.unwrap();
    test.container.start("early").await.unwrap();
    test.mock.exit("", 0);
    test.container.wait("").await.unwrap();
    assert_eq!(
        refusal(test.container.pause().await),
        "cannot pause process c1: it is stopped"
    );
}

#[tokio::test]
async fn of_two_that_pause_at_once_one_is_refused() {
    let test = started().await;
    test.mock.hold_pause.store(true, Ordering::Relaxed);
    let container = Arc::clone(&test.container);
    let first = tokio::spawn(async move { container.pause().await });
    while test.mock.paused.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        refusal(test.container.pause().await),
        "cannot pause process c1: it is being paused"
    );
    test.mock.release_pause.notify_one();
    first.await.unwrap().unwrap();
    assert_eq!(test.container.motion(), Motion::Paused);
}

#[tokio::test]
async fn a_client_that_gives_up_leaves_nothing_half_done() {
    let test = started().await;
    test.mock.hold_pause.store(true, Ordering::Relaxed);
    let container = Arc::clone(&test.container);
    let asked = tokio::spawn(async move { container.pause().await });
    while test.mock.paused.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    asked.abort();
    assert!(asked.await.unwrap_err().is_cancelled());
    test.mock.hold_pause.store(false, Ordering::Relaxed);
    test.mock.release_pause.notify_one();
    while test.container.motion() == Motion::Pausing {
        tokio::task::yield_now().await;
    }
    test.container.resume().await.unwrap();
}

#[tokio::test]
async fn a_failure_leaves_the_container_as_it_was() {
    let mut test = started().await;
    test.mock.stuck.store(true, Ordering::Relaxed);
    assert!(refusal(test.container.pause().await).contains("stuck"));
    assert_eq!(test.container.motion(), Motion::Running);
    test.container.pause().await.unwrap();
    test.mock.stuck.store(true, Ordering::Relaxed);
    assert!(refusal(test.container.resume().await).contains("stuck"));
    assert_eq!(test.container.motion(), Motion::Paused);
    assert_eq!(test.topics(), ["create", "start", "paused"]);
}

#[tokio::test]
async fn a_paused_container_dies_of_sigkill_at_once_and_other_signals_wait() {
    let test = started().await;
    test.exec("e1").await;
    test.container.pause().await.unwrap();
    // As the guest would, which stands still.
    *test.mock.guest() = Guest::Hangs;
    test.container.kill("", 15, false).await.unwrap();
    test.container.kill("e1", 9, false).await.unwrap();
    tokio::task::yield_now().await;
    assert_eq!(
        *test.mock.signals.lock().unwrap(),
        [(String::new(), 15, false), ("e1".to_owned(), 9, false)],
        "sent, in their order, without waiting for an answer"
    );
    let listed = test.container.pids().await.unwrap();
    let pids: Vec<_> = listed.iter().map(|process| process.pid).collect();
    assert_eq!(pids, [PID, 7 + GUEST_PID_BASE]);
    test.container.kill("", 9, false).await.unwrap();
    assert_eq!(test.container.wait("").await.unwrap().status, 137);
    assert_eq!(test.container.wait("e1").await.unwrap().status, 137);
}

#[tokio::test]
async fn what_a_paused_container_has_used_is_known() {
    let test = started().await;
    test.container.pause().await.unwrap();
    *test.mock.guest() = Guest::Hangs;
    let used = test.container.stats().await.unwrap();
    assert_eq!(used.cpu_stat["usage_usec"], 42);
    test.container.resume().await.unwrap();
    *test.mock.guest() = Guest::Fails;
    assert!(refusal(test.container.stats().await).contains("failed in the guest"));
    // A guest that tells nothing is paused all the same.
    test.container.pause().await.unwrap();
    assert_eq!(test.container.motion(), Motion::Paused);
    test.mock.exit("", 0);
    test.container.wait("").await.unwrap();
    assert_eq!(
        refusal(test.container.stats().await),
        "process c1 has ended already: not found"
    );
}

#[tokio::test]
async fn the_size_of_a_terminal_waits_too() {
    let terminal = Stdio {
        terminal: true,
        ..Default::default()
    };
    let test = with(terminal).await;
    test.container.start("").await.unwrap();
    test.container.pause().await.unwrap();
    *test.mock.guest() = Guest::Hangs;
    test.container.resize("", 24, 80).await.unwrap();
}
