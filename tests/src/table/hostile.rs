//! Hostile programs, as root with every capability of the container.

use crate::{
    case::{Case, row, scenario},
    container::{BUSYBOX, PYTHON, ctr},
    failure::{Failure, ensure},
    scene::Scene,
};

const NO_MACHINE: &str = "with runc these are the host's own, and reach it";

const PRIVILEGED: [&str; 2] = ["--privileged", "--privileged-without-host-devices"];

pub(super) fn cases() -> Vec<Case> {
    vec![
        row(
            "hostile/agent-is-out-of-reach",
            ctr(PYTHON)
                .option(&PRIVILEGED)
                .python(VSOCK)
                .stdout("done\n"),
        )
        .forkvm_only(NO_MACHINE),
        row(
            "hostile/no-way-to-the-devices",
            ctr(PYTHON)
                .option(&PRIVILEGED)
                .python(HARDWARE)
                .stdout("done\n"),
        )
        .forkvm_only(NO_MACHINE),
        row(
            "hostile/writes-to-every-port",
            ctr(PYTHON)
                .option(&PRIVILEGED)
                .python(PORTS)
                .stdout("done\n"),
        )
        .forkvm_only(NO_MACHINE),
        scenario("hostile/exports-mounted-anew", mounts_the_exports).forkvm_only(NO_MACHINE),
        scenario("hostile/takes-its-devices-away", unbinds_devices).forkvm_only(NO_MACHINE),
    ]
}

/// The agent's ports are bound, and nobody in the guest connects to them; neither to any of the host's.
const VSOCK: &str = r"
import socket
AGENT, STREAM = 1024, 1025
for cid, port in [(0, AGENT), (1, AGENT), (2, AGENT), (2, STREAM), (2, 22), (2, 111), (3, AGENT), (3, STREAM), (0xffffffff, AGENT)]:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as s:
        s.settimeout(3)
        try:
            s.connect((cid, port))
            print('connected to', cid, port)
        except OSError:
            pass
for port in AGENT, STREAM:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as s:
        try:
            s.bind((0xffffffff, port))
            print('took', port)
        except OSError:
            pass
print('done')
";

/// I/O ports, which root may use: the agent's own, the early console's, and all others but those of KVM's interrupt
/// controllers and timer, by which a guest would stop itself.
const PORTS: &str = r"
import ctypes, mmap
IOPL = 172
if ctypes.CDLL(None).syscall(IOPL, 3) != 0:
    print('no right to use ports')
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
# mov edx, edi; mov eax, esi; out dx, al; ret
code.write(bytes.fromhex('89fa89f0eec3'))
out = ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.c_uint)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
for value in range(300):
    out(0x510, value & 3)
    out(0x3f8, value & 255)
for port in range(0, 0x10000, 7):
    if port not in range(0x20, 0x22) and port not in range(0x40, 0x44) and port not in range(0xa0, 0xa2) and port not in (0x61, 0x4d0, 0x4d1):
        out(port, 255)
print('done')
";

/// Physical memory and the kernel itself are closed to root.
const HARDWARE: &str = r"
import ctypes, os, stat
libc = ctypes.CDLL(None, use_errno=True)
for name, minor in ('mem', 1), ('kmem', 2), ('port', 4):
    os.mknod('/' + name, 0o600 | stat.S_IFCHR, os.makedev(1, minor))
    try:
        os.open('/' + name, os.O_RDWR)
        print(name, 'opens')
    except OSError:
        pass
INIT_MODULE, FINIT_MODULE, KEXEC_LOAD, KEXEC_FILE_LOAD = 175, 313, 246, 320
for call in (INIT_MODULE, 0, 0, 0), (FINIT_MODULE, 0, 0, 0), (KEXEC_LOAD, 0, 0, 0, 0), (KEXEC_FILE_LOAD, 0, 0, 0, 0, 0):
    if libc.syscall(*call) != -1:
        print('system call', call[0], 'succeeds')
if os.path.exists('/proc/kcore') and os.access('/proc/kcore', os.R_OK):
    try:
        print('kcore', len(open('/proc/kcore', 'rb').read(1)))
    except OSError:
        pass
print('done')
";

/// The file system under the container's own: nothing but its exports, and a read-only one stays so.
fn mounts_the_exports(scene: &Scene<'_>) -> Result<(), Failure> {
    scene.write("data/file", "as it was")?;
    scene.write("beside", "not exported")?;
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:ro",
        scene.path_text("data")
    );
    let script = "mkdir /mnt; mount -t virtiofs forkvm /mnt && for f in $(find /mnt -maxdepth 2 -name file); do \
                  echo found; echo x >$f; echo x >${f%/*}/new; chmod 777 $f; mv $f ${f%/*}/other; \
                  test -e ${f%/*}/../beside && echo out; done 2>/dev/null; true";
    let container = ctr(BUSYBOX)
        .option(&PRIVILEGED)
        .option(&["--mount", &mount])
        .sh(script);
    let output = scene.run(&container)?;
    let text = output.text();
    ensure(text.contains("found") && !text.contains("out"), || {
        format!("an export is not found, or what is beside it is: {text:?}")
    })?;
    let file = scene.read(scene.path("data/file"))?;
    ensure(
        file == "as it was" && !scene.path("data/new").exists(),
        || format!("a read-only volume was changed: {file:?}"),
    )
}

/// A guest without its vsock and its root can be ended like any other, and the next one works.
fn unbinds_devices(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = ctr(BUSYBOX)
        .option(&PRIVILEGED)
        .sh("cp /bin/busybox /dev/shm/b; mount -o remount,rw /sys; cd /sys/bus/virtio/drivers; echo ready; \
             for d in */virtio*; do echo ${d#*/} >${d%/*}/unbind; done; exec /dev/shm/b sleep 1000")
        .exits(137);
    let (id, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    scene.ok(["ctr", "task", "kill", "--signal", "KILL", &id])?;
    scene.finish(&container, running)?;
    let next = ctr(BUSYBOX).sh("echo alive").stdout("alive\n");
    scene.run(&next).map(drop)
}
