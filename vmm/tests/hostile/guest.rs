//! The guest of `hostile.rs`: a kernel of its own that does to the devices what no driver does. One file, no library, so
//! that rustc alone makes it:
//!
//!     rustc --edition 2024 -O -C panic=abort -C relocation-model=static -C target-feature=+crt-static \
//!         -C link-args="-nostartfiles -nostdlib -static" -o hostile.elf vmm/tests/hostile/guest.rs
//!
//! Its command line ends with `hostile=SEED`. It prints `DONE` on the early console and ends by a triple fault.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

/// Where the registers of the six devices are, a page each (docs/devices.md).
const DEVICES: u64 = 0xd000_0000;
const SERIAL: u16 = 0x3f8;
const READY: u16 = 0x510;

/// Registers of virtio over MMIO (virtio 1.2, section 4.2.2).
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;

/// Memory that the devices are pointed at: 16 MiB from here on are the rings and their buffers.
const POOL: u64 = 0x200_0000;
const POOL_BYTES: u64 = 16 << 20;

// The processor is in 64-bit mode with 1 GiB mapped one to one by tables at 0x9000 (vmm/src/boot.rs). Compiled code uses
// SSE, which is off until CR4 says so.
global_asm!(
    ".globl _start",
    "_start:",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "mov rax, cr0",
    "and rax, ~4",
    "or rax, 2",
    "mov cr0, rax",
    "lea rsp, [rip + stack_end]",
    "mov rdi, rsi",
    "call main",
    ".bss",
    ".balign 4096",
    "window: .space 4096",
    ".space 65536",
    "stack_end:",
    ".text",
);

unsafe extern "C" {
    static mut window: [u64; 512];
}

/// Xorshift (Marsaglia, "Xorshift RNGs"): a seed gives the same attacks again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// An address: mostly in the pool, sometimes at the end of memory, sometimes anywhere.
    fn address(&mut self) -> u64 {
        match self.below(16) {
            0 => self.next(),
            1 => DEVICES + self.below(0x7000),
            2 => (256 << 20) - self.below(64),
            _ => POOL + self.below(POOL_BYTES),
        }
    }

    fn length(&mut self) -> u32 {
        match self.below(8) {
            0 => self.next() as u32,
            1 => 0,
            _ => self.below(0x3000) as u32,
        }
    }
}

fn write32(address: u64, value: u32) {
    // SAFETY: this program owns all of the machine's memory and devices.
    unsafe { (address as *mut u32).write_volatile(value) };
}

fn read32(address: u64) -> u32 {
    // SAFETY: as above.
    unsafe { (address as *const u32).read_volatile() }
}

fn write<T>(address: u64, value: T) {
    // SAFETY: as above; the addresses that this is called with lie in the pool.
    unsafe { (address as *mut T).write_unaligned(value) };
}

