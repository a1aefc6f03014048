//! The state machine, without a guest.

use std::collections::HashMap;

use containerd_shim_protos::{
    events::task::{TaskExecStarted, TaskExit},
    shim::event::Envelope,
};
use proptest::prelude::*;
use tokio::{
    io::AsyncWriteExt as _,
    sync::mpsc::Receiver,
    time::{self, Instant},
};

use super::*;
use crate::machine::{
    GuestProcess,
    mock::{Guest, Mock, PID},
};

mod memory;
mod pause;
mod streams;

struct Test {
    container: Arc<Container>,
    mock: Arc<Mock>,
    events: Receiver<Envelope>,
}

async fn with(stdio: Stdio) -> Test {
    let mock = Arc::new(Mock::default());
    let (queue, events) = Events::for_test();
    let request = Request {
        id: "c1".into(),
        ..Default::default()
    };
    let container = Container::create(
        &request,
        stdio,
        Arc::clone(&mock) as Arc<dyn Machine>,
        queue,
        LogPrograms::for_test(),
    )
    .await
    .unwrap();
    Test {
        container,
        mock,
        events,
    }
}

async fn created() -> Test {
    with(Stdio::default()).await
}

async fn started() -> Test {
    let test = created().await;
    test.container.start("").await.unwrap();
    test
}

impl Test {
    /// Topics of the events so far, without their common prefix.
    fn topics(&mut self) -> Vec<String> {
        let mut topics = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            topics.push(event.topic.replace("/tasks/", ""));
        }
        topics
    }

    async fn exec(&self, id: &str) {
        self.container
            .exec(id, Stdio::default(), b"{}".to_vec())
            .unwrap();
        self.container.start(id).await.unwrap();
    }

    fn name(&self, exec_id: &str) -> &'static str {
        self.container.state(exec_id).unwrap().phase.name()
    }
}

