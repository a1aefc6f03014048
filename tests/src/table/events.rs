//! containerd's events: a subscription to them, and their order.

use std::time::Instant;

use crate::{
    case::{Case, scenario},
    failure::{Failure, ensure},
    process::{Running, Streams},
    scene::Scene,
};

use super::tasks::{remove_task, sleeper};

pub(super) fn cases() -> Vec<Case> {
    vec![scenario("task/events-in-order", in_order)]
}

/// A subscription to containerd's events.
pub(super) struct Events {
    client: Running,
}

impl Events {
    /// Subscribes, and returns when events do arrive.
    pub(super) fn subscribe(scene: &Scene<'_>) -> Result<Self, Failure> {
        let client = Running::spawn(&["ctr", "events"].map(String::from), Streams::Pipes)?;
        // Nothing tells when the subscription stands but an event of our own.
        while Instant::now() < scene.deadline() {
            let mark = format!("e2e={}", scene.next_id());
            scene.ok(["ctr", "namespace", "label", "default", &mark])?;
            if client.line("/namespaces/update", scene.within(1)).is_ok() {
                return Ok(Events { client });
            }
        }
        Err(client.failure("no event arrived"))
    }

    /// Waits for an event of this topic that names `id`.
    pub(super) fn wait(&self, scene: &Scene<'_>, topic: &str, id: &str) -> Result<(), Failure> {
        self.until(scene, topic, id).map(drop)
    }

    /// Waits until the container's own process has ended; an exec's end names the container too.
    pub(super) fn end_of(&self, scene: &Scene<'_>, id: &str) -> Result<(), Failure> {
        self.wait(scene, "/tasks/exit", &format!("\"id\":\"{id}\""))
    }

    /// Every line up to an event of this topic that names `id`.
    fn until(&self, scene: &Scene<'_>, topic: &str, id: &str) -> Result<Vec<String>, Failure> {
        self.client.lines_until(
            |line| line.contains(topic) && line.contains(id),
            scene.deadline(),
        )
    }
}

fn in_order(scene: &Scene<'_>) -> Result<(), Failure> {
    let events = Events::subscribe(scene)?;
    let id = sleeper(scene)?;
    scene.ok(["ctr", "task", "kill", "--signal", "KILL", &id])?;
    events.end_of(scene, &id)?;
    remove_task(scene, &id, 137)?;
    scene.ok(["ctr", "container", "rm", &id])?;
    let containerd = &scene.machine.containerd;
    let may_lose_the_last = containerd.may_lose_the_last_event(scene.runtime);
    // The container's own end is told by containerd, which loses nothing.
    let last = if may_lose_the_last {
        "/containers/delete"
    } else {
        "/tasks/delete"
    };
    let lines = events.until(scene, last, &id)?;
    let topics: Vec<&str> = lines
        .iter()
        .filter(|line| line.contains(&id))
        .filter_map(|line| {
            line.split_whitespace()
                .find(|word| word.starts_with("/tasks/"))
        })
        .collect();
    let expected = [
        "/tasks/create",
        "/tasks/start",
        // The question for the kernel.
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        // The container itself.
        "/tasks/exit",
        "/tasks/delete",
    ];
    let all_but_the_last = &expected[..expected.len() - 1];
    let as_expected = topics == expected || may_lose_the_last && topics == all_but_the_last;
    ensure(as_expected, || format!("the events were {topics:?}"))
}
