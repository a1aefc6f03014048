# shellcheck shell=bash
# The virtual machine: start it, wait for it, talk to it, stop it.
#
# State of the instance, in $run: disk.qcow2 (overlay on the cached image), pid, mode, port, console.log
# (serial console), qemu.log, ready (FIFO: the second serial port), ssh.control (connection to it).

is_up() {
    [[ -s $run/pid ]] && [[ $(tr '\0' ' ' 2>/dev/null </proc/"$(<"$run/pid")"/cmdline) == *"$run/disk.qcow2"* ]]
}

must_be_up() {
    is_up || fail "the test host '$name' is not up; start it with: tests/host up"
}

# The arguments that make the two modes: see docs/testing.md.
mode_arguments() {
    case $mode in
    parallel) echo "-accel tcg,thread=multi,tb-size=1024 -smp 2" ;;
    counted) echo "-accel tcg,thread=single,tb-size=1024 -icount shift=0,sleep=off -smp 1" ;;
    *) fail "no such mode: '$mode'; modes are parallel and counted" ;;
    esac
}

free_port() {
    local port
    for ((port = 20022 + RANDOM % 10000; ; port++)); do
        (exec 9<>/dev/tcp/127.0.0.1/$port) 2>/dev/null || break
    done
    echo "$port"
}

boot() {
    need qemu-system-x86_64 qemu-system-x86
    need qemu-img qemu-utils
    need ssh openssh-client
    need_space "$run" 2000
    rm -f "$run"/{pid,ready,console.log,qemu.log,disk.qcow2}
    local port line ready
    port=$(free_port)
    qemu-img create -q -f qcow2 -b "$image/disk.img" -F raw "$run/disk.qcow2"
    mkfifo "$run/ready"
    echo "$mode" >"$run/mode"
    echo "$port" >"$run/port"
    # Held open both ways until QEMU has it too, so that neither open blocks.
    exec {ready_both}<>"$run/ready"
    # shellcheck disable=SC2046
    setsid qemu-system-x86_64 -name "forkvm-host-$name" -nodefaults -no-user-config -display none -no-reboot \
        -M q35 -cpu "$cpu" -m "$memory" $(mode_arguments) \
        -kernel "$image/vmlinuz" -initrd "$image/initrd" -append "$kernel_arguments" \
        -drive "file=$run/disk.qcow2,format=qcow2,if=virtio,cache=unsafe,discard=unmap" \
        -netdev "user,id=net,hostfwd=tcp:127.0.0.1:$port-:22" -device virtio-net-pci,netdev=net \
        -device virtio-rng-pci \
        -serial "file:$run/console.log" -chardev stdio,id=ready,signal=off -serial chardev:ready \
        </dev/null >"$run/ready" 2>"$run/qemu.log" {ready_both}>&- &
    echo $! >"$run/pid"
    exec {ready}<"$run/ready" {ready_both}>&-
    # End of file means that QEMU has ended.
    if ! IFS= read -r -t "$boot_limit" -u "$ready" line; then
        is_up || fail "QEMU ended before the host was up: $(tail -n 5 "$run/qemu.log" "$run/console.log")"
        stop
        fail "the host did not come up within $boot_limit s; its console is in $run/console.log: $(tail -n 5 "$run/console.log")"
    fi
    exec {ready}<&-
    line=${line%$'\r'}
    [[ $line == "ready ssh=active containerd=active docker=active" ]] ||
        fail "the host is up but a service is not ($line); look with: tests/host shell"
}

ssh_arguments=()
ssh_setup() {
    ssh_arguments=(-q -F /dev/null -i "$image_in_use/client" -p "$(<"$run/port")" -l root
        -o UserKnownHostsFile="$image_in_use/known_hosts" -o HostKeyAlias=forkvm-host -o StrictHostKeyChecking=yes
        -o ControlMaster=auto -o ControlPath="$run/ssh.control" -o ControlPersist=yes
        -o ServerAliveInterval=30 -o ServerAliveCountMax=20 -o BatchMode=yes)
}

# in_host COMMANDLINE: runs a shell command line in the host.
in_host() { ssh "${ssh_arguments[@]}" 127.0.0.1 "$1"; }

stop() {
    [[ -s $run/pid ]] || return 0
    local pid
    pid=$(<"$run/pid")
    if is_up; then
        [[ -S $run/ssh.control ]] && ssh -q -F /dev/null -o ControlPath="$run/ssh.control" -O exit 127.0.0.1 2>/dev/null
        kill "$pid"
        tail --pid="$pid" -f /dev/null
    fi
    rm -f "$run"/{pid,ready,disk.qcow2,ssh.control,installed}
}
