//! The service beside its model: any calls in any order, one after the other and two at once.

use containerd_shim_protos::{
    events::task::{TaskExecAdded, TaskExecStarted, TaskExit},
    shim::event::Envelope,
};
use proptest::prelude::*;
use protobuf::Message as _;
use tokio::{sync::mpsc::Receiver, time};

use super::super::*;
use super::model::{Answer, Call, IDS, Model, Process, SIGNALS};
use crate::machine::{Machine as _, mock::MockBackend};

/// The service and what a client of it hears.
struct Real {
    service: Arc<Service>,
    backend: Arc<MockBackend>,
    events: Receiver<Envelope>,
}

impl Real {
    fn new() -> Self {
        let backend = Arc::new(MockBackend::default());
        let (queue, events) = Events::for_test();
        let service = Service::new(
            "test",
            Arc::clone(&backend) as Arc<dyn Backend>,
            queue,
            Reaper::default(),
        );
        Self {
            service: Arc::new(service),
            backend,
            events,
        }
    }

    /// Lets whatever follows from what was asked happen.
    async fn settle(&self) {
        time::sleep(time::Duration::from_secs(60)).await;
    }

    async fn ask(&self, call: Call) -> Answer {
        self.try_ask(call).await.map_err(|error| error.code())
    }

    async fn try_ask(&self, call: Call) -> Result<u32, Error> {
        if call == Call::Create {
            let request = CreateTaskRequest {
                id: "c1".into(),
                bundle: "/b".into(),
                ..Default::default()
            };
            return self.service.create_container(request).await.map(|_| 0);
        }
        let container = self.service.container("c1")?;
        match call {
            Call::Create => {}
            Call::Start(id) => drop(container.start(IDS[id]).await?),
            Call::Exec(id) => container.exec(IDS[id], Stdio::default(), b"{}".to_vec())?,
            Call::Kill(id, signal) => container.kill(IDS[id], SIGNALS[signal], false).await?,
            Call::Delete(id) => {
                let request = DeleteRequest {
                    id: "c1".into(),
                    exec_id: IDS[id].into(),
                    ..Default::default()
                };
                return Ok(self.service.delete_process(&request).await?.exit_status);
            }
            Call::Pause => container.pause().await?,
            Call::Resume => container.resume().await?,
            Call::Wait(id) => {
                let ended = container.state(IDS[id])?.phase.exit().is_some();
                if ended {
                    return Ok(container.wait(IDS[id]).await?.status);
                }
            }
            Call::Pids => {
                let request = PidsRequest {
                    id: "c1".into(),
                    ..Default::default()
                };
                let processes = self.service.list(&request).await?.processes;
                return Ok(u32::try_from(processes.len()).unwrap());
            }
            Call::Stats => drop(container.stats().await?),
            Call::Update => container.update(&spec::update::resources(b"{}")?).await?,
            Call::Resize(id) => container.resize(IDS[id], 24, 80).await?,
            Call::CloseStdin(id) => container.close_stdin(IDS[id])?,
            Call::Checkpoint => {
                return Err(ContainerError::Unimplemented("checkpoint").into());
            }
            Call::Exits(id, status) => self.backend.machine().exit(IDS[id], status),
            Call::MachineEnds => self.backend.machine().kill(),
        }
        Ok(0)
    }

    fn states(&self) -> [Option<Process>; 3] {
        IDS.map(|exec_id| {
            let request = StateRequest {
                id: "c1".into(),
                exec_id: exec_id.into(),
                ..Default::default()
            };
            let state = self.service.describe(&request).ok()?;
            Some(match state.status() {
                Status::CREATED => Process::Created,
                Status::RUNNING => Process::Running,
                Status::PAUSED => Process::Paused,
                Status::STOPPED => Process::Stopped(state.exit_status),
                other => panic!("{exec_id:?} is {other:?}"),
            })
        })
    }

    fn events(&mut self) -> Vec<(String, usize)> {
        let mut events = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            let (topic, bytes) = (event.topic.replace("/tasks/", ""), &event.event.value);
            let id = match &*topic {
                "exit" => TaskExit::parse_from_bytes(bytes).unwrap().id,
                "exec-added" => TaskExecAdded::parse_from_bytes(bytes).unwrap().exec_id,
                "exec-started" => TaskExecStarted::parse_from_bytes(bytes).unwrap().exec_id,
                _ => String::new(),
            };
            // The init process goes by the container's name there.
            let id = IDS.iter().position(|known| *known == id).unwrap_or(0);
            events.push((topic, id));
        }
        events
    }
}

/// Events as the model writes them. Execs that end with their machine may be announced in either order.
fn in_order(events: impl IntoIterator<Item = (String, usize)>) -> Vec<(String, usize)> {
    let mut events: Vec<_> = events.into_iter().collect();
    for start in 0..events.len() {
        if let [(one, first @ 1..), (other, second @ 1..), ..] = &events[start..]
            && one == "exit"
            && other == "exit"
            && first > second
        {
            events.swap(start, start + 1);
        }
    }
    events
}

