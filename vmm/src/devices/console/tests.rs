//! Tests of the console.

use std::fs::File;
use std::io::Read;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{Board, DriverQueue, memory};
use crate::devices::virtio::{Persist, VirtioDevice};

const BUFFER: u64 = 0x1_0000;
const TRANSMIT: usize = 1;

struct Machine {
    device: Console,
    board: Board,
    receive: DriverQueue,
    transmit: DriverQueue,
}

impl Machine {
    fn new(file: Option<File>) -> Self {
        let memory = memory(0x10_0000);
        let board = Board::new(&memory, 2);
        let receive = DriverQueue::new(&memory, 0x1000, 8);
        let transmit = DriverQueue::new(&memory, 0x5000, 64);
        let mut device = Console::new(file.map(Output::shared));
        board.activate(&mut device, &[&receive, &transmit]);
        Self {
            device,
            board,
            receive,
            transmit,
        }
    }

    fn print(&mut self, text: &[u8]) {
        self.board
            .memory
            .write_slice(text, GuestAddress(BUFFER))
            .unwrap();
        self.transmit.offer(&[(BUFFER, text.len() as u32, false)]);
        self.device.process_queue(TRANSMIT).unwrap();
        assert_eq!(self.transmit.take_used().unwrap().1, 0);
    }
}

/// A file, and the same file to read what was written to it.
fn file() -> (File, File) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let reader = file.reopen().unwrap();
    (file.into_file(), reader)
}

fn content(mut file: File) -> Vec<u8> {
    let mut content = Vec::new();
    file.read_to_end(&mut content).unwrap();
    content
}

#[test]
fn output_goes_to_the_file_in_order() {
    let (file, reader) = file();
    let mut machine = Machine::new(Some(file));
    machine.print(b"one ");
    machine.print(b"two ");
    machine
        .transmit
        .offer(&[(BUFFER, 3, false), (BUFFER, 2, false), (BUFFER, 9, true)]);
    machine.device.drain().unwrap();
    assert_eq!(content(reader), b"one two twotw");
}

#[test]
fn the_guest_cannot_fill_the_disk() {
    let (file, reader) = file();
    let mut machine = Machine::new(Some(file));
    let page = [b'x'; 0x1_0000];
    for _ in 0..(MAX_OUTPUT / 0x1_0000 + 10) {
        machine.print(&page);
    }
    let content = content(reader);
    assert!(content.len() as u64 <= MAX_OUTPUT + 100);
    assert!(content.ends_with(b"the limit is reached]\n"));
}

#[test]
fn nor_with_buffers_that_end_outside_of_memory() {
    let (file, reader) = file();
    let mut machine = Machine::new(Some(file));
    for _ in 0..10 {
        machine.transmit.offer(&[(BUFFER, u32::MAX, false)]);
        machine.device.process_queue(TRANSMIT).unwrap();
        assert!(machine.transmit.take_used().is_some());
    }
    assert!(content(reader).is_empty());
}

#[test]
fn the_limit_is_one_for_all_that_print() {
    let (file, reader) = file();
    let output = Output::shared(file);
    let mut machine = Machine::new(None);
    machine.device = Console::new(Some(output.clone()));
    machine
        .board
        .activate(&mut machine.device, &[&machine.receive, &machine.transmit]);
    output.write(&vec![b'x'; MAX_OUTPUT as usize - 3]);
    machine.print(b"12345");
    output.write(b"more");
    let content = content(reader);
    assert!(content[MAX_OUTPUT as usize - 4..].starts_with(b"x123\n["));
    assert!(content.ends_with(b"the limit is reached]\n"));
}

#[test]
fn output_without_a_file_is_discarded() {
    let mut machine = Machine::new(None);
    machine.print(b"to nobody");
}

#[test]
fn a_file_that_cannot_be_written_is_given_up() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut machine = Machine::new(Some(full));
    machine.print(b"one");
    machine.print(b"two");
}

#[test]
fn what_does_not_lie_in_memory_is_not_printed() {
    let (file, reader) = file();
    let mut machine = Machine::new(Some(file));
    for (address, length) in [
        (0x10_0000, 10),
        (u64::MAX - 2, 10),
        (BUFFER, 0),
        (BUFFER, u32::MAX),
    ] {
        machine.transmit.offer(&[(address, length, false)]);
        machine.device.process_queue(TRANSMIT).unwrap();
        assert!(machine.transmit.take_used().is_some());
    }
    machine.print(b"text");
    assert_eq!(content(reader), b"text");
}

#[test]
fn buffers_for_input_stay_where_they_are() {
    let mut machine = Machine::new(None);
    machine.receive.offer(&[(BUFFER, 4096, true)]);
    machine.device.process_queue(0).unwrap();
    machine.device.drain().unwrap();
    assert!(machine.receive.take_used().is_none());
}

#[test]
fn a_fork_prints_to_its_own_file() {
    let (template, template_reader) = file();
    let mut machine = Machine::new(Some(template));
    machine.print(b"template");
    let queues: Vec<_> = machine
        .device
        .queues()
        .iter()
        .map(|queue| queue.state())
        .collect();
    let (child, child_reader) = file();
    let mut restored =
        Console::restore(Some(Output::shared(child)), &machine.device.save()).unwrap();
    restored.activate(crate::devices::virtio::Activation {
        queues: machine.board.queues(&queues),
        features: restored.features(),
        interrupt: machine.board.interrupt.clone(),
    });
    machine.device = restored;
    machine.print(b"child");
    assert_eq!(content(template_reader), b"template");
    assert_eq!(content(child_reader), b"child");
}
