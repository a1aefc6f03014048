//! The guest of `vsock.rs`: a first process that listens on some vsock ports. One file and only
//! the standard library, so that rustc alone makes it:
//!
//!     rustc --edition 2024 -O -C target-feature=+crt-static -o guest vmm/tests/vsock/guest.rs
//!     guest-image/build-initramfs guest vsock.cpio

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Mutex;
use std::thread;

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(socket: c_int, address: *const VsockAddress, length: u32) -> c_int;
    fn connect(socket: c_int, address: *const VsockAddress, length: u32) -> c_int;
    fn listen(socket: c_int, backlog: c_int) -> c_int;
    fn accept(socket: c_int, address: *mut c_void, length: *mut u32) -> c_int;
    fn shutdown(socket: c_int, how: c_int) -> c_int;
    fn iopl(level: c_int) -> c_int;
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
}

/// `struct sockaddr_vm`, vsock(7).
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;
const SHUT_WR: c_int = 1;

fn address(cid: u32, port: u32) -> VsockAddress {
    VsockAddress {
        family: AF_VSOCK as u16,
        reserved: 0,
        port,
        cid,
        zero: [0; 4],
    }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn vsock() -> io::Result<File> {
    // SAFETY: the call takes no pointer; the descriptor is new and nobody else's.
    unsafe { Ok(File::from_raw_fd(check(socket(AF_VSOCK, SOCK_STREAM, 0))?)) }
}

fn listen_on(port: u32, serve: fn(File) -> io::Result<()>) -> io::Result<()> {
    let listener = vsock()?;
    let (fd, any) = (listener.as_raw_fd(), address(ANY, port));
    // SAFETY: the address lives longer than the call.
    check(unsafe { bind(fd, &any, size_of::<VsockAddress>() as u32) })?;
    // SAFETY: no pointers.
    check(unsafe { listen(fd, 64) })?;
    thread::spawn(move || {
        loop {
            // SAFETY: no address is asked for; the descriptor is new and nobody else's.
            let Ok(fd) = check(unsafe {
                accept(
                    listener.as_raw_fd(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                )
            }) else {
                continue;
            };
            // SAFETY: as above.
            let connection = unsafe { File::from_raw_fd(fd) };
            thread::spawn(move || serve(connection));
        }
    });
    Ok(())
}

/// Sends back what comes, and its end.
fn echo(mut connection: File) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        match connection.read(&mut buffer)? {
            0 => break,
            count => connection.write_all(&buffer[..count])?,
        }
    }
    // SAFETY: no pointers.
    check(unsafe { shutdown(connection.as_raw_fd(), SHUT_WR) })?;
    // Only then closed by the other side.
    while connection.read(&mut buffer)? > 0 {}
    Ok(())
}

/// Reads to the end, then says how much it was, and its FNV-1a hash.
fn count(mut connection: File) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    let (mut total, mut hash) = (0, 0xcbf2_9ce4_8422_2325_u64);
    loop {
        let length = connection.read(&mut buffer)?;
        if length == 0 {
            break;
        }
        total += length;
        for byte in &buffer[..length] {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
    writeln!(connection, "{total} {hash:x}")
}

/// Reads a length of 8 bytes, and sends as many bytes of a pattern.
fn source(mut connection: File) -> io::Result<()> {
    let mut length = [0; 8];
    connection.read_exact(&mut length)?;
    let mut left = u64::from_le_bytes(length) as usize;
    let pattern: Vec<u8> = (0..1usize << 18)
        .map(|i| (i * 131 + (i >> 11)) as u8)
        .collect();
    while left > 0 {
        let piece = left.min(pattern.len());
        connection.write_all(&pattern[..piece])?;
        left -= piece;
    }
    Ok(())
}

/// Reads to the end, keeps that, and says all that was kept since the boot.
fn notes(mut connection: File) -> io::Result<()> {
    static KEPT: Mutex<Vec<u8>> = Mutex::new(Vec::new());
    let mut note = Vec::new();
    connection.read_to_end(&mut note)?;
    let mut kept = KEPT.lock().map_err(|_| io::Error::other("poisoned"))?;
    kept.extend(note);
    connection.write_all(&kept)
}

/// Says what it finds of the devices.
fn facts(mut connection: File) -> io::Result<()> {
    let mut devices: Vec<_> = fs::read_dir("/sys/bus/virtio/devices")?
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("device")).ok())
        .map(|device| device.trim().to_owned())
        .collect();
    devices.sort();
    writeln!(connection, "devices {}", devices.join(" "))?;
    let bound = fs::read_dir("/sys/bus/virtio/devices")?
        .filter(|entry| {
            entry
                .as_ref()
                .is_ok_and(|entry| entry.path().join("driver").exists())
        })
        .count();
    writeln!(connection, "drivers {bound}")?;
    let mut random = [0; 16];
    File::open("/dev/hwrng")?.read_exact(&mut random)?;
    writeln!(connection, "random {random:02x?}")?;
    for interface in ["eth0", "eth1"] {
        let mac = fs::read_to_string(format!("/sys/class/net/{interface}/address"))?;
        writeln!(connection, "{interface} {}", mac.trim())?;
    }
    let refused = dial(77).err().map(|error| error.kind());
    writeln!(connection, "host {refused:?}")
}

/// Tries to connect to the host.
fn dial(port: u32) -> io::Result<()> {
    let (socket, host) = (vsock()?, address(HOST, port));
    // SAFETY: the address lives longer than the call.
    check(unsafe { connect(socket.as_raw_fd(), &host, size_of::<VsockAddress>() as u32) })?;
    Ok(())
}

fn mount_at(kind: &CStr, target: &CStr) -> io::Result<()> {
    // SAFETY: all are strings that end with a zero, or null where that is allowed.
    check(unsafe {
        mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    })?;
    Ok(())
}

/// Writes to the port by which an agent says that it listens.
fn tell(value: u8) {
    // SAFETY: the monitor takes the write; memory is not touched. iopl() has allowed it.
    unsafe { std::arch::asm!("out dx, al", in("dx") 0x510_u16, in("al") value) };
}

fn main() -> io::Result<()> {
    mount_at(c"devtmpfs", c"/dev")?;
    mount_at(c"proc", c"/proc")?;
    mount_at(c"sysfs", c"/sys")?;
    listen_on(2000, echo)?;
    listen_on(2001, count)?;
    listen_on(2002, source)?;
    listen_on(2003, facts)?;
    listen_on(2004, notes)?;
    // SAFETY: no pointers.
    check(unsafe { iopl(3) })?;
    println!("the guest listens");
    tell(1);
    tell(2);
    println!("the guest goes on");
    loop {
        thread::park();
    }
}