/// The same of two calls at once. An exec that ends by one of them may be announced before the pause that is the other: they are
/// two processes, and nobody waits for the one to tell of the other.
fn in_order_at_once(events: impl IntoIterator<Item = (String, usize)>) -> Vec<(String, usize)> {
    let mut events = in_order(events);
    for end in (1..events.len()).rev() {
        if let [(one, 1..), (other, 0)] = &events[end - 1..=end]
            && one == "exit"
            && other == "paused"
        {
            events.swap(end - 1, end);
        }
    }
    events
}

fn told(model: &Model) -> Vec<(String, usize)> {
    in_order(
        model
            .events
            .iter()
            .map(|(topic, id)| ((*topic).to_owned(), *id)),
    )
}

fn call() -> impl Strategy<Value = Call> {
    let id = 0..IDS.len();
    let exec = 1..IDS.len();
    prop_oneof![
        3 => Just(Call::Create),
        6 => id.clone().prop_map(Call::Start),
        4 => exec.prop_map(Call::Exec),
        2 => (id.clone(), 0..SIGNALS.len()).prop_map(|(id, signal)| Call::Kill(id, signal)),
        3 => id.clone().prop_map(Call::Delete),
        2 => Just(Call::Pause),
        2 => Just(Call::Resume),
        1 => id.clone().prop_map(Call::Wait),
        1 => Just(Call::Pids),
        1 => Just(Call::Stats),
        1 => Just(Call::Update),
        1 => id.clone().prop_map(Call::Resize),
        1 => id.clone().prop_map(Call::CloseStdin),
        1 => Just(Call::Checkpoint),
        3 => (id, 0u32..256).prop_map(|(id, status)| Call::Exits(id, status)),
        1 => Just(Call::MachineEnds),
    ]
}

/// Runs a test on a clock that jumps to the next timer.
fn run<T>(test: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().unwrap();
    runtime.block_on(test)
}

/// What two calls have come to: their answers, the states of the processes, and the events.
type Outcome = ([Option<u32>; 2], [Option<Process>; 3], Vec<(String, usize)>);

/// Whether an outcome is that of one order of two calls. A question to a guest whose machine the other call ends may find
/// no answer any more.
fn is_like(found: &Outcome, order: &Outcome, calls: [Call; 2]) -> bool {
    let ends = |call| {
        matches!(
            call,
            Call::MachineEnds | Call::Kill(0, _) | Call::Exits(0, _) | Call::Delete(0)
        )
    };
    // A signal reaches a process that has ended and of which nobody has heard yet.
    let too_late = |at: usize| {
        matches!(
            (calls[at], calls[1 - at]),
            (
                Call::Kill(..),
                Call::Exits(..) | Call::Kill(..) | Call::MachineEnds
            )
        )
    };
    let answered = |at: usize| {
        let lost = found.0[at].is_none() && ends(calls[1 - at]);
        found.0[at] == order.0[at] || lost || too_late(at)
    };
    // A process that could not be started for it has ended with it.
    let mut states = order.1;
    for at in [0, 1] {
        if let Call::Start(exec @ 1..) = calls[at]
            && found.0[at].is_none()
            && ends(calls[1 - at])
            && found.1[exec] == Some(Process::Stopped(137))
        {
            states[exec] = found.1[exec];
        }
    }
    answered(0) && answered(1) && found.1 == states && found.2 == order.2
}

/// What the guest can do by itself, it does only when it could.
fn possible(model: &Model, call: Call) -> bool {
    !matches!(call, Call::Exits(id, _) if !model.runs(id))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_calls_are_answered_as_the_model_answers_them(calls in prop::collection::vec(call(), 0..40)) {
        run(async {
            let (mut real, mut model) = (Real::new(), Model::default());
            for call in calls {
                if !possible(&model, call) {
                    continue;
                }
                let (expected, answer) = (model.apply(call), real.ask(call).await);
                real.settle().await;
                prop_assert_eq!(answer, expected, "{:?}", call);
                prop_assert_eq!(real.states(), model.states(), "after {:?}", call);
            }
            prop_assert_eq!(in_order(real.events()), told(&model));
            Ok(())
        })?;
    }

    /// A call that finds the other half done may be refused with another code.
    #[test]
    fn two_calls_at_once_are_one_of_their_two_orders(
        before in prop::collection::vec(call(), 0..12), one in call(), other in call(),
    ) {
        run(async {
            let (mut real, mut model) = (Real::new(), Model::default());
            for call in before {
                if possible(&model, call) {
                    model.apply(call).ok();
                    real.ask(call).await.ok();
                    real.settle().await;
                }
            }
            if !possible(&model, one) || !possible(&model, other) {
                return Ok(());
            }
            let (first, second) = tokio::join!(real.ask(one), real.ask(other));
            real.settle().await;
            let found = ([first.ok(), second.ok()], real.states(), in_order_at_once(real.events()));
            let [forwards, backwards] = [[one, other], [other, one]].map(|calls| {
                let mut model = model.clone();
                let answers = calls.map(|call| model.apply(call).ok());
                (answers, model.states(), in_order_at_once(told(&model)))
            });
            let backwards = ([backwards.0[1], backwards.0[0]], backwards.1, backwards.2);
            prop_assert!(
                [&forwards, &backwards].iter().any(|order| is_like(&found, order, [one, other])),
                "{:?} and {:?} at once: {:?}\nin this order {:?}\nin the other {:?}",
                one, other, found, forwards, backwards
            );
            Ok(())
        })?;
    }
}
