//! Tests of a network device without a backend.

use super::*;
use crate::devices::virtio::testing::{Board, DriverQueue, memory};
use crate::devices::virtio::{Persist, VirtioDevice};

#[test]
fn the_link_is_down_and_the_address_the_slots() {
    for slot in 0..2 {
        let device = Net::new(slot);
        let mut config = [0xff; 8];
        device.config().read(0, &mut config);
        assert_eq!(config[..6], mac_address(slot));
        assert_eq!(config[6..], [0, 0]);
        assert_eq!(config[0] & 3, 2, "locally administered, unicast");
    }
    assert_ne!(mac_address(0), mac_address(1));
}

#[test]
fn what_is_sent_is_discarded_and_nothing_is_received() {
    let memory = memory(0x2_0000);
    let board = Board::new(&memory, 2);
    let mut receive = DriverQueue::new(&memory, 0x1000, 256);
    let mut transmit = DriverQueue::new(&memory, 0x5000, 256);
    let mut device = Net::new(0);
    board.activate(&mut device, &[&receive, &transmit]);
    receive.offer(&[(0x1_0000, 1526, true)]);
    transmit.offer(&[(0x1_0000, 12, false), (0x1_1000, 60, false)]);
    device.process_queue(0).unwrap();
    device.process_queue(1).unwrap();
    assert_eq!(transmit.take_used().unwrap().1, 0);
    transmit.offer(&[(0x1_0000, 12, false)]);
    device.drain().unwrap();
    assert!(transmit.take_used().is_some());
    assert!(receive.take_used().is_none());
}

#[test]
fn a_fork_keeps_the_address() {
    let template = Net::new(1);
    let child = Net::restore(1, &template.save()).unwrap();
    let (mut before, mut after) = ([0; 8], [1; 8]);
    template.config().read(0, &mut before);
    child.config().read(0, &mut after);
    assert_eq!(before, after);
}
