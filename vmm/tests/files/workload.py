"""What programs do with files, on the monitor's file server. Runs in the test's guest as root of a
Debian; prints one line for each check and the number of those that failed."""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import socket
import sqlite3
import stat
import tarfile
import time
import traceback

checks = []
libc = ctypes.CDLL(None, use_errno=True)


def check(function):
    checks.append(function)
    return function


def refused(number, function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        assert error.errno == number, f"{error} instead of {errno.errorcode[number]}"
    else:
        raise AssertionError(f"done instead of {errno.errorcode[number]}")


def child(function, uid=0):
    """Runs a function in a process of its own; its exit status must be 0."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if uid:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    return pid


def ended(*pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0, "a child failed"


@check
def exports_are_file_systems_of_their_own():
    devices = {os.stat(path).st_dev for path in ("/", "/mnt/volume", "/mnt/read-only")}
    assert len(devices) == 3, devices
    assert open("/etc/hosts").read() == "127.0.0.1 localhost\n"


@check
def files_hold_what_is_written():
    data = os.urandom(1 << 20) * 8
    with open("/result", "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    assert hashlib.sha256(open("/result", "rb").read()).digest() == hashlib.sha256(data).digest()
    assert os.stat("/result").st_size == len(data)
    with open("/result.sum", "w") as file:
        file.write(hashlib.sha256(data).hexdigest())


@check
def a_first_write_of_an_image_file_while_it_is_mapped():
    path = "/etc/debian_version"
    before = os.stat(path)
    old = os.open(path, os.O_RDONLY)
    mapped = mmap.mmap(old, 0, prot=mmap.PROT_READ)
    first = mapped[:]
    writer = os.open(path, os.O_RDWR)
    shared = mmap.mmap(writer, 0)
    shared[0:2] = b"XY"
    shared.flush()
    assert mapped[:2] == b"XY", "the older mapping sees it"
    assert os.pread(old, 2, 0) == b"XY", "what was open before sees it"
    assert open(path, "rb").read() == b"XY" + first[2:]
    after = os.stat(path)
    assert (after.st_ino, after.st_dev) == (before.st_ino, before.st_dev)
    assert os.fstat(old).st_ino == after.st_ino


@check
def a_mount_point_stays_one_when_it_is_copied_up():
    path = "/srv"
    directory = os.open(path, os.O_RDONLY)
    assert libc.mount(b"none", path.encode(), b"tmpfs", 0, None) == 0, ctypes.get_errno()
    os.fchmod(directory, 0o711)
    made = os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
    os.close(made)
    time.sleep(1.1)  # Until the guest has to ask again for the name.
    assert os.path.ismount(path)
    assert os.listdir(path) == [] and os.listdir(directory) == ["made"]
    assert libc.umount(path.encode()) == 0
    assert os.stat(path).st_mode & 0o777 == 0o711
    assert os.listdir(path) == ["made"]


@check
def databases_lock_and_share_memory():
    for mode in ("wal", "delete"):
        path = f"/var/tmp/{mode}.db"
        base = sqlite3.connect(path)
        assert base.execute(f"pragma journal_mode={mode}").fetchone()[0] == mode
        base.execute("create table t (who int, n int)")
        base.commit()
        base.close()

        def insert(who):
            base = sqlite3.connect(path, timeout=120)
            for n in range(20):
                with base:
                    base.execute("insert into t values (?, ?)", (who, n))
            base.close()

        ended(*[child(lambda who=who: insert(who)) for who in range(3)])
        base = sqlite3.connect(path)
        assert base.execute("select count(*) from t").fetchone()[0] == 60
        assert base.execute("pragma integrity_check").fetchone()[0] == "ok"
        base.close()


@check
def locks_hold_between_processes():
    for path in ("/var/tmp/lock", "/mnt/volume/lock"):
        file = os.open(path, os.O_CREAT | os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)

        def other():
            again = os.open(path, os.O_RDWR)
            refused(errno.EAGAIN, fcntl.flock, again, fcntl.LOCK_EX | fcntl.LOCK_NB)

        ended(child(other))
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.lockf(file, fcntl.LOCK_EX, 10)

        def other_range():
            again = os.open(path, os.O_RDWR)
            refused(errno.EAGAIN, fcntl.lockf, again, fcntl.LOCK_EX | fcntl.LOCK_NB, 5)
            fcntl.lockf(again, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 20)

        ended(child(other_range))
        os.close(file)


@check
def appends_do_not_meet():
    path = "/var/tmp/log"

    def write(who):
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for n in range(100):
            os.write(file, f"{who} {n:05}\n".encode())

    ended(child(lambda: write("a")), child(lambda: write("b")))
    lines = open(path).read().splitlines()
    assert len(lines) == 200 and all(len(line) == 7 for line in lines)


@check
def names_move_and_go():
    os.mkdir("/var/tmp/n")
    os.chdir("/var/tmp/n")
    open("a", "w").write("a")
    os.link("a", "b")
    os.symlink("a", "l")
    assert os.stat("a").st_ino == os.stat("b").st_ino == os.stat("l").st_ino
    assert os.stat("a").st_nlink == 2 and os.readlink("l") == "a"
    held = open("a", "r+")
    open("c", "w").write("c")
    os.rename("c", "a")
    assert open("a").read() == "c" and open("b").read() == "a" and held.read() == "a"
    os.unlink("b")
    assert os.fstat(held.fileno()).st_nlink == 0
    held.seek(0)
    held.write("still")
    held.seek(0)
    assert held.read() == "still"
    held.close()
    os.mkdir("d")
    os.chdir("d")
    os.rmdir("../d")
    assert os.listdir(".") == []
    os.chdir("/")
    refused(errno.ENOTEMPTY, os.rmdir, "/var/tmp/n")
    refused(errno.EXDEV, os.rename, "/var/tmp/n/a", "/mnt/volume/a")
    shutil.rmtree("/var/tmp/n")


@check
def files_without_names():
    file = os.open("/var/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(file, b"x")
    # os.link does not follow the link in /proc: AT_FDCWD and AT_SYMLINK_FOLLOW of linkat(2).
    path = f"/proc/self/fd/{file}".encode()
    assert ctypes.CDLL(None).linkat(-100, path, -100, b"/var/tmp/named", 0x400) == 0
    assert open("/var/tmp/named").read() == "x"


@check
def owners_and_bits():
    os.mkdir("/var/tmp/o")
    os.chown("/var/tmp/o", 0, 50)
    os.chmod("/var/tmp/o", 0o2777)
    os.chdir("/var/tmp/o")

    def other():
        os.umask(0o027)
        open("f", "w").write("x")
        os.mkdir("d")
        found = os.stat("f")
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1000, 50, 0o640)
        found = os.stat("d")
        assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1000, 50, 0o2750)
        refused(errno.EACCES, open, "/etc/shadow")
        refused(errno.EACCES, open, "/etc/new", "w")
        refused(errno.EPERM, os.chown, "f", 0, 0)

    ended(child(other, 1000))
    open("program", "w").write("x")
    os.chmod("program", 0o6777)
    with open("program", "a") as file:
        file.write("by root")
    assert os.stat("program").st_mode & 0o7777 == 0o6777

    def write():
        with open("program", "a") as file:
            file.write("by another")

    ended(child(write, 1000))
    assert os.stat("program").st_mode & 0o7777 == 0o777
    os.utime("f", ns=(1_000_000_001, 2_000_000_002))
    found = os.stat("f")
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    os.chdir("/")


@check
def access_control_lists_are_refused():
    path = "/var/tmp/acl"
    open(path, "w").write("x")
    os.chmod(path, 0o600)
    entry = lambda tag, rights, who=0xFFFFFFFF: (
        tag.to_bytes(2, "little") + rights.to_bytes(2, "little") + who.to_bytes(4, "little")
    )
    acl = (2).to_bytes(4, "little") + entry(1, 6) + entry(2, 4, 1000)
    acl += entry(4, 0) + entry(16, 4) + entry(32, 0)
    # The guest's kernel does not turn them on for a file system within another (docs/files.md).
    refused(errno.EOPNOTSUPP, os.setxattr, path, "system.posix_acl_access", acl)


@check
def extended_attributes():
    path = "/var/tmp/x"
    open(path, "w").close()
    os.setxattr(path, "user.a", b"1")
    assert os.getxattr(path, "user.a") == b"1" and "user.a" in os.listxattr(path)
    os.removexattr(path, "user.a")
    refused(errno.ENODATA, os.getxattr, path, "user.a")
    capability = bytes([1, 0, 0, 2, 0, 0x20]) + bytes(14)
    os.setxattr(path, "security.capability", capability)
    assert os.getxattr(path, "security.capability")[:6] == capability[:6]
    refused(errno.EOPNOTSUPP, os.setxattr, path, "trusted.a", b"1")


@check
def holes_and_ranges():
    file = os.open("/var/tmp/sparse", os.O_CREAT | os.O_RDWR)
    os.pwrite(file, b"x" * 4096, 1 << 20)
    os.fsync(file)
    assert os.lseek(file, 0, os.SEEK_DATA) == 1 << 20
    assert os.lseek(file, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 4096
    os.posix_fallocate(file, 0, 2 << 20)
    assert os.fstat(file).st_size == 2 << 20
    os.ftruncate(file, 10)
    assert os.fstat(file).st_size == 10
    other = os.open("/var/tmp/copied", os.O_CREAT | os.O_RDWR)
    source = os.open("/etc/passwd", os.O_RDONLY)
    size = os.fstat(source).st_size
    assert os.copy_file_range(source, other, size) == size
    assert os.pread(other, size, 0) == os.pread(source, size, 0)


@check
def pipes_and_sockets_are_the_guests():
    os.mkfifo("/var/tmp/fifo")
    pid = child(lambda: open("/var/tmp/fifo", "w").write("through"))
    assert open("/var/tmp/fifo").read() == "through"
    ended(pid)
    server = socket.socket(socket.AF_UNIX)
    server.bind("/var/tmp/socket")
    server.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("/var/tmp/socket")
    server.accept()[0].send(b"hello")
    assert client.recv(9) == b"hello"
    os.mknod("/var/tmp/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert open("/var/tmp/null").read() == ""


@check
def large_directories():
    os.mkdir("/var/tmp/many")
    for n in range(1500):
        os.close(os.open(f"/var/tmp/many/file-{n}", os.O_CREAT | os.O_WRONLY))
    assert len(os.listdir("/var/tmp/many")) == 1500
    with os.scandir("/var/tmp/many") as entries:
        for n, entry in enumerate(entries):
            if n % 2:
                os.unlink(entry.path)
    assert len(os.listdir("/var/tmp/many")) == 750
    shutil.rmtree("/var/tmp/many")
    assert not os.path.exists("/var/tmp/many")


@check
def trees_are_packed_and_unpacked():
    source = os.path.dirname(os.__file__) + "/email"
    with tarfile.open("/var/tmp/t.tar", "w") as tar:
        tar.add(source, "email")
    with tarfile.open("/var/tmp/t.tar") as tar:
        tar.extractall("/var/tmp/unpacked", filter="tar")
    for folder, _, files in os.walk(source):
        for name in files:
            path = os.path.join(folder, name)
            copy = "/var/tmp/unpacked/email" + path[len(source):]
            assert open(path, "rb").read() == open(copy, "rb").read(), path
            one, two = os.stat(path), os.stat(copy)
            assert (one.st_mode, int(one.st_mtime)) == (two.st_mode, int(two.st_mtime)), path


@check
def objects_are_written_as_git_writes_them():
    base = "/var/tmp/objects"
    for n in range(200):
        data = str(n).encode() * 50
        name = hashlib.sha1(data).hexdigest()
        os.makedirs(f"{base}/{name[:2]}", exist_ok=True)
        temporary = f"{base}/{name[:2]}/tmp_{n}"
        with open(temporary, "xb") as file:
            file.write(data)
        os.chmod(temporary, 0o444)
        os.link(temporary, f"{base}/{name[:2]}/{name[2:]}")
        os.unlink(temporary)
    found = 0
    for folder, _, files in os.walk(base):
        for name in files:
            data = open(f"{folder}/{name}", "rb").read()
            assert hashlib.sha1(data).hexdigest() == os.path.basename(folder) + name
            found += 1
    assert found == 200


@check
def read_only_exports_stay():
    path = "/mnt/read-only/file"
    assert open(path).read() == "as it was"
    refused(errno.EROFS, open, path, "w")
    refused(errno.EROFS, os.unlink, path)
    refused(errno.EROFS, os.mkdir, "/mnt/read-only/new")
    refused(errno.EROFS, os.chmod, path, 0o777)


@check
def single_files_are_written_in_place():
    with open("/etc/hosts", "a") as file:
        file.write("10.0.0.1 guest\n")
    assert open("/etc/hosts").read().endswith("guest\n")
    refused(errno.EBUSY, os.unlink, "/etc/hosts")


@check
def everything_is_synced():
    os.sync()
    os.statvfs("/")
    # statx(2) with the time of creation (STATX_BTIME, at 80 of struct statx).
    buffer = ctypes.create_string_buffer(256)
    assert libc.syscall(332, -100, b"/result", 0, 0xFFF, buffer) == 0
    born = int.from_bytes(buffer.raw[80:88], "little")
    assert abs(born - os.stat("/result").st_ctime) < 600, born


def figures():
    """Times of some operations, each on files of the rootfs."""
    def timed(name, count, function):
        start = time.monotonic()
        for n in range(count):
            function(n)
        each = (time.monotonic() - start) / count
        print(f"FIGURE {name} {each * 1e6:.0f} us", flush=True)

    names = [f"{folder}/{name}" for folder, _, files in os.walk("/usr/lib/python3") for name in files]
    names = (names or ["/etc/passwd"]) * 500
    timed("stat", 500, lambda n: os.stat(names[n]))
    timed("open-close", 300, lambda n: os.close(os.open("/etc/passwd", os.O_RDONLY)))
    os.mkdir("/var/tmp/figures")
    timed("create", 200, lambda n: os.close(os.open(f"/var/tmp/figures/{n}", os.O_CREAT)))
    timed("unlink", 200, lambda n: os.unlink(f"/var/tmp/figures/{n}"))
    data = bytes(1 << 20)
    file = os.open("/var/tmp/large", os.O_CREAT | os.O_RDWR)
    timed("write-1MiB", 16, lambda n: os.pwrite(file, data, n << 20))
    os.close(file)
    open("/proc/sys/vm/drop_caches", "w").write("1")
    file = os.open("/var/tmp/large", os.O_RDONLY)
    timed("read-1MiB", 16, lambda n: os.pread(file, 1 << 20, n << 20))
    timed("read-1MiB-cached", 16, lambda n: os.pread(file, 1 << 20, n << 20))


failed = 0
for function in checks:
    try:
        function()
        print("PASSED", function.__name__, flush=True)
    except BaseException:
        failed += 1
        print("FAILED", function.__name__, flush=True)
        traceback.print_exc()
        os.chdir("/")
try:
    figures()
except BaseException:
    failed += 1
    print("FAILED figures", flush=True)
    traceback.print_exc()
raise SystemExit(1 if failed else 0)
