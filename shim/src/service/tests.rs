//! The service over a real ttrpc connection, as containerd's two generations call it.

use std::sync::atomic::Ordering;

use containerd_shim::api::*;
use containerd_shim_protos::{cgroups_v2::metrics::Metrics, shim_async::TaskClient};
use protobuf::Message as _;
use ttrpc::{
    Code,
    asynchronous::{
        Client, Server,
        transport::{Listener, Socket},
    },
    context,
};

use super::*;
use crate::machine::{
    Machine as _,
    mock::{Guest, MockBackend, PID},
};

mod against_model;
mod model;

struct Test {
    service: Arc<Service>,
    backend: Arc<MockBackend>,
    client: TaskClient,
    raw: Client,
    _server: Server,
    _folder: tempfile::TempDir,
}

async fn serve() -> Test {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let backend = Arc::new(MockBackend::default());
    let (events, queue) = Events::for_test();
    // Read by nobody, and longer than any test.
    std::mem::forget(queue);
    let service = Arc::new(Service::new(
        "test",
        Arc::clone(&backend) as Arc<dyn Backend>,
        events,
        Reaper::default(),
    ));
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(service.methods());
    server.start().await.unwrap();
    let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    let raw = Client::new(Socket::new(stream));
    let client = TaskClient::new(raw.clone());
    Test {
        service,
        backend,
        client,
        raw,
        _server: server,
        _folder: folder,
    }
}

fn ctx() -> context::Context {
    context::with_duration(std::time::Duration::from_secs(20))
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("not refused: {other:?}"),
    }
}

impl Test {
    async fn create(&self, id: &str) -> ttrpc::Result<CreateTaskResponse> {
        let request = CreateTaskRequest {
            id: id.into(),
            bundle: "/b".into(),
            ..Default::default()
        };
        self.client.create(ctx(), &request).await
    }

    async fn state(&self, id: &str) -> ttrpc::Result<StateResponse> {
        self.client
            .state(
                ctx(),
                &StateRequest {
                    id: id.into(),
                    ..Default::default()
                },
            )
            .await
    }

    async fn start(&self, id: &str) -> ttrpc::Result<StartResponse> {
        self.client
            .start(
                ctx(),
                &StartRequest {
                    id: id.into(),
                    ..Default::default()
                },
            )
            .await
    }

    async fn delete(&self, id: &str) -> ttrpc::Result<DeleteResponse> {
        self.client
            .delete(
                ctx(),
                &DeleteRequest {
                    id: id.into(),
                    ..Default::default()
                },
            )
            .await
    }
}