#[tokio::test]
async fn events_come_in_the_order_of_a_life() {
    let mut test = started().await;
    test.mock.exit("", 3);
    assert_eq!(test.container.wait("").await.unwrap().status, 3);
    // The machine has gone before its client asks for that.
    assert_eq!(test.mock.retired.load(Ordering::Relaxed), 1);
    assert!(test.mock.ended().borrow().is_some());
    let deleted = test.container.delete("").await.unwrap();
    assert_eq!((deleted.pid, deleted.exit.status), (PID, 3));
    assert_eq!(test.topics(), ["create", "start", "exit", "delete"]);
    assert_eq!(test.mock.destroyed.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn an_exec_has_a_life_of_its_own() {
    let mut test = started().await;
    test.exec("e1").await;
    assert_eq!(test.container.state("e1").unwrap().pid, 7 + GUEST_PID_BASE);
    test.mock.exit("e1", 4);
    assert_eq!(test.container.wait("e1").await.unwrap().status, 4);
    assert_eq!(test.container.delete("e1").await.unwrap().exit.status, 4);
    assert!(matches!(
        test.container.state("e1"),
        Err(Error::NoProcess { .. })
    ));
    assert_eq!(test.name(""), "running");
    assert_eq!(
        test.topics(),
        ["create", "start", "exec-added", "exec-started", "exit"]
    );
}

#[tokio::test]
async fn an_end_before_the_answer_to_start_is_announced_behind_it() {
    let mut test = created().await;
    test.mock.hold_start.store(true, Ordering::Relaxed);
    let container = Arc::clone(&test.container);
    let starting = tokio::spawn(async move { container.start("").await });
    test.mock.start_asked.notified().await;
    test.mock.exit("", 0);
    // The watcher has seen the end when it has nothing left to do.
    tokio::task::yield_now().await;
    assert_eq!(test.mock.retired.load(Ordering::Relaxed), 0);
    test.mock.release_start.notify_one();
    starting.await.unwrap().unwrap();
    test.container.wait("").await.unwrap();
    assert_eq!(test.topics(), ["create", "start", "exit"]);
}

#[tokio::test]
async fn a_failed_start_ends_the_process() {
    let mut test = created().await;
    *test.mock.guest() = Guest::Fails;
    test.container.start("").await.unwrap_err();
    assert_eq!(test.container.wait("").await.unwrap().status, NOT_STARTED);
    test.container.delete("").await.unwrap();
    assert_eq!(test.topics(), ["create", "exit", "delete"]);
}

#[tokio::test]
async fn a_failed_exec_can_be_waited_for_and_deleted() {
    let mut test = started().await;
    test.container
        .exec("e1", Stdio::default(), Vec::new())
        .unwrap();
    *test.mock.guest() = Guest::Fails;
    test.container.start("e1").await.unwrap_err();
    assert_eq!(test.container.wait("e1").await.unwrap().status, NOT_STARTED);
    // The guest is not asked about a process that it has never heard of.
    test.container.delete("e1").await.unwrap();
    assert_eq!(test.topics(), ["create", "start", "exec-added"]);
}

#[tokio::test]
async fn what_is_not_possible_is_refused() {
    let test = started().await;
    let container = &test.container;
    let refused = |result: Result<u32, AnyError>| {
        matches!(result, Err(AnyError::Container(Error::State { .. })))
    };
    assert!(refused(container.start("").await));
    assert!(matches!(
        container.delete("").await,
        Err(AnyError::Container(Error::State {
            state: "running",
            ..
        }))
    ));
    container.exec("e1", Stdio::default(), Vec::new()).unwrap();
    assert!(matches!(
        container.exec("e1", Stdio::default(), Vec::new()),
        Err(Error::ProcessExists(_))
    ));
    assert!(matches!(
        container.kill("e1", 15, false).await,
        Err(AnyError::Container(Error::State { .. }))
    ));
    assert!(matches!(
        container.kill("", 65, false).await,
        Err(AnyError::Container(Error::Invalid(_)))
    ));
    assert!(matches!(
        container.resize("", 1, 1).await,
        Err(AnyError::Container(Error::NoTerminal(_)))
    ));
    test.mock.exit("", 0);
    container.wait("").await.unwrap();
    assert!(matches!(
        container.kill("", 15, false).await,
        Err(AnyError::Container(Error::Finished(_)))
    ));
    assert!(container.exec("e2", Stdio::default(), Vec::new()).is_err());
}

#[tokio::test]
async fn the_end_of_the_machine_ends_every_process_at_once() {
    let mut test = started().await;
    test.exec("e1").await;
    test.exec("e2").await;
    test.mock.kill();
    for process in ["e1", "e2", ""] {
        assert_eq!(
            test.container.wait(process).await.unwrap().status,
            137,
            "{process}"
        );
    }
    let topics = test.topics();
    assert_eq!(topics.iter().filter(|topic| *topic == "exit").count(), 3);
}

#[tokio::test]
async fn the_end_of_the_init_process_comes_behind_those_of_its_execs() {
    let mut test = started().await;
    test.exec("e1").await;
    test.mock.exit("", 0);
    test.mock.exit("e1", 137);
    test.container.wait("").await.unwrap();
    let mut ids = Vec::new();
    while let Ok(event) = test.events.try_recv() {
        if event.topic == "/tasks/exit" {
            let exit: TaskExit = protobuf::Message::parse_from_bytes(&event.event.value).unwrap();
            ids.push(exit.id);
        }
    }
    assert_eq!(ids, ["e1", "c1"]);
}

#[tokio::test(start_paused = true)]
async fn an_exec_whose_end_the_guest_never_reports_ends_with_the_init_process() {
    let test = started().await;
    test.exec("e1").await;
    test.mock.exit("", 0);
    assert_eq!(test.container.wait("").await.unwrap().status, 0);
    assert_eq!(test.container.wait("e1").await.unwrap().status, 137);
}

#[tokio::test(start_paused = true)]
async fn sigkill_works_on_a_guest_that_hangs() {
    let test = started().await;
    *test.mock.guest() = Guest::Hangs;
    let before = Instant::now();
    test.container.kill("", 9, false).await.unwrap();
    assert_eq!(test.container.wait("").await.unwrap().status, 137);
    assert!(before.elapsed() <= signals::KILL_GRACE + time::Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn sigkill_works_on_a_process_that_does_not_die() {
    let test = started().await;
    test.mock.immortal.store(true, Ordering::Relaxed);
    test.container.kill("", 9, true).await.unwrap();
    assert_eq!(test.container.wait("").await.unwrap().status, 137);
    assert_eq!(
        *test.mock.signals.lock().unwrap(),
        [(String::new(), 9, true)]
    );
}

#[tokio::test]
async fn a_stuck_exec_does_not_stand_in_the_way() {
    let test = started().await;
    test.container
        .exec("e1", Stdio::default(), Vec::new())
        .unwrap();
    *test.mock.guest() = Guest::Hangs;
    let container = Arc::clone(&test.container);
    let stuck = tokio::spawn(async move { container.start("e1").await });
    tokio::task::yield_now().await;
    assert_eq!(test.name("e1"), "starting");
    *test.mock.guest() = Guest::Well;
    test.container.kill("", 9, false).await.unwrap();
    assert_eq!(test.container.wait("").await.unwrap().status, 137);
    test.container.delete("").await.unwrap();
    assert!(stuck.await.unwrap().is_err());
}

#[tokio::test]
async fn a_failed_removal_can_be_tried_again() {
    let mut test = started().await;
    test.mock.exit("", 5);
    test.container.wait("").await.unwrap();
    test.mock.stuck.store(true, Ordering::Relaxed);
    test.container.delete("").await.unwrap_err();
    assert_eq!(test.name(""), "stopped");
    assert_eq!(test.container.delete("").await.unwrap().exit.status, 5);
    assert_eq!(test.topics(), ["create", "start", "exit", "delete"]);
}

#[tokio::test]
async fn a_container_that_was_never_started_can_be_deleted() {
    let mut test = created().await;
    assert_eq!(test.container.delete("").await.unwrap().exit.status, 137);
    assert_eq!(test.topics(), ["create", "exit", "delete"]);
}

#[tokio::test]
async fn an_exec_that_was_never_started_ends_with_nothing_wrong() {
    let test = started().await;
    let none = Stdio::default();
    test.container.exec("e1", none, Vec::new()).unwrap();
    assert_eq!(test.container.delete("e1").await.unwrap().exit.status, 0);
    let none = Stdio::default();
    test.container.exec("e1", none, Vec::new()).unwrap();
}

#[tokio::test]
async fn pids_never_look_like_those_of_the_host() {
    let test = started().await;
    test.exec("e1").await;
    let pids = test.container.pids().await.unwrap();
    assert_eq!(
        pids[0],
        GuestProcess {
            pid: PID,
            exec_id: String::new()
        }
    );
    assert_eq!(
        pids[1],
        GuestProcess {
            pid: 7 + GUEST_PID_BASE,
            exec_id: "e1".into()
        }
    );
    assert_eq!(pids.len(), 2);
}

#[tokio::test]
async fn the_end_is_announced_behind_the_last_output() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let stdout = format!("file://{}", path.display());
    let test = with(Stdio {
        stdout,
        ..Default::default()
    })
    .await;
    test.container.start("").await.unwrap();
    let id = test.mock.names.lock().unwrap()[""].stdout;
    let mut guest = test.mock.streams.lock().unwrap().remove(&id).unwrap();
    test.mock.exit("", 0);
    // The end is known; the bytes are still on their way.
    guest.write_all(&vec![b'x'; 300_000]).await.unwrap();
    drop(guest);
    test.container.wait("").await.unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().len(), 300_000);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_something_else_holds_open_does_not_hold_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let stdout = format!("file://{}", folder.path().join("out").display());
    let test = with(Stdio {
        stdout,
        ..Default::default()
    })
    .await;
    test.container.start("").await.unwrap();
    test.mock.exit("", 0);
    assert_eq!(test.container.wait("").await.unwrap().status, 0);
}

/// What a client may ask, in any order.
#[derive(Clone, Debug)]
enum Call {
    Start(usize),
    Exec(usize),
    Exit(usize, u32),
    Kill(usize),
    Delete(usize),
    Pause,
    Resume,
    MachineEnds,
}

const IDS: [&str; 3] = ["", "e1", "e2"];

fn call() -> impl Strategy<Value = Call> {
    let id = 0..IDS.len();
    prop_oneof![
        3 => id.clone().prop_map(Call::Start),
        2 => (1..IDS.len()).prop_map(Call::Exec),
        3 => (id.clone(), 0u32..256).prop_map(|(id, status)| Call::Exit(id, status)),
        1 => id.clone().prop_map(Call::Kill),
        2 => id.prop_map(Call::Delete),
        2 => Just(Call::Pause),
        2 => Just(Call::Resume),
        1 => Just(Call::MachineEnds),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Whatever order the calls come in: each process is announced to start before it is announced
    /// to end, each at most once, and nothing of the container follows its deletion. It is paused and resumed in turns, between
    /// its start and its end.
    #[test]
    fn events_are_in_order_for_any_order_of_calls(calls in prop::collection::vec(call(), 0..30)) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let topics = runtime.block_on(async {
            let mut test = created().await;
            let mut deleted = false;
            for call in calls {
                match call {
                    Call::Start(id) => drop(test.container.start(IDS[id]).await),
                    Call::Exec(id) if !deleted => {
                        drop(test.container.exec(IDS[id], Stdio::default(), Vec::new()));
                    }
                    Call::Exit(id, status)
                        if test.container.state(IDS[id]).is_ok_and(|s| s.phase == Phase::Running) =>
                    {
                        test.mock.exit(IDS[id], status);
                        test.container.wait(IDS[id]).await.unwrap();
                    }
                    Call::Kill(id) => drop(test.container.kill(IDS[id], 9, false).await),
                    Call::Delete(id) => {
                        deleted |= test.container.delete(IDS[id]).await.is_ok() && id == 0;
                    }
                    Call::Pause => drop(test.container.pause().await),
                    Call::Resume => drop(test.container.resume().await),
                    Call::MachineEnds => test.mock.kill(),
                    Call::Exec(_) | Call::Exit(..) => {}
                }
                // Lets whatever follows from the call happen.
                time::sleep(time::Duration::from_secs(60)).await;
            }
            let mut events = Vec::new();
            while let Ok(event) = test.events.try_recv() {
                events.push(event);
            }
            events
        });
        let mut seen: HashMap<(String, String), usize> = HashMap::new();
        let mut paused = false;
        for (place, event) in topics.iter().enumerate() {
            let id = match event.topic.as_str() {
                "/tasks/exit" => {
                    let exit: TaskExit = protobuf::Message::parse_from_bytes(&event.event.value).unwrap();
                    exit.id
                }
                "/tasks/exec-started" => {
                    let start: TaskExecStarted =
                        protobuf::Message::parse_from_bytes(&event.event.value).unwrap();
                    start.exec_id
                }
                _ => "c1".to_owned(),
            };
            let topic = event.topic.replace("/tasks/exec-started", "/tasks/start");
            if topic == "/tasks/exec-added" {
                // The same id may come again once it was deleted.
                seen.retain(|(_, other), _| other == "c1");
                continue;
            }
            if topic == "/tasks/start" && id != "c1" {
                seen.insert((topic, id), place);
                continue;
            }
            if topic == "/tasks/exit" && id != "c1" {
                continue;
            }
            if topic == "/tasks/paused" || topic == "/tasks/resumed" {
                let c1 = |topic: &str| (topic.to_owned(), "c1".to_owned());
                prop_assert!(seen.contains_key(&c1("/tasks/start")) && !seen.contains_key(&c1("/tasks/exit")));
                prop_assert_eq!(paused, topic == "/tasks/resumed");
                paused = !paused;
                continue;
            }
            prop_assert!(!seen.contains_key(&("/tasks/delete".into(), "c1".into())), "after delete: {}", topic);
            prop_assert!(seen.insert((topic.clone(), id), place).is_none(), "{} twice", topic);
        }
        let at = |topic: &str| seen.get(&(topic.to_owned(), "c1".to_owned())).copied();
        prop_assert_eq!(at("/tasks/create"), Some(0));
        if let (Some(start), Some(exit)) = (at("/tasks/start"), at("/tasks/exit")) {
            prop_assert!(start < exit);
        }
        if let Some(delete) = at("/tasks/delete") {
            prop_assert!(at("/tasks/exit").is_some_and(|exit| exit < delete));
        }
    }
}
