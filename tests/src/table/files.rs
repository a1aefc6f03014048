//! The root file system, bind mounts and tmpfs, from inside and as the host sees them.

use std::{fs, os::unix::fs::MetadataExt};

use crate::{
    case::{Case, row, scenario},
    container::{BUSYBOX, Client, PYTHON, ctr, docker},
    failure::{Failure, ensure},
    machine::Runtime,
    process::Output,
    scene::Scene,
};

use super::{events::Events, tasks::remove_task};

pub(super) fn cases() -> Vec<Case> {
    vec![
        row(
            "files/root-is-writable",
            ctr(PYTHON).python(ROOT_OPERATIONS).stdout("ok\n"),
        ),
        row(
            "files/image-files-are-changed-in-the-container-alone",
            ctr(PYTHON).python(COPY_UP).stdout("ok\n"),
        ),
        row(
            "files/memory-mapping",
            ctr(PYTHON).python(MAPPING).stdout("ok\n"),
        ),
        row(
            "files/a-thousand-small-files",
            ctr(BUSYBOX)
                .sh("mkdir /d && cd /d && i=0; while [ $i -lt 1000 ]; do echo $i >$i; \
                     i=$((i+1)); done; ls | wc -l; cat * | sort -n | tail -n 1; cd / && rm -r /d; ls -d /d")
                .exits(1)
                .stdout("1000\n999\n"),
        ),
        row(
            "files/read-only-root",
            ctr(BUSYBOX)
                .option(&["--read-only"])
                .sh("touch /new 2>&1; echo more 2>&1 >>/etc/passwd; echo $?; cat /etc/passwd | head -c 5")
                .stdout_has(["Read-only file system", "root:"]),
        ),
        row(
            "files/tmpfs",
            ctr(BUSYBOX)
                .option(&["--mount", "type=tmpfs,src=tmpfs,dst=/scratch,options=size=1m:mode=1777"])
                .sh("stat -f -c %T /scratch; stat -c %a /scratch; \
                     dd if=/dev/zero of=/scratch/f bs=1k count=2000 2>&1 | grep -o 'No space left on device'; \
                     stat -c %s /scratch/f")
                .stdout("tmpfs\n1777\nNo space left on device\n1048576\n"),
        ),
        scenario("files/the-host-sees-the-root", host_sees_root),
        scenario("files/bind-a-folder", bind_folder),
        scenario("files/bind-a-folder-read-only", bind_read_only),
        scenario("files/bind-a-file", bind_file),
        scenario("files/bind-shows-later-changes-of-the-host", bind_is_live),
        scenario("files/bind-with-a-mount-below", bind_submount).alone(),
        scenario("files/bind-read-only-with-a-mount-below", bind_submount_read_only).alone(),
        scenario("files/what-was-mapped-is-there-at-the-end", mapped_at_the_end),
        scenario("files/docker-cp-both-ways", docker_cp),
    ]
}

const ROOT_OPERATIONS: &str = r#"
import errno, os, stat
def fails(number, call, *arguments):
    try: call(*arguments)
    except OSError as error: assert error.errno == number, error
    else: raise AssertionError(f"{call.__name__}{arguments} did not fail")
os.makedirs("/work/a/b"); os.chdir("/work")
with open("a/f", "w") as f: f.write("one\n")
with open("a/f", "a") as f: f.write("two\n")
assert open("a/f").read() == "one\ntwo\n"
with open("a/f", "r+") as f: f.seek(4); f.write("TWO"); f.truncate(7)
assert open("a/f").read() == "one\nTWO"
os.rename("a/f", "a/b/g"); assert not os.path.exists("a/f")
os.symlink("b/g", "a/link"); assert os.readlink("a/link") == "b/g"
assert open("a/link").read() == "one\nTWO"
os.link("a/b/g", "a/hard")
one, two = os.stat("a/b/g"), os.stat("a/hard")
assert (one.st_ino, one.st_nlink) == (two.st_ino, 2), (one, two)
os.chmod("a/hard", 0o4751); assert stat.S_IMODE(os.stat("a/b/g").st_mode) == 0o4751
os.chown("a/hard", 12, 34); assert (os.stat("a/hard").st_uid, os.stat("a/hard").st_gid) == (12, 34)
os.utime("a/hard", ns=(1_000_000_007, 2_000_000_009))
assert os.stat("a/hard").st_mtime_ns == 2_000_000_009
os.setxattr("a/hard", "user.colour", b"green")
assert os.getxattr("a/b/g", "user.colour") == b"green"
assert "user.colour" in os.listxattr("a/hard")
os.removexattr("a/hard", "user.colour"); fails(errno.ENODATA, os.getxattr, "a/hard", "user.colour")
os.mkfifo("a/fifo"); assert stat.S_ISFIFO(os.stat("a/fifo").st_mode)
fails(errno.ENOTEMPTY, os.rmdir, "a/b"); fails(errno.EEXIST, os.mkdir, "a")
fails(errno.ENOENT, os.unlink, "a/none"); fails(errno.ENOTDIR, os.listdir, "a/hard")
fails(errno.ENAMETOOLONG, os.mkdir, "n" * 256)
held = open("a/hard"); os.unlink("a/hard"); os.unlink("a/b/g"); assert held.read() == "one\nTWO"
with open("sparse", "wb") as f: f.truncate(1 << 20)
assert os.stat("sparse").st_size == 1 << 20 and os.stat("sparse").st_blocks == 0
with open("sparse", "r+b") as f: os.posix_fallocate(f.fileno(), 0, 65536); os.fsync(f.fileno())
assert os.stat("sparse").st_blocks * 512 >= 65536
assert sorted(os.listdir("a")) == ["b", "fifo", "link"]
assert os.statvfs("/").f_blocks > 0
print("ok")
"#;