#[tokio::test]
async fn a_whole_life() {
    let test = serve().await;
    assert_eq!(test.create("c1").await.unwrap().pid, PID);
    let state = test.state("c1").await.unwrap();
    assert_eq!(
        (state.status(), state.pid, state.bundle.as_str()),
        (Status::CREATED, PID, "/b")
    );
    assert_eq!(test.start("c1").await.unwrap().pid, PID);
    assert_eq!(test.state("c1").await.unwrap().status(), Status::RUNNING);
    test.backend.machine().exit("", 9);
    let wait = WaitRequest {
        id: "c1".into(),
        ..Default::default()
    };
    assert_eq!(test.client.wait(ctx(), &wait).await.unwrap().exit_status, 9);
    let state = test.state("c1").await.unwrap();
    assert_eq!((state.status(), state.exit_status), (Status::STOPPED, 9));
    assert!(state.exited_at.is_some());
    assert_eq!(test.delete("c1").await.unwrap().exit_status, 9);
    assert_eq!(code(test.state("c1").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn both_generations_of_the_api_are_served() {
    let test = serve().await;
    for service in [V2, V3, "containerd.task.v4.Task"] {
        let mut request = ttrpc::Request::new();
        request.service = service.into();
        request.method = "State".into();
        request.payload = protobuf::Message::write_to_bytes(&StateRequest {
            id: "x".into(),
            ..Default::default()
        })
        .unwrap();
        request.timeout_nano = 20_000_000_000;
        let (_, message) = code(test.raw.request(request).await);
        let answered = message == "container x is not there: not found";
        assert_eq!(
            answered,
            service != "containerd.task.v4.Task",
            "{service}: {message}"
        );
    }
}

#[tokio::test]
async fn one_container_at_a_time() {
    let test = serve().await;
    test.create("c1").await.unwrap();
    assert_eq!(code(test.create("c1").await).0, Code::ALREADY_EXISTS);
    let (refused, message) = code(test.create("c2").await);
    assert_eq!(refused, Code::FAILED_PRECONDITION);
    assert!(
        message.contains("c1") && message.contains("c2"),
        "{message}"
    );
    test.delete("c1").await.unwrap();
    test.create("c2").await.unwrap();
}

#[tokio::test]
async fn a_failed_create_leaves_room_and_nothing_else() {
    let test = serve().await;
    test.backend.refuse.store(true, Ordering::Relaxed);
    assert_eq!(code(test.create("c1").await).0, Code::FAILED_PRECONDITION);
    *test.backend.guest.lock().unwrap() = Guest::Fails;
    test.create("c1").await.unwrap_err();
    assert_eq!(test.backend.machine().destroyed.load(Ordering::Relaxed), 1);
    *test.backend.guest.lock().unwrap() = Guest::Well;
    test.create("c1").await.unwrap();
}

#[tokio::test]
async fn state_answers_while_the_guest_hangs() {
    let test = serve().await;
    test.create("c1").await.unwrap();
    *test.backend.machine().guest() = Guest::Hangs;
    let starting = tokio::spawn({
        let client = test.client.clone();
        async move {
            client
                .start(
                    ctx(),
                    &StartRequest {
                        id: "c1".into(),
                        ..Default::default()
                    },
                )
                .await
        }
    });
    test.backend.machine().start_asked.notified().await;
    assert_eq!(test.state("c1").await.unwrap().status(), Status::CREATED);
    test.backend.machine().kill();
    starting.await.unwrap().unwrap_err();
    assert_eq!(test.state("c1").await.unwrap().status(), Status::STOPPED);
}

#[tokio::test]
async fn a_paused_container_is_told_as_one() {
    let test = serve().await;
    test.create("c1").await.unwrap();
    let (mut start, mut pause, mut resume) = (
        StartRequest::new(),
        PauseRequest::new(),
        ResumeRequest::new(),
    );
    start.id = "c1".into();
    pause.id = "c1".into();
    resume.id = "c1".into();
    test.client.start(ctx(), &start).await.unwrap();
    test.client.pause(ctx(), &pause).await.unwrap();
    assert_eq!(test.state("c1").await.unwrap().status(), Status::PAUSED);
    let (code, message) = code(test.client.pause(ctx(), &pause).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert_eq!(message, "cannot pause process c1: it is paused");
    test.client.resume(ctx(), &resume).await.unwrap();
    assert_eq!(test.state("c1").await.unwrap().status(), Status::RUNNING);
}

#[tokio::test]
async fn stats_are_metrics_of_cgroup_v2() {
    let test = serve().await;
    test.create("c1").await.unwrap();
    let request = StatsRequest {
        id: "c1".into(),
        ..Default::default()
    };
    let answer = test.client.stats(ctx(), &request).await.unwrap();
    let metrics = Metrics::parse_from_bytes(&answer.stats.value).unwrap();
    assert_eq!(answer.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    assert_eq!(metrics.cpu.usage_usec, 42);
}

#[tokio::test]
async fn an_update_is_resources_of_the_oci_configuration() {
    let test = serve().await;
    test.create("c1").await.unwrap();
    let mut request = UpdateTaskRequest {
        id: "c1".into(),
        ..Default::default()
    };
    request.resources.mut_or_insert_default().value = br#"{"cpu":{"shares":7}}"#.to_vec();
    test.client.update(ctx(), &request).await.unwrap();
    let updates = test.backend.machine().updates.lock().unwrap().clone();
    assert_eq!(updates[0].cpu().as_ref().unwrap().shares(), Some(7));
    request.resources.mut_or_insert_default().value = b"more".to_vec();
    let (code, message) = code(test.client.update(ctx(), &request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(message.contains("the resources of the update"), "{message}");
}

#[tokio::test]
async fn what_is_not_built_says_so_by_name() {
    let test = serve().await;
    test.create("c1").await.unwrap();
    let id = || "c1".to_owned();
    let client = &test.client;
    let answers = [(
        "checkpoint",
        code(
            client
                .checkpoint(
                    ctx(),
                    &CheckpointTaskRequest {
                        id: id(),
                        ..Default::default()
                    },
                )
                .await,
        ),
    )];
    for (name, (code, message)) in answers {
        assert_eq!(code, Code::UNIMPLEMENTED);
        assert_eq!(message, format!("{name} is not implemented by forkvm yet"));
    }
    let restore = CreateTaskRequest {
        id: "c2".into(),
        checkpoint: "/c".into(),
        ..Default::default()
    };
    assert_eq!(
        code(client.create(ctx(), &restore).await).0,
        Code::UNIMPLEMENTED
    );
}

#[tokio::test]
async fn shutdown_is_ignored_while_a_container_is_there() {
    let test = serve().await;
    test.create("c1").await.unwrap();
    let shutdown = ShutdownRequest {
        id: "c1".into(),
        ..Default::default()
    };
    test.client.shutdown(ctx(), &shutdown).await.unwrap();
    assert!(!*test.service.ended.borrow());
    test.delete("c1").await.unwrap();
    test.client.shutdown(ctx(), &shutdown).await.unwrap();
    test.service.ended().await;
}

#[tokio::test]
async fn connect_tells_both_pids() {
    let test = serve().await;
    test.create("c1").await.unwrap();
    let request = ConnectRequest {
        id: "c1".into(),
        ..Default::default()
    };
    let answer = test.client.connect(ctx(), &request).await.unwrap();
    assert_eq!(
        (answer.shim_pid, answer.task_pid),
        (std::process::id(), PID)
    );
}
