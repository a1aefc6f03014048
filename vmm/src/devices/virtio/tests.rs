//! Tests of what devices build on: virtqueues, interrupts, configuration spaces.

use vm_memory::{Bytes, GuestAddress};

use super::testing::{Board, DriverQueue, memory};
use super::{ConfigSpace, QueueError, QueueState};

const BUFFER: (u64, u32, bool) = (0x8000, 64, true);

#[test]
fn a_batch_makes_one_interrupt() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    for _ in 0..5 {
        driver.offer(&[BUFFER]);
    }
    queue.serve(|_| 7).unwrap();
    assert_eq!(board.interrupts(), 1);
    assert_eq!(board.interrupt.status(), 1);
    for _ in 0..5 {
        assert_eq!(driver.take_used().unwrap().1, 7);
    }
    assert!(driver.take_used().is_none());
    assert!(!board.rescheduled(0));
}

#[test]
fn an_interrupt_that_the_driver_does_not_want_is_not_sent() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    // used_event stays at 0: only the first used chain is to be announced.
    for expected in [1, 0, 0] {
        driver.offer(&[BUFFER]);
        queue.serve(|_| 0).unwrap();
        assert_eq!(board.interrupts(), expected);
    }
}

#[test]
fn a_driver_that_goes_on_and_on_does_not_keep_the_device() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    driver.offer(&[BUFFER]);
    let mut served = 0;
    queue
        .serve(|_| {
            served += 1;
            // The driver takes it back and offers it again while the device works.
            if driver.free_descriptors() == 0 {
                driver.take_used();
            }
            driver.offer(&[BUFFER]);
            0
        })
        .unwrap();
    assert_eq!(served, 8, "one length of the queue at a time");
    assert!(board.rescheduled(0), "and the rest after the others");
}

#[test]
fn a_queue_that_fills_itself_does_not_keep_a_device_from_its_rest() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    driver.offer(&[BUFFER]);
    let mut served = 0;
    let outcome = queue.serve_all(|_| {
        served += 1;
        if driver.free_descriptors() == 0 {
            driver.take_used();
        }
        driver.offer(&[BUFFER]);
        0
    });
    assert!(matches!(outcome, Err(QueueError::Endless)), "{outcome:?}");
    assert_eq!(served, 8);
}

#[test]
fn a_served_queue_asks_for_the_next_notification() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 4);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    // As many as make one length exactly, and fewer.
    for count in [4, 1, 3, 4] {
        let old = driver.next_available();
        for _ in 0..count {
            driver.offer(&[BUFFER]);
        }
        assert!(driver.must_notify(old));
        queue.serve(|_| 0).unwrap();
        for _ in 0..count {
            driver.take_used().unwrap();
        }
    }
}

#[test]
fn looking_into_an_empty_queue_writes_nothing() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    let mut before = vec![0; 0x10000];
    memory.read_slice(&mut before, GuestAddress(0)).unwrap();
    queue.serve(|_| 0).unwrap();
    let mut after = vec![0; 0x10000];
    memory.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(before == after);
    assert_eq!(board.interrupts(), 0);
}

#[test]
fn an_impossible_available_index_is_an_error() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    driver.set_available_index(9);
    assert!(matches!(queue.pop(), Err(QueueError::Ring(_))));
    assert!(queue.serve_all(|_| 0).is_err());
}

#[test]
fn a_head_outside_the_table_is_an_error() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    driver.publish(8);
    let Err(error) = queue.pop() else {
        panic!("head 8 of 8 was taken")
    };
    assert_eq!(error.to_string(), "virtqueue: descriptor 8 in a table of 8");
}

#[test]
fn a_chain_that_loops_ends() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    driver.describe(0, 0x8000, 1, super::testing::NEXT, 1);
    driver.describe(1, 0x8000, 1, super::testing::NEXT, 0);
    driver.publish(0);
    assert_eq!(queue.pop().unwrap().unwrap().count(), 8);
}

#[test]
fn a_queue_goes_on_from_its_state() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    for _ in 0..5 {
        driver.offer(&[BUFFER]);
    }
    // In the middle: three served, two not.
    for written in 1..=3 {
        let head = queue.pop().unwrap().unwrap().head_index();
        queue.add_used(head, written).unwrap();
    }
    queue.signal().unwrap();
    let state = queue.state();
    assert_eq!((state.next_avail, state.next_used), (3, 3));
    let bytes = postcard::to_stdvec(&state).unwrap();
    let state: QueueState = postcard::from_bytes(&bytes).unwrap();
    let mut queue = board.queues(&[state]).remove(0);
    assert_eq!(queue.state(), state);
    let mut next = 4;
    queue
        .serve(|_| {
            next += 1;
            next - 1
        })
        .unwrap();
    let written: Vec<_> = std::iter::from_fn(|| driver.take_used())
        .map(|(_, written)| written)
        .collect();
    assert_eq!(written, [1, 2, 3, 4, 5]);
}

#[test]
fn a_put_back_chain_comes_again() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut queue = board.queues(&[driver.state()]).remove(0);
    let head = driver.offer(&[BUFFER]);
    assert_eq!(queue.pop().unwrap().unwrap().head_index(), head);
    assert!(queue.pop().unwrap().is_none());
    queue.undo_pop();
    assert_eq!(queue.pop().unwrap().unwrap().head_index(), head);
}

#[test]
fn a_queue_that_was_not_set_up_is_empty() {
    let memory = memory(0x10000);
    let board = Board::new(&memory, 1);
    let mut queue = board.queues(&[QueueState::empty(8)]).remove(0);
    assert!(queue.is_empty().unwrap());
    assert!(queue.pop().unwrap().is_none());
    assert!(!queue.wait_for_more().unwrap());
    queue.serve_all(|_| 0).unwrap();
}

#[test]
fn a_configuration_space_reads_zero_behind_its_end() {
    let space = ConfigSpace::new(vec![1, 2, 3]);
    for (offset, expected) in [
        (0, [1, 2, 3, 0]),
        (2, [3, 0, 0, 0]),
        (3, [0; 4]),
        (u64::MAX, [0; 4]),
    ] {
        let mut data = [0xff; 4];
        space.read(offset, &mut data);
        assert_eq!(data, expected, "at {offset}");
    }
    let before = space.generation();
    space.update(|bytes| bytes[1] = 9);
    assert_ne!(space.generation(), before);
}
