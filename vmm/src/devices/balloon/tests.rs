//! Tests of the balloon device.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{Board, DriverQueue, NEXT, WRITE, memory};
use crate::devices::virtio::{Activation, Persist, VirtioDevice};
use crate::memory::{Backing, PAGE};

const PAGES: u64 = 64;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;

struct Rig {
    device: Balloon,
    board: Board,
    drivers: [DriverQueue; 3],
}

/// A device with its rings in the first 16 pages, and in each page from there its own number.
fn rig() -> Rig {
    let memory = memory((PAGES * PAGE) as usize);
    let board = Board::new(&memory, 3);
    let drivers = [(0x1000, 8), (0x5000, 8), (0x9000, 32)]
        .map(|(base, size)| DriverQueue::new(&memory, base, size));
    let mut device = Balloon::new(Backing::Anonymous);
    board.activate(&mut device, &[&drivers[0], &drivers[1], &drivers[2]]);
    for page in 16..PAGES {
        memory.write_obj(page, GuestAddress(page * PAGE)).unwrap();
    }
    Rig {
        device,
        board,
        drivers,
    }
}

impl Rig {
    fn offer(&mut self, queue: usize, pieces: &[(u64, u32, bool)]) {
        self.drivers[queue].offer(pieces);
        self.device.process_queue(queue).unwrap();
        assert_eq!(self.drivers[queue].take_used().unwrap().1, 0);
    }

    /// The pages that were given back.
    fn given_back(&self) -> Vec<u64> {
        let first = |page: &u64| self.board.memory.read_obj::<u64>(GuestAddress(page * PAGE));
        (16..PAGES)
            .filter(|page| first(page).unwrap() == 0)
            .collect()
    }

    /// Page numbers into a page, and a chain with them.
    fn inflate(&mut self, numbers: &[u32]) {
        let at = 16 * PAGE;
        for (index, number) in (0..).zip(numbers) {
            let memory = &self.board.memory;
            memory
                .write_obj(*number, GuestAddress(at + 4 * index))
                .unwrap();
        }
        self.offer(INFLATE, &[(at, 4 * numbers.len() as u32, false)]);
    }
}

#[test]
fn free_pages_that_are_reported_go_back() {
    let mut rig = rig();
    let page = PAGE as u32;
    rig.offer(
        REPORTING,
        &[
            (20 * PAGE, 2 * page, true),
            (40 * PAGE, page, true),
            (22 * PAGE, page, true),
        ],
    );
    assert_eq!(rig.given_back(), [20, 21, 22, 40]);
    assert_eq!(rig.board.interrupts(), 1);
}

#[test]
fn ranges_that_are_no_memory_do_no_harm() {
    let mut rig = rig();
    let page = PAGE as u32;
    rig.offer(
        REPORTING,
        &[
            (PAGES * PAGE, page, true),
            (u64::MAX, u32::MAX, true),
            (u64::MAX - PAGE + 1, page, true),
            (30 * PAGE, 0, true),
            (30 * PAGE + 1, page, true),
            // A buffer that the device may only read is no report.
            (31 * PAGE, page, false),
        ],
    );
    assert!(rig.given_back().is_empty());
    // The same page twice, and a range that ends outside.
    rig.offer(
        REPORTING,
        &[(50 * PAGE, page, true), (50 * PAGE, page, true)],
    );
    rig.offer(REPORTING, &[(62 * PAGE, u32::MAX, true)]);
    assert_eq!(rig.given_back(), [50, 62, 63]);
}

#[test]
fn a_ring_that_the_driver_gives_back_itself_is_empty() {
    let mut rig = rig();
    rig.drivers[REPORTING].offer(&[(0, 16 * PAGE as u32, true)]);
    // Its descriptors and its ring are gone, in the middle of the work.
    let _ = rig.device.process_queue(REPORTING);
    let index: u16 = rig.board.memory.read_obj(GuestAddress(0xa002)).unwrap();
    assert_eq!(index, 0);
}

#[test]
fn a_chain_that_goes_round_ends() {
    let mut rig = rig();
    let driver = &mut rig.drivers[REPORTING];
    driver.describe(0, 20 * PAGE, PAGE as u32, NEXT | WRITE, 1);
    driver.describe(1, 21 * PAGE, PAGE as u32, NEXT | WRITE, 0);
    driver.publish(0);
    rig.device.process_queue(REPORTING).unwrap();
    assert_eq!(rig.given_back(), [20, 21]);
}

