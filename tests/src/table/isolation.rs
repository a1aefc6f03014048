//! What a container may not see or do, and the devices and limits it is given.

use serde_json::json;

use crate::{
    case::{Case, row, scenario},
    config_file::ConfigFile,
    container::{BUSYBOX, PYTHON, ctr, docker},
    failure::Failure,
    oci_config::OciConfig,
    scene::Scene,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        row(
            "isolation/pid-1-and-nobody-else",
            ctr(BUSYBOX)
                // The shell finds the names itself, so there is no other process.
                .sh("echo $$; echo /proc/[0-9]*")
                .stdout("1\n/proc/1\n"),
        ),
        row(
            "isolation/proc-is-masked",
            ctr(BUSYBOX)
                .sh("for f in /proc/kcore /proc/keys /proc/timer_list /proc/sched_debug; do \
                       test ! -e $f || test \"$(head -c 1 $f | wc -c)\" = 0 || echo $f is readable; done; \
                     for d in /proc/acpi /proc/scsi /sys/firmware; do \
                       test ! -d $d || test -z \"$(ls $d)\" || echo $d is not empty; done; \
                     for f in /proc/sysrq-trigger /proc/sys/kernel/panic; do \
                       test ! -e $f || (echo 0 >$f) 2>&1 | grep -q -E 'Read-only|denied' || echo $f is writable; done; echo ok")
                .stdout("ok\n"),
        ),
        row(
            "isolation/sys-is-read-only",
            ctr(BUSYBOX)
                .sh("test -d /sys/class/net/lo && (echo 1 >/sys/kernel/mm/ksm/run || mkdir /sys/x) 2>&1 | \
                     grep -q -E 'Read-only|nonexistent' && echo ok")
                .stdout("ok\n"),
        ),
        row(
            "isolation/devices-are-there",
            ctr(BUSYBOX)
                .sh("for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; \
                     for d in fd stdin stdout stderr ptmx; do test -L /dev/$d || echo no link $d; done; \
                     for d in pts shm mqueue; do grep -q \" /dev/$d \" /proc/mounts || echo no mount $d; done; \
                     head -c 3 /dev/zero | od -An -tx1; (echo x >/dev/full) 2>&1 | grep -o 'No space.*'; \
                     head -c 16 /dev/urandom | wc -c; echo x >/dev/null; ls /dev/shm | wc -l")
                .stdout(" 00 00 00\nNo space left on device\n16\n0\n"),
        ),
        row(
            "isolation/other-devices-are-refused",
            ctr(BUSYBOX)
                .sh("mknod /port c 4 64 && cat /port")
                .exits(1)
                .stderr_has(["Operation not permitted"]),
        ),
        row(
            "isolation/capabilities",
            ctr(BUSYBOX)
                .sh("grep -E '^Cap(Prm|Eff|Bnd|Amb)|^NoNewPrivs' /proc/self/status; \
                     mount -t tmpfs x /tmp 2>/dev/null || echo no mount; \
                     hostname other 2>/dev/null || echo no hostname")
                .stdout(
                    "CapPrm:\t00000000a80425fb\nCapEff:\t00000000a80425fb\n\
                     CapBnd:\t00000000a80425fb\nCapAmb:\t0000000000000000\n\
                     NoNewPrivs:\t1\nno mount\nno hostname\n",
                ),
        ),
        row(
            "isolation/capabilities-added-and-dropped",
            ctr(BUSYBOX)
                .option(&["--cap-add", "CAP_SYS_ADMIN", "--cap-drop", "CAP_CHOWN"])
                .sh("grep CapEff /proc/self/status; hostname other && hostname; \
                     chown 1 /etc/passwd || echo no chown")
                .stdout("CapEff:\t00000000a82425fa\nother\nno chown\n"),
        ),
        row(
            "isolation/capabilities-of-a-user",
            ctr(BUSYBOX)
                .option(&["--user", "1000:1000"])
                .sh("grep CapEff /proc/self/status; cat /etc/shadow; touch /x")
                .exits(1)
                .stdout("CapEff:\t0000000000000000\n"),
        ),
        row(
            "isolation/seccomp-is-off-unless-asked-for",
            ctr(BUSYBOX)
                .sh("grep Seccomp: /proc/self/status; unshare -U true && echo allowed")
                .stdout("Seccomp:\t0\nallowed\n"),
        ),
        row(
            "isolation/seccomp-default-profile",
            ctr(BUSYBOX)
                .option(&["--seccomp"])
                .sh("grep Seccomp: /proc/self/status; unshare -U true || echo refused")
                .stdout("Seccomp:\t2\nrefused\n"),
        ),
        scenario("isolation/seccomp-own-profile", own_seccomp_profile),
        row(
            "isolation/rlimits",
            ctr(BUSYBOX)
                .sh("ulimit -n; ulimit -Hn; grep -E 'Max open files' /proc/self/limits | tr -s ' '")
                .stdout("1024\n1024\nMax open files 1024 1024 files \n"),
        ),
        row(
            "isolation/rlimits-of-docker",
            docker(BUSYBOX)
                .option(&["--ulimit", "nofile=100:200", "--ulimit", "core=0"])
                .sh("ulimit -n; ulimit -Hn; ulimit -c")
                .stdout("100\n200\n0\n"),
        ),
        row(
            "isolation/hostname",
            ctr(BUSYBOX)
                .option(&["--hostname", "box-7"])
                .sh("hostname; cat /proc/sys/kernel/hostname; uname -n")
                .stdout("box-7\nbox-7\nbox-7\n"),
        ),
        row(
            "isolation/cgroup-is-the-containers-own",
            docker(BUSYBOX)
                .option(&["--memory", "64m"])
                .sh("cat /proc/self/cgroup /sys/fs/cgroup/memory.max ; \
                     grep -c . /sys/fs/cgroup/cgroup.procs; \
                     mkdir /sys/fs/cgroup/x 2>/dev/null || echo read-only")
                .stdout("0::/\n67108864\n2\nread-only\n"),
        ),
        row(
            "isolation/memory-limit-kills",
            ctr(PYTHON)
                .option(&["--memory-limit", "67108864"])
                .python("x = bytearray(200 << 20)")
                .exits(137),
        ),
        row(
            "isolation/network-is-loopback-alone",
            ctr(BUSYBOX)
                .sh("ls /sys/class/net; ping -c 1 -w 5 127.0.0.1 >/dev/null && echo up; \
                     ping -c 1 -w 1 192.0.2.1 2>/dev/null >&2 || echo no way out")
                .stdout("lo\nup\nno way out\n"),
        ),
        row(
            "isolation/privileged",
            ctr(BUSYBOX)
                .option(&["--privileged", "--privileged-without-host-devices"])
                .sh("mount -t tmpfs x /tmp && stat -f -c %T /tmp; f=/proc/sys/vm/overcommit_memory; cat $f >/v; cat /v >$f && echo set; \
                     grep Seccomp: /proc/self/status")
                .stdout("tmpfs\nset\nSeccomp:\t0\n"),
        ),
        scenario("isolation/own-namespaces-in-place-of-the-hosts", own_namespaces)
            .alone()
            .forkvm_only("runc shares the host's namespaces"),
    ]
}

