# shellcheck shell=bash
# An idle virtual machine inside the test host, held from `up` to `down`.
#
# KVM rewrites code of the running kernel (static keys: preempt notifiers in the scheduler, the local APIC's state) when
# the first machine of a host is made, when the last one is gone, and when the first APIC that is switched off appears.
# QEMU's multi-threaded software processor sometimes lets the other CPU execute the breakpoint of such a rewrite after
# Linux has forgotten it, and the host dies of "int3". With one machine held, whose one vCPU never runs and so keeps
# its APIC off, the code is rewritten once and then stays.

hold_machine() {
    # KVM_CREATE_VM, KVM_CREATE_IRQCHIP on it, KVM_CREATE_VCPU 0 of it (Linux' Documentation/virt/kvm/api.rst).
    in_host 'systemctl --quiet is-active forkvm-held-machine || systemd-run --quiet --unit=forkvm-held-machine perl -e '\''
        open(my $kvm, "+<", "/dev/kvm") or die "open /dev/kvm: $!";
        my $vm = ioctl($kvm, 0xae01, 0) or die "KVM_CREATE_VM: $!";
        open(my $machine, "+<&=", $vm + 0) or die "the machine: $!";
        ioctl($machine, 0xae60, 0) or die "KVM_CREATE_IRQCHIP: $!";
        my $vcpu = ioctl($machine, 0xae41, 0) or die "KVM_CREATE_VCPU: $!";
        sleep'\'''
}