/// A file of the image is open, and mapped, while it is written to for the first time.
const COPY_UP: &str = r#"
import os
path = "/etc/passwd"
before = open(path).read()
reader = open(path)
number = os.stat(path).st_ino
with open(path, "a") as f: f.write("extra:x:77:77::/:/bin/false\n")
assert open(path).read() == before + "extra:x:77:77::/:/bin/false\n"
os.chmod(path, 0o600); assert os.stat(path).st_mode & 0o777 == 0o600
os.rename("/etc/passwd", "/etc/passwd.old"); assert not os.path.exists(path)
assert open("/etc/passwd.old").read().startswith(before)
os.unlink("/etc/group"); assert not os.path.exists("/etc/group")
os.mkdir("/etc/group"); assert os.listdir("/etc/group") == []
print("ok")
"#;

const MAPPING: &str = r#"
import mmap, os
with open("/mapped", "w+b") as f:
    f.truncate(1 << 20)
    with mmap.mmap(f.fileno(), 1 << 20) as m:
        m[0:5] = b"start"; m[-3:] = b"end"; m.flush()
        f.seek(0); assert f.read(5) == b"start"
        f.seek(1000); f.write(b"written"); f.flush()
        assert m[1000:1007] == b"written"
data = open("/mapped", "rb").read()
assert data.startswith(b"start") and data.endswith(b"end") and len(data) == 1 << 20
with open("/etc/passwd", "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
    assert m[:5] == b"root:"
print("ok")
"#;

/// What the container wrote is in the snapshot, with its owner and mode.
fn host_sees_root(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "echo from the container >/seen && chmod 640 /seen && chown 12:34 /seen && \
                  rm /etc/group && sync && echo done";
    let id = scene.detach(&ctr(BUSYBOX).sh(&format!("{script}; exec sleep 1000")))?;
    scene.check_kernel(Client::Ctr, &id)?;
    wait_for_log(scene, &id, "done")?;
    let target = scene.path("root");
    fs::create_dir(&target).map_err(Failure::io("root"))?;
    let target = scene.path_text("root");
    let mount = scene
        .ok(["ctr", "snapshot", "mounts", &target, &id])?
        .text();
    scene.ok(["sh", "-c", &mount])?;
    let seen = look_at_root(scene, &target);
    scene.ok(["umount", &target])?;
    seen
}

fn look_at_root(scene: &Scene<'_>, root: &str) -> Result<(), Failure> {
    let path = format!("{root}/seen");
    let content = scene.read(&path)?;
    ensure(content == "from the container\n", || {
        format!("the host reads {content:?}")
    })?;
    let status = fs::metadata(&path).map_err(Failure::io(&path))?;
    let found = (status.mode() & 0o7777, status.uid(), status.gid());
    ensure(found == (0o640, 12, 34), || {
        format!("the host sees mode, user and group {found:?}")
    })?;
    ensure(
        !fs::exists(format!("{root}/etc/group")).unwrap_or(true),
        || "the host still sees the removed file".into(),
    )
}

/// Waits until a detached container has written a line.
pub(super) fn wait_for_log(scene: &Scene<'_>, id: &str, line: &str) -> Result<(), Failure> {
    wait_for_line(scene, &scene.log_of(id), line)
}

/// What a container that has ended wrote to its log, `last` in its last line. forkvm tells of the end behind the last byte;
/// runc's shim does not wait for it.
pub(super) fn log_at_end(scene: &Scene<'_>, id: &str, last: &str) -> Result<String, Failure> {
    if scene.runtime == Runtime::Runc {
        wait_for_log(scene, id, last)?;
    }
    scene.read(scene.log_of(id))
}

/// Waits until a file of the host has a line with this in it.
pub(super) fn wait_for_line(scene: &Scene<'_>, path: &str, text: &str) -> Result<(), Failure> {
    let script = format!("tail -n +1 -F '{path}' 2>/dev/null | grep -q -m 1 -F '{text}'");
    scene.ok(["bash", "-c", &script]).map(drop)
}

fn bind(source: &str, target: &str, options: &str) -> String {
    format!("type=bind,src={source},dst={target},options={options}")
}

fn bind_folder(scene: &Scene<'_>) -> Result<(), Failure> {
    scene.write("data/in", "from the host\n")?;
    let mount = bind(&scene.path_text("data"), "/data", "rbind:rw");
    let script = "cat /data/in; echo from inside >/data/out; mkdir /data/made; \
                  mv /data/in /data/made/moved; chmod 600 /data/out";
    let container = ctr(BUSYBOX).option(&["--mount", &mount]).sh(script);
    scene.run(&container.stdout("from the host\n"))?;
    let written = scene.read(scene.path("data/out"))?;
    let moved = scene.read(scene.path("data/made/moved"))?;
    ensure(
        (&*written, &*moved) == ("from inside\n", "from the host\n"),
        || format!("the host reads {written:?} and {moved:?}"),
    )
}

fn bind_read_only(scene: &Scene<'_>) -> Result<(), Failure> {
    scene.write("data/in", "from the host\n")?;
    let mount = bind(&scene.path_text("data"), "/data", "rbind:ro");
    let script = "cat /data/in; for try in 'touch /data/new' 'rm /data/in' 'chmod 600 /data/in'; \
                  do $try 2>&1 | grep -c 'Read-only file system'; done";
    let container = ctr(BUSYBOX).option(&["--mount", &mount]).sh(script);
    scene.run(&container.stdout("from the host\n1\n1\n1\n"))?;
    let left = scene.read(scene.path("data/in"))?;
    ensure(left == "from the host\n", || {
        format!("the host reads {left:?}")
    })
}

fn bind_file(scene: &Scene<'_>) -> Result<(), Failure> {
    scene.write("one", "from the host\n")?;
    scene.write("two", "must not change\n")?;
    let one = bind(&scene.path_text("one"), "/etc/one", "bind:rw");
    let two = bind(&scene.path_text("two"), "/etc/two", "bind:ro");
    let script = "cat /etc/one /etc/two; echo from inside >>/etc/one; \
                  (echo x >>/etc/two) 2>&1 | grep -c 'Read-only file system'";
    let container = ctr(BUSYBOX)
        .option(&["--mount", &one, "--mount", &two])
        .sh(script);
    scene.run(&container.stdout("from the host\nmust not change\n1\n"))?;
    let (one, two) = (
        scene.read(scene.path("one"))?,
        scene.read(scene.path("two"))?,
    );
    ensure(
        (&*one, &*two) == ("from the host\nfrom inside\n", "must not change\n"),
        || format!("the host reads {one:?} and {two:?}"),
    )
}

/// Names and contents that the host changes while the container runs.
fn bind_is_live(scene: &Scene<'_>) -> Result<(), Failure> {
    scene.write("data/file", "old\n")?;
    let mount = bind(&scene.path_text("data"), "/data", "rbind:rw");
    // It says so when it has read to the end: cat would go on reading in what the host has changed.
    let script = "cat /data/file; echo read; read go; cat /data/file /data/new; ls /data";
    let container = ctr(BUSYBOX).option(&["--mount", &mount]).sh(script);
    let (_, mut running) = scene.start(&container)?;
    running.line("read", scene.deadline())?;
    scene.write("data/file", "changed on the host\n")?;
    scene.write("data/new", "made on the host\n")?;
    running.write(b"go\n")?;
    running.close_stdin();
    let expected = "old\nread\nchanged on the host\nmade on the host\nfile\nnew\n";
    scene.finish(&container.stdout(expected), running).map(drop)
}

/// A mount below the bound folder is another file system inside too.
fn bind_submount(scene: &Scene<'_>) -> Result<(), Failure> {
    with_mount_below(scene, || {
        let mount = bind(&scene.path_text("data"), "/data", "rbind:rw");
        let script = "cat /data/plain /data/below/inner; ls /data/below; echo more >/data/below/out; \
                      test $(stat -c %d /data) != $(stat -c %d /data/below) && echo apart";
        let container = ctr(BUSYBOX).option(&["--mount", &mount]).sh(script);
        scene.run(&container.stdout("plain\ninner\ninner\napart\n"))?;
        let out = scene.read(scene.path("data/below/out"))?;
        ensure(out == "more\n", || format!("the host reads {out:?}"))
    })
}

/// Kubernetes' `recursiveReadOnly`.
fn bind_submount_read_only(scene: &Scene<'_>) -> Result<(), Failure> {
    with_mount_below(scene, || {
        let mount = bind(&scene.path_text("data"), "/data", "rbind:rro");
        let script = "cat /data/plain /data/below/inner; for try in 'touch /data/new' 'touch /data/below/new'; \
                      do $try 2>&1 | grep -c 'Read-only file system'; done";
        let container = ctr(BUSYBOX).option(&["--mount", &mount]).sh(script);
        scene
            .run(&container.stdout("plain\ninner\n1\n1\n"))
            .map(drop)
    })
}

/// With a file system mounted on the host at `data/below`.
fn with_mount_below(
    scene: &Scene<'_>,
    check: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    scene.write("data/plain", "plain\n")?;
    scene.write("data/below/hidden", "")?;
    let below = scene.path_text("data/below");
    scene.ok(["mount", "-t", "tmpfs", "e2e", &below])?;
    let seen = scene
        .write("data/below/inner", "inner\n")
        .and_then(|_| check());
    scene.ok(["umount", &below])?;
    seen
}

/// What a container wrote through a mapping, and never synced, is on the host when its end is announced.
fn mapped_at_the_end(scene: &Scene<'_>) -> Result<(), Failure> {
    const WRITES: &str = "import mmap, os\n\
        f = open('/data/file', 'r+b')\n\
        m = mmap.mmap(f.fileno(), 1 << 20)\n\
        m[0:5] = b'start'; m[-3:] = b'end'\n\
        os._exit(7)";
    let file = scene.write("data/file", "")?;
    let sized = fs::File::options()
        .write(true)
        .open(&file)
        .and_then(|file| file.set_len(1 << 20));
    sized.map_err(Failure::io(file.display()))?;
    let mount = bind(&scene.path_text("data"), "/data", "rbind:rw");
    let events = Events::subscribe(scene)?;
    let id = scene.detach(&ctr(PYTHON).option(&["--mount", &mount]).python(WRITES))?;
    events.end_of(scene, &id)?;
    let text = scene.read(&file)?;
    ensure(text.starts_with("start") && text.ends_with("end"), || {
        "the host does not see what was written".to_owned()
    })?;
    let log = log_at_end(scene, &id, "kernel ")?;
    let release = log.lines().find_map(|line| line.strip_prefix("kernel "));
    scene.check_release(release.unwrap_or_default())?;
    remove_task(scene, &id, 7)?;
    scene.ok(["ctr", "container", "rm", &id]).map(drop)
}

fn docker_cp(scene: &Scene<'_>) -> Result<(), Failure> {
    scene.write("in", "copied in\n")?;
    let id = scene.detach(&docker(BUSYBOX).sh("echo made inside >/inside; exec sleep 1000"))?;
    scene.check_kernel(Client::Docker, &id)?;
    scene.ok([
        "docker",
        "cp",
        &scene.path_text("in"),
        &format!("{id}:/copied"),
    ])?;
    let read = |output: Output| output.text();
    let inside = read(
        scene
            .exec(Client::Docker, &id, ["cat", "/copied"])?
            .exits(0)?,
    );
    scene.ok([
        "docker",
        "cp",
        &format!("{id}:/inside"),
        &scene.path_text("out"),
    ])?;
    let outside = scene.read(scene.path("out"))?;
    ensure(
        (&*inside, &*outside) == ("copied in\n", "made inside\n"),
        || format!("read {inside:?} inside and {outside:?} outside"),
    )?;
    let changes = scene.ok(["docker", "diff", &id])?.text();
    ensure(
        ["A /copied", "A /inside"]
            .iter()
            .all(|line| changes.contains(line)),
        || format!("docker diff says {changes:?}"),
    )?;
    scene.ok(["docker", "rm", "--force", &id]).map(drop)
}
