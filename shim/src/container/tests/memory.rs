//! Limits that change, and kills for want of memory, without a guest.

use super::*;

#[tokio::test]
async fn limits_are_changed_while_the_container_is_there() {
    let test = created().await;
    let change = crate::spec::update::resources(br#"{"pids":{"limit":9}}"#).unwrap();
    test.container.update(&change).await.unwrap();
    test.container.start("").await.unwrap();
    test.container.pause().await.unwrap();
    let error = test.container.update(&change).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot update process c1: it is paused");
    test.container.resume().await.unwrap();
    test.mock.exit("", 0);
    test.container.wait("").await.unwrap();
    let error = test.container.update(&change).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot update process c1: it is stopped");
    assert_eq!(*test.mock.updates.lock().unwrap(), [change]);
}

#[tokio::test(start_paused = true)]
async fn kills_for_want_of_memory_are_events_while_it_runs_and_before_its_end() {
    let mut test = started().await;
    test.mock.oom_kills.send_replace(2);
    time::sleep(time::Duration::from_secs(5)).await;
    assert_eq!(test.topics(), ["create", "start", "oom"]);
    test.mock.oom_kills.send_replace(3);
    time::sleep(time::Duration::from_secs(5)).await;
    assert_eq!(test.topics(), ["oom"]);
    // One that nobody has heard of yet comes before the end, those that were told do not come again.
    test.mock.oom_kills.send_replace(4);
    test.mock.exit("", 137);
    test.container.wait("").await.unwrap();
    assert_eq!(test.topics(), ["oom", "exit"]);
    // The host's memory, not the guest's.
    let mut test = started().await;
    test.mock.end(machine::OUT_OF_MEMORY);
    test.container.wait("").await.unwrap();
    assert_eq!(test.topics(), ["create", "start", "oom", "exit"]);
}

#[tokio::test(start_paused = true)]
async fn a_guest_does_not_flood_containerd() {
    let mut test = started().await;
    for kills in 1..1000 {
        test.mock.oom_kills.send_replace(kills);
        time::sleep(time::Duration::from_secs(2)).await;
    }
    assert_eq!(test.topics().len(), 2 + 64);
}