fn out(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

fn print(text: &[u8]) {
    text.iter().for_each(|byte| out(SERIAL, *byte));
}

/// Maps the devices' registers.
fn map_devices() {
    let table = &raw mut window;
    for index in 0..512_u64 {
        // Present, writable, a page of 2 MiB.
        write(
            table as u64 + index * 8,
            (0xc000_0000 + (index << 21)) | 0x83,
        );
    }
    // The fourth GiB.
    write(0xa000_u64 + 3 * 8, table as u64 | 3);
}

/// Anything into any register, in any width.
fn registers(random: &mut Random) {
    for _ in 0..3000 {
        let address = DEVICES + random.below(0x7000);
        let value = random.next();
        match random.below(8) {
            // SAFETY: as above.
            0 => unsafe { (address as *mut u8).write_volatile(value as u8) },
            // SAFETY: as above.
            1 => unsafe { ((address & !1) as *mut u16).write_volatile(value as u16) },
            // SAFETY: as above.
            2 => unsafe { ((address & !7) as *mut u64).write_volatile(value) },
            3 => drop(read32(address & !3)),
            _ => write32(address & !3, value as u32 >> random.below(32)),
        }
    }
}

/// Brings a device up as a driver does, with rings in the pool.
fn activate(device: u64, random: &mut Random) {
    write32(device + STATUS, 0);
    write32(device + STATUS, 1);
    write32(device + STATUS, 3);
    for half in 0..2 {
        write32(device + 0x14, half);
        let offered = read32(device + 0x10);
        write32(device + DRIVER_FEATURES_SEL, half);
        let taken = if half == 0 && random.below(2) == 0 {
            0
        } else {
            offered
        };
        write32(device + DRIVER_FEATURES, taken);
    }
    write32(device + STATUS, 11);
    for queue in 0..3 {
        write32(device + QUEUE_SEL, queue);
        write32(device + QUEUE_NUM, QUEUE_SIZE as u32);
        let rings = rings(queue.into());
        for (register, address) in [
            (QUEUE_DESC, rings),
            (QUEUE_DRIVER, rings + 0x1000),
            (QUEUE_DEVICE, rings + 0x2000),
        ] {
            write32(device + register, address as u32);
            write32(device + register + 4, (address >> 32) as u32);
        }
        write32(device + QUEUE_READY, 1);
    }
    write32(device + STATUS, 15);
}

const QUEUE_SIZE: u64 = 8;

fn rings(queue: u64) -> u64 {
    POOL + queue * 0x4000
}

/// Chains that a driver would never make, for the devices in these slots.
fn queues(random: &mut Random, slots: &[u64]) {
    for _ in 0..150 {
        let slot = slots[random.below(slots.len() as u64) as usize];
        let device = DEVICES + slot * 0x1000;
        activate(device, random);
        for _ in 0..8 {
            let queue = random.below(3);
            let rings = rings(queue);
            for index in 0..QUEUE_SIZE {
                let descriptor = rings + index * 16;
                write(descriptor, random.address());
                write(descriptor + 8, random.length());
                write(descriptor + 12, random.below(8) as u16);
                write(descriptor + 14, random.below(QUEUE_SIZE + 1) as u16);
                write(
                    rings + 0x1004 + index * 2,
                    random.below(QUEUE_SIZE + 1) as u16,
                );
            }
            let ahead = if random.below(8) == 0 {
                random.next()
            } else {
                random.below(QUEUE_SIZE + 1)
            };
            write(rings + 0x1000, random.below(2) as u16);
            write(rings + 0x1002, ahead as u16);
            fill(random);
            write32(device + QUEUE_NOTIFY, queue as u32);
        }
    }
}

/// Headers at places where a device will find them: packets of vsock, requests for files.
fn fill(random: &mut Random) {
    for _ in 0..16 {
        let at = POOL + 0x10_0000 + random.below(0x1000) * 16;
        for word in 0..10 {
            write(at + word * 8, random.next());
        }
    }
}

/// Requests that are well-formed, for files that are not there, are not the guest's, or lead out.
fn files(random: &mut Random) {
    const NAMES: [&[u8]; 8] = [
        b"rootfs\0",
        b"..\0",
        b".\0",
        b"/etc/passwd\0",
        b"a\0",
        b"../beside\0",
        b"link\0",
        b"b\0c\0",
    ];
    let device = DEVICES + 0x1000;
    let buffers = POOL + 0x10_0000;
    activate(device, random);
    let rings = rings(1);
    for request in 0..1500_u64 {
        // One chain of two: a request, and room for its answer.
        let body = buffers + 40;
        for word in 0..16 {
            let value = match random.below(4) {
                0 => random.next(),
                1 => 0,
                _ => random.below(24),
            };
            write(body + word * 8, value);
        }
        // INIT first; most requests then have a name behind their fixed part.
        let opcode = if request == 0 {
            26
        } else {
            1 + random.below(53) as u32
        };
        if request == 0 {
            write(body, 7_u32);
            write(body + 4, 38_u32);
        }
        let fixed = [0, 0, 8, 16, 24, 40][random.below(6) as usize];
        let name = NAMES[random.below(8) as usize];
        for (index, byte) in (0_u64..).zip(name) {
            write(body + fixed + index, *byte);
        }
        let length = 40
            + if request == 0 {
                64
            } else {
                fixed as u32 + name.len() as u32
            };
        write(buffers, length);
        write(buffers + 4, opcode);
        write(buffers + 8, request + 1);
        write(buffers + 16, 1 + random.below(12));
        write(buffers + 24, random.below(3) as u32);
        write(buffers + 28, random.below(3) as u32);
        write(buffers + 32, 1_u32);
        write(buffers + 36, 0_u32);
        write(rings, buffers);
        write(rings + 8, length);
        write(rings + 12, 1_u16);
        write(rings + 14, 1_u16);
        write(rings + 16, buffers + 0x1000);
        write(rings + 24, 0x2000_u32);
        write(rings + 28, 2_u16);
        write(rings + 0x1004 + request % QUEUE_SIZE * 2, 0_u16);
        write(rings + 0x1002, (request + 1) as u16);
        write32(device + QUEUE_NOTIFY, 1);
        // Answered, or out of service. Each look is an exit, so the monitor gets on.
        while read_ring(rings + 0x2002) != (request + 1) as u16 {
            if read32(device + STATUS) & 0x40 != 0 {
                return;
            }
        }
    }
    print(b"FILES\n");
}

fn read_ring(address: u64) -> u16 {
    // SAFETY: as above.
    unsafe { (address as *const u16).read_volatile() }
}

/// More than the console's file may get, by both consoles, and signals that only an agent gives.
fn flood(random: &mut Random) {
    for _ in 0..2000 {
        out(READY, random.next() as u8 & 3);
        out(SERIAL, b'x');
    }
    let device = DEVICES + 0x3000;
    activate(device, random);
    let rings = rings(1);
    for request in 0..8_u64 {
        write(rings, POOL + 0x10_0000);
        write(rings + 8, 1_u32 << 20);
        write(rings + 12, 0_u32);
        write(rings + 0x1004 + request * 2, 0_u16);
        write(rings + 0x1002, (request + 1) as u16);
        write32(device + QUEUE_NOTIFY, 1);
        while read_ring(rings + 0x2002) != (request + 1) as u16 {
            if read32(device + STATUS) & 0x40 != 0 {
                return;
            }
        }
    }
    print(b"more");
}

fn seed(zero_page: u64) -> u64 {
    // The boot protocol's cmd_line_ptr.
    let line = u64::from(read32(zero_page + 0x228));
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    for at in 0..2048 {
        // SAFETY: as above.
        let byte = unsafe { ((line + at) as *const u8).read() };
        if byte == 0 {
            break;
        }
        seed = (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    }
    seed | 1
}

#[unsafe(no_mangle)]
extern "C" fn main(zero_page: u64) -> ! {
    map_devices();
    let mut random = Random(seed(zero_page));
    registers(&mut random);
    queues(&mut random, &[0, 1, 2, 4, 5]);
    files(&mut random);
    print(b"DONE\n");
    // What is printed is limited: the console comes last.
    queues(&mut random, &[3]);
    flood(&mut random);
    loop {
        // SAFETY: an empty table of interrupts makes the breakpoint a triple fault.
        unsafe { asm!("lidt [{}]", "int3", in(reg) &[0_u64; 2]) };
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    print(b"PANIC\n");
    loop {
        // SAFETY: as in main.
        unsafe { asm!("lidt [{}]", "int3", in(reg) &[0_u64; 2]) };
    }
}

/// What compiled code may call (the language's own requirements of `core`).
#[unsafe(no_mangle)]
extern "C" fn memset(start: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller says so.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") start => _, in("al") value as u8)
    };
    start
}

/// As above.
#[unsafe(no_mangle)]
extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller says so.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _)
    };
    to
}
