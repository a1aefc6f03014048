# shellcheck shell=bash
# The virtual machine of an instance: start it, wait for it, talk to it, stop it.
#
# State, in $run: pid and mode of QEMU, port (ssh, on 127.0.0.1), image (folder in the cache that it runs on),
# console.log, qemu.log, ready (FIFO: the second serial port),
# qmp.in and qmp.out (FIFOs: control), ssh.control (the connection that all commands share), installed (what is installed).

# Without CMPXCHG16B: QEMU before 8.0 computes the flags after it from stale state, and Linux (SLUB) crashes
# sooner or later. EPYC-v1 is some 20 per cent faster than `max`; AVX would only make the saved state larger.
cpu=${FORKVM_HOST_CPU:-EPYC-v1,+svm,+npt,-avx,-avx2,-cx16}
# One: with two, QEMU (7.2, 10.0 and 11.1 alike) loses the global interrupt flag of AMD-V when several microVMs run at
# once. A CPU then idles with it off and never wakes, or takes an interrupt between VMLOAD and VMLOAD on the guest's GS
# base, and the host or a guest dies within the first 60 containers run four at a time; with one CPU none did.
cpus=${FORKVM_HOST_CPUS:-1}
memory=${FORKVM_HOST_MEMORY:-4096}
boot_limit=${FORKVM_HOST_BOOT_LIMIT:-300}

kernel_arguments="console=ttyS0 root=/dev/pmem0 rw quiet net.ifnames=0 panic=-1 audit=0 nowatchdog
    mitigations=off tsc=reliable no_timer_check apparmor=1 security=apparmor systemd.show_status=0"

# The arguments of a mode.
#   parallel  time is that of the outer machine, processes run as on any machine: for tests and concurrency
#   counted   one CPU whose clock is the number of instructions executed, one nanosecond each: for figures
mode_arguments() {
    case $1 in
    parallel) echo "-accel tcg,thread=multi,tb-size=1024 -smp $cpus" ;;
    counted) echo "-accel tcg,thread=single,tb-size=1024 -icount shift=0,sleep=off -smp 1" ;;
    *) fail "there is no mode '$1'; the modes are parallel and counted" ;;
    esac
}

is_up() {
    [[ -s $run/pid ]] && grep -qs "forkvm-host-$name" "/proc/$(<"$run/pid")/cmdline"
}

must_be_up() {
    is_up || fail "the test host '$name' is not up; start it with: tests/host up"
}