#[test]
fn the_balloon_takes_single_pages_and_lets_them_go() {
    let mut rig = rig();
    rig.inflate(&[20, 25, u32::MAX, 64, 63]);
    assert_eq!(rig.given_back(), [20, 25, 63]);
    // Deflating needs nothing: the pages can be written to.
    rig.offer(DEFLATE, &[(16 * PAGE, 8, false)]);
    let at = GuestAddress(20 * PAGE);
    rig.board.memory.write_obj(5_u64, at).unwrap();
    assert_eq!(rig.given_back(), [25, 63]);
}

#[test]
fn page_numbers_that_cannot_be_read_are_passed_over() {
    let mut rig = rig();
    rig.offer(
        INFLATE,
        &[
            (16 * PAGE, 3, false),
            (PAGES * PAGE, 8, false),
            (16 * PAGE, 8, false),
        ],
    );
    assert!(rig.given_back().is_empty());
    rig.offer(INFLATE, &[(u64::MAX - 1, u32::MAX, false)]);
    assert!(rig.given_back().is_empty());
}

#[test]
fn one_chain_takes_so_many_pages_and_no_more() {
    let mut rig = rig();
    let mut numbers = [20; 300];
    numbers[255] = 30;
    numbers[256] = 31;
    rig.inflate(&numbers);
    assert_eq!(rig.given_back(), [20, 30]);
}

#[test]
fn the_driver_reads_that_nobody_wants_a_larger_balloon() {
    let device = Balloon::new(Backing::Anonymous);
    let mut config = [0xff; 16];
    device.config().read(0, &mut config);
    assert_eq!(config, [0; 16]);
}

#[test]
fn a_report_of_the_template_is_done_before_the_freeze_and_the_child_goes_on() {
    let mut rig = rig();
    rig.drivers[REPORTING].offer(&[(20 * PAGE, PAGE as u32, true)]);
    rig.device.drain().unwrap();
    assert_eq!(rig.given_back(), [20]);
    assert!(rig.drivers[REPORTING].take_used().is_some());

    let states: Vec<_> = rig
        .device
        .queues()
        .iter()
        .map(|queue| queue.state())
        .collect();
    let mut child = Balloon::restore(Backing::Anonymous, &rig.device.save()).unwrap();
    child.activate(Activation {
        queues: rig.board.queues(&states),
        features: child.features(),
        interrupt: rig.board.interrupt.clone(),
    });
    rig.device = child;
    rig.offer(REPORTING, &[(21 * PAGE, PAGE as u32, true)]);
    assert_eq!(rig.given_back(), [20, 21]);
}

#[test]
fn a_device_without_a_driver_is_at_rest() {
    let mut device = Balloon::new(Backing::Anonymous);
    device.process_queue(REPORTING).unwrap();
    device.drain().unwrap();
}

proptest! {
    /// Nothing that a guest writes into the rings or reports makes the device fail in any other
    /// way than by saying that the ring is broken, and no page outside of what was named is lost.
    #[test]
    fn any_chain_is_taken(
        queue in 0_usize..3,
        descriptors in prop::collection::vec(
            (any::<u64>(), any::<u32>(), any::<u16>(), 0_u16..40), 8
        ),
        near in prop::collection::vec((0_u64..70 * PAGE, 0_u32..0x1_0000), 8),
        heads in prop::collection::vec(0_u16..40, 1..8),
        close in any::<bool>(),
    ) {
        let mut rig = rig();
        for (index, (wild, tame)) in (0..).zip(descriptors.iter().zip(&near)) {
            let (address, length) = if close { *tame } else { (wild.0, wild.1) };
            rig.drivers[queue].describe(index, address, length, wild.2, wild.3);
        }
        for head in heads {
            rig.drivers[queue].publish(head);
        }
        let memory = Arc::clone(&rig.board.memory);
        let _ = rig.device.process_queue(queue);
        prop_assert!(memory.read_obj::<u64>(GuestAddress(0)).is_ok());
    }
}