/// What is refused by default, where the configuration allows it.
fn own_namespaces(scene: &Scene<'_>) -> Result<(), Failure> {
    let _config = ConfigFile::changed("[containers]\nhost_namespaces = \"own\"\n")?;
    let script = "echo $$; ls /sys/class/net; wc -l </proc/sysvipc/shm; mount -t tmpfs x /srv || echo no mount";
    let host = docker(BUSYBOX).option(&["--pid=host", "--ipc=host", "--network=host"]);
    scene.run(&host.sh(script).stdout("1\nlo\n1\nno mount\n"))?;
    let mount_alone = OciConfig::new(scene)?.with("/linux/namespaces", json!([{"type": "mount"}]));
    let container = mount_alone.sh(script).container(scene)?;
    scene
        .run(&container.stdout("1\nlo\n1\nno mount\n"))
        .map(drop)
}

/// A profile of one's own: `mkdir` alone is refused, with an error number of the profile's.
fn own_seccomp_profile(scene: &Scene<'_>) -> Result<(), Failure> {
    let profile = r#"{
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
    }"#;
    scene.write("profile.json", profile)?;
    let path = scene.path_text("profile.json");
    let container = ctr(BUSYBOX)
        .option(&["--seccomp", "--seccomp-profile", &path])
        .sh("mkdir /d; touch /f && grep Seccomp: /proc/self/status")
        .stdout("Seccomp:\t2\n")
        .stderr_has(["No space left on device"]);
    scene.run(&container).map(drop)
}
