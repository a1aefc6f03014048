//! Tests of the entropy device.

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{Board, DriverQueue, memory};
use crate::devices::virtio::{Persist, VirtioDevice};

const BUFFER: u64 = 0x8000;

fn device() -> (Rng, Board, DriverQueue) {
    let memory = memory(0x2_0000);
    let board = Board::new(&memory, 1);
    let driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut device = Rng::new(true);
    board.activate(&mut device, &[&driver]);
    (device, board, driver)
}

fn bytes(board: &Board, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    board
        .memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

#[test]
fn a_buffer_is_filled_differently_each_time() {
    let (mut device, board, mut driver) = device();
    driver.offer(&[(BUFFER, 64, true)]);
    driver.offer(&[(BUFFER + 64, 40, true), (BUFFER + 104, 24, true)]);
    device.process_queue(0).unwrap();
    assert_eq!(driver.take_used().unwrap().1, 64);
    assert_eq!(driver.take_used().unwrap().1, 64);
    assert_eq!(board.interrupts(), 1);
    let (first, second) = (bytes(&board, BUFFER, 64), bytes(&board, BUFFER + 64, 64));
    assert_ne!(first, second);
    // 64 equal bytes come once in 2^504 tries.
    assert!(second.iter().any(|byte| *byte != second[0]));
}

#[test]
fn a_large_buffer_is_filled_in_part() {
    let (mut device, board, mut driver) = device();
    driver.offer(&[(BUFFER, 3000, true), (BUFFER + 3000, 0x1_0000, true)]);
    device.process_queue(0).unwrap();
    assert_eq!(driver.take_used().unwrap().1, 4096);
    assert_eq!(bytes(&board, BUFFER + 4096, 64), [0; 64]);
}

#[test]
fn only_what_the_device_may_write_is_written() {
    let (mut device, board, mut driver) = device();
    for (pieces, written) in [
        (&[(BUFFER, 64, false)][..], 0),
        (&[(BUFFER, 64, false), (BUFFER + 64, 8, true)], 8),
        (&[(0x2_0000, 64, true)], 0),
        (&[(u64::MAX - 3, 64, true)], 0),
        (&[(BUFFER + 64, 8, true), (0x1_ffff, 2, true)], 8),
    ] {
        driver.offer(pieces);
        device.process_queue(0).unwrap();
        assert_eq!(driver.take_used().unwrap().1, written, "{pieces:x?}");
    }
    assert_eq!(bytes(&board, BUFFER, 64), [0; 64]);
}

#[test]
fn a_request_is_done_when_the_machine_is_at_rest() {
    let (mut device, _, mut driver) = device();
    driver.offer(&[(BUFFER, 64, true)]);
    device.drain().unwrap();
    assert!(driver.take_used().is_some());
}

#[test]
fn a_request_of_the_template_is_answered_in_the_fork() {
    let memory = memory(0x2_0000);
    let board = Board::new(&memory, 1);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let mut template = Rng::new(false);
    board.activate(&mut template, &[&driver]);
    driver.offer(&[(BUFFER, 64, true)]);
    template.process_queue(0).unwrap();
    template.drain().unwrap();
    assert!(driver.take_used().is_none());
    assert_eq!(bytes(&board, BUFFER, 64), [0; 64]);
    let mut child = Rng::restore(true, &template.save()).unwrap();
    let queues: Vec<_> = template
        .queues()
        .iter()
        .map(|queue| queue.state())
        .collect();
    child.activate(crate::devices::virtio::Activation {
        queues: board.queues(&queues),
        features: template.features(),
        interrupt: board.interrupt.clone(),
    });
    child.process_queue(0).unwrap();
    assert_eq!(driver.take_used().unwrap().1, 64);
    assert_eq!(board.interrupts(), 1);
}