free_port() {
    local port
    for ((port = 20022 + RANDOM % 10000; ; port++)); do
        (exec 9<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    echo "$port"
}

# start MODE DISK SHARE [ARGUMENT...]: starts QEMU on the disk image DISK; what it writes goes into DISK if SHARE is on, and
# is its own and lost at its end if it is off. Its standard output is the second serial port. The
# disk is an NVDIMM: reads and writes of it are the processor's own and take no time of the outer machine, during which
# counted mode's clock would run ahead.
start() {
    local mode=$1 disk=$2 share=$3 port
    shift 3
    port=$(free_port)
    rm -f "$run"/qmp.{in,out}
    mkfifo "$run"/qmp.{in,out}
    echo "$port" >"$run/port"
    echo "$mode" >"$run/mode"
    # shellcheck disable=SC2046,SC2086
    {
        setsid qemu-system-x86_64 -name "forkvm-host-$name" -nodefaults -no-user-config -display none -no-reboot \
            -M q35,nvdimm=on,sata=off,smbus=off,hpet=off -cpu "$cpu" $(mode_arguments "$mode") \
            -m "$memory,slots=1,maxmem=$((memory + 16384))M" \
            -object "memory-backend-file,id=disk,share=$share,mem-path=$disk,size=$disk_size" -device nvdimm,memdev=disk \
            -kernel "$image/vmlinuz" -initrd "$image/initrd" -append "${kernel_arguments//$'\n' / }" \
            -netdev "user,id=net,hostfwd=tcp:127.0.0.1:$port-:22,guestfwd=tcp:$parcel_address-cmd:cat $run/parcel" -device virtio-net-pci,netdev=net \
            -device virtio-rng-pci \
            -serial "file:$run/console.log" -chardev stdio,id=ready,signal=off -serial chardev:ready \
            -chardev "pipe,id=qmp,path=$run/qmp" -mon chardev=qmp,mode=control \
            "$@" </dev/null 2>"$run/qemu.log" &
        echo $! >"$run/pid"
        wait $!
        # Whoever waits in qmp_open for a QEMU that has ended goes on now, to read end of file.
        # shellcheck disable=SC2188
        [[ ! -p $run/qmp.in ]] || { <>"$run/qmp.in" <>"$run/qmp.out"; }
    } 2>/dev/null {to_user}>&- {up_lock}>&- &
}

# Boots MODE on DISK and waits until the host reports itself ready.
boot() {
    local ready_both ready line
    rm -f "$run/ready" "$run/console.log"
    mkfifo "$run/ready"
    # Held open both ways until QEMU has it too, so that neither open blocks.
    exec {ready_both}<>"$run/ready"
    start "$@" >"$run/ready" {ready_both}>&-
    exec {ready}<"$run/ready" {ready_both}>&-
    # End of file means that QEMU has ended.
    if ! IFS= read -r -t "$boot_limit" -u "$ready" line; then
        is_up || fail_with_logs "QEMU ended before the host was up"
        stop
        fail_with_logs "the host did not come up within $boot_limit s (FORKVM_HOST_BOOT_LIMIT)"
    fi
    exec {ready}<&-
    line=${line%$'\r'}
    [[ $line == "ready ssh=active containerd=active docker=active" ]] ||
        fail "the host is up but a service is not: $line; look into it with: tests/host shell"
}

fail_with_logs() {
    fail "$1; the end of $run/qemu.log and console.log:
$(grep -hsv "TCG doesn't support requested feature" "$run/qemu.log" | tail -n 5)
$(tail -n 8 "$run/console.log" 2>/dev/null | tr -d '\r')"
}

# Sets up $ssh for the instance that is up.
connect() {
    image=$(<"$run/image")
    ssh=(ssh -F /dev/null -p "$(<"$run/port")" -l root -i "$image/client" -o IdentitiesOnly=yes -o BatchMode=yes
        -o UserKnownHostsFile="$image/known_hosts" -o HostKeyAlias=forkvm-host -o StrictHostKeyChecking=yes
        -o ControlMaster=auto -o ControlPath="$run/ssh.control" -o ControlPersist=yes -o LogLevel=ERROR
        -o ConnectTimeout=60 -o ServerAliveInterval=30 -o ServerAliveCountMax=20)
    # Made apart from the first command: it stays, and would hold that command's output open, so that a pipe
    # behind this script would never end, and the lock of `up`.
    [[ -S $run/ssh.control ]] || (
        [[ -z ${up_lock:-} ]] || exec {up_lock}>&-
        exec {to_user}>&-
        "${ssh[@]}" -M -N -f 127.0.0.1 </dev/null >/dev/null 2>&1
    ) || true
}

# in_host COMMANDLINE: runs a shell command line in the host.
in_host() { "${ssh[@]}" 127.0.0.1 "$1"; }

disconnect() {
    [[ ! -S $run/ssh.control ]] || ssh -q -F /dev/null -o ControlPath="$run/ssh.control" -O exit 127.0.0.1 2>/dev/null || true
}

# Ends the machine at once; its disk is thrown away, so there is nothing to shut down in order.
stop() {
    local pid
    if is_up; then
        pid=$(<"$run/pid")
        disconnect
        kill "$pid"
        tail --pid="$pid" -f /dev/null
    fi
    rm -f "$run"/{pid,port,mode,ready,qmp.in,qmp.out,ssh.control,installed}
}
