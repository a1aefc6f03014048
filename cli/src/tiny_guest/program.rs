//! The program of the tiny guest, in assembly: what its kernel and its one user page hold.
//!
//! It is assembled with this crate and copied into the guest, so it refers to itself relative to
//! the instruction pointer alone. Its first page is the kernel's, its second is the user's.
//!
//! It speaks to the host by two ports, four bytes at a time: [`REPORT_PORT`] takes one of the
//! `REPORT_` numbers, [`EXCEPTION_PORT`] takes the vector of an exception in bits 0 to 7 and the
//! [`Phase`] in which it was taken in bits 8 to 15.

use std::{arch::global_asm, slice};

/// Port of the guest's reports.
pub(super) const REPORT_PORT: u16 = 0xe0;
/// Port on which the guest's exception handlers report.
pub(super) const EXCEPTION_PORT: u16 = 0xe1;

/// Everything was as the processor's manual says.
pub(super) const REPORT_GOOD: u32 = 1;
/// The entry of a system call did not have privilege level 0 in CS.
pub(super) const REPORT_ENTRY_LEVEL: u32 = 2;
/// A system call did not leave its return address in RCX.
pub(super) const REPORT_RETURN_ADDRESS: u32 = 3;
/// An instruction computed something wrong.
pub(super) const REPORT_WRONG_RESULT: u32 = 4;
/// The measured loop begins.
pub(super) const REPORT_LOOP: u32 = 5;

/// Turns of the measured loop; each is two instructions.
pub(super) const LOOP_TURNS: u32 = 50_000;

/// Selectors of the descriptor table that [`super::machine`] writes. SYSCALL and SYSRET compute the
/// others from two of them (AMD64 manual volume 2, 6.1.1).
pub(super) const KERNEL_CODE: u16 = 0x08;
pub(super) const KERNEL_DATA: u16 = 0x10;
/// SYSRET's base: user data is 8 above, 64-bit user code is 16 above.
pub(super) const USER_BASE: u16 = 0x18;
pub(super) const USER_DATA: u16 = 0x20;
pub(super) const USER_CODE: u16 = 0x28;

/// Where the guest's stacks end and its data are (guest-physical, mapped one to one).
pub(super) const USER_STACK: u64 = 0xb000;
pub(super) const DATA: u64 = 0x7000;

/// Exception vectors that have a handler, 0 to this one.
pub(super) const LAST_VECTOR: u8 = 31;

/// How far the program had come when something went wrong; kept in R15.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Kernel mode, before anything was tried.
    Kernel = 1,
    /// The IRETQ that goes to user mode.
    EnterUser = 2,
    /// User mode, up to the SYSCALL.
    User = 3,
    /// The kernel's entry of the system call.
    SystemCall = 4,
    /// The SYSRETQ that goes back.
    Return = 5,
    /// User mode after it.
    UserAgain = 6,
}

impl Phase {
    /// The phase that a number from the guest stands for.
    pub(super) fn from_number(number: u64) -> Option<Self> {
        [
            Phase::Kernel,
            Phase::EnterUser,
            Phase::User,
            Phase::SystemCall,
            Phase::Return,
            Phase::UserAgain,
        ]
        .into_iter()
        .find(|phase| *phase as u64 == number)
    }

    /// In words, to go after "failed in".
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Phase::Kernel => "kernel mode",
            Phase::EnterUser => "the step from kernel mode to user mode (IRETQ)",
            Phase::User => "user mode",
            Phase::SystemCall => "the kernel's entry of a system call (SYSCALL)",
            Phase::Return => "the return from a system call (SYSRETQ)",
            Phase::UserAgain => "user mode after a system call",
        }
    }
}

global_asm!(
    r#"
    .pushsection .rodata.forkvm_tiny_guest, "a", @progbits
    .balign 4096
    .globl forkvm_tiny_start
forkvm_tiny_start:

    // User mode and back, twice. R15 holds the phase, R14 counts system calls.
    .globl forkvm_tiny_system_call
forkvm_tiny_system_call:
    mov     r15d, {phase_kernel}
    xor     r14d, r14d
    mov     ecx, 0xc0000081             // STAR: selectors for SYSCALL and SYSRET
    xor     eax, eax
    mov     edx, ({user_base} << 16) | {kernel_code}
    wrmsr
    mov     ecx, 0xc0000082             // LSTAR: the entry
    lea     rax, [rip + 10f]
    mov     rdx, rax
    shr     rdx, 32
    wrmsr
    mov     ecx, 0xc0000084             // SFMASK: trap, interrupt and direction flags off
    mov     eax, 0x700
    xor     edx, edx
    wrmsr
    mov     r15d, {phase_enter_user}
    push    {user_data} | 3
    push    {user_stack}
    push    2                           // flags: only the bit that is always set
    push    {user_code} | 3
    lea     rax, [rip + forkvm_tiny_user]
    push    rax
    iretq

10: // Entry of system calls: privilege level 0, still on the user's stack.
    cmp     r15d, {phase_user}
    je      11f
    cmp     r15d, {phase_user_again}
    jne     90f
11: mov     r13d, r15d
    mov     r15d, {phase_system_call}
    mov     eax, cs
    test    eax, 3
    jnz     91f
    mov     rax, cr3                    // faults unless the level really is 0
    inc     r14d
    cmp     r13d, {phase_user_again}
    je      12f
    lea     rax, [rip + 21f]
    cmp     rcx, rax
    jne     92f
    mov     r15d, {phase_return}
    sysretq
12: lea     rax, [rip + 22f]
    cmp     rcx, rax
    jne     92f
    cmp     r14d, 2
    je      80f
    jmp     90f

    // Instructions that a kernel of today uses without asking.
    .globl forkvm_tiny_clac
forkvm_tiny_clac:
    mov     r15d, {phase_kernel}
    clac
    jmp     80f

    .globl forkvm_tiny_popcnt
forkvm_tiny_popcnt:
    mov     r15d, {phase_kernel}
    mov     eax, 0xf00ff1
    popcnt  ebx, eax
    cmp     ebx, 13
    jne     90f
    jmp     80f

    .globl forkvm_tiny_xrstor
forkvm_tiny_xrstor:
    mov     r15d, {phase_kernel}
    mov     edi, {data}                 // all zero: every component to its initial state
    mov     eax, 1                      // x87 alone, which is always enabled
    xor     edx, edx
    xrstor  [rdi]
    jmp     80f

    .globl forkvm_tiny_cmpxchg16b
forkvm_tiny_cmpxchg16b:
    mov     r15d, {phase_kernel}
    mov     edi, {data}
    xor     eax, eax
    xor     edx, edx
    mov     ebx, 1
    mov     ecx, 2
    lock cmpxchg16b [rdi]
    jnz     90f
    cmp     qword ptr [rdi], 1
    jne     90f
    cmp     qword ptr [rdi + 8], 2
    jne     90f
    jmp     80f

    .globl forkvm_tiny_int3
forkvm_tiny_int3:
    mov     r15d, {phase_kernel}
    xor     r14d, r14d
    int3
    cmp     r14d, 1
    jne     90f
    jmp     80f

    // A loop of known length between two reports.
    .globl forkvm_tiny_loop
forkvm_tiny_loop:
    mov     r15d, {phase_kernel}
    mov     eax, {report_loop}
    out     {report_port}, eax
    mov     ecx, {loop_turns}
30: dec     ecx
    jnz     30b
    jmp     80f

80: mov     eax, {report_good}
    jmp     99f
90: mov     eax, {report_wrong_result}
    jmp     99f
91: mov     eax, {report_entry_level}
    jmp     99f
92: mov     eax, {report_return_address}
99: out     {report_port}, eax
    hlt

    // One handler of 16 bytes for each vector; that of INT3 counts and goes on.
    .balign 16
    .globl forkvm_tiny_vectors
forkvm_tiny_vectors:
    .irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .balign 16
    .if \vector == 3
    inc     r14d
    iretq
    .else
    mov     eax, \vector
    jmp     98f
    .endif
    .endr
98: shl     r15d, 8
    or      eax, r15d
    out     {exception_port}, eax
    hlt

    // The user's page.
    .balign 4096
    .globl forkvm_tiny_user
forkvm_tiny_user:
    mov     r15d, {phase_user}
    mov     eax, cs
    and     eax, 3
    cmp     eax, 3
    jne     29f
    syscall
21: mov     r15d, {phase_user_again}
    mov     eax, cs
    and     eax, 3
    cmp     eax, 3
    jne     29f
    syscall
22: nop
29: ud2
    .balign 4096
    .globl forkvm_tiny_end
forkvm_tiny_end:
    .popsection
    "#,
    phase_kernel = const Phase::Kernel as u32,
    phase_enter_user = const Phase::EnterUser as u32,
    phase_user = const Phase::User as u32,
    phase_system_call = const Phase::SystemCall as u32,
    phase_return = const Phase::Return as u32,
    phase_user_again = const Phase::UserAgain as u32,
    kernel_code = const KERNEL_CODE,
    user_base = const USER_BASE,
    user_data = const USER_DATA,
    user_code = const USER_CODE,
    user_stack = const USER_STACK,
    data = const DATA,
    loop_turns = const LOOP_TURNS,
    report_port = const REPORT_PORT,
    exception_port = const EXCEPTION_PORT,
    report_good = const REPORT_GOOD,
    report_entry_level = const REPORT_ENTRY_LEVEL,
    report_return_address = const REPORT_RETURN_ADDRESS,
    report_wrong_result = const REPORT_WRONG_RESULT,
    report_loop = const REPORT_LOOP,
);

// SAFETY: these symbols are defined by the assembly above. Only their addresses are used; the
// section they lie in is read-only data of this program for as long as it runs.
unsafe extern "C" {
    safe static forkvm_tiny_start: u8;
    safe static forkvm_tiny_system_call: u8;
    safe static forkvm_tiny_clac: u8;
    safe static forkvm_tiny_popcnt: u8;
    safe static forkvm_tiny_xrstor: u8;
    safe static forkvm_tiny_cmpxchg16b: u8;
    safe static forkvm_tiny_int3: u8;
    safe static forkvm_tiny_loop: u8;
    safe static forkvm_tiny_vectors: u8;
    safe static forkvm_tiny_user: u8;
    safe static forkvm_tiny_end: u8;
}

/// An entry of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Enters user mode, makes two system calls.
    SystemCall,
    /// CLAC.
    Clac,
    /// POPCNT.
    Popcnt,
    /// XRSTOR.
    Xrstor,
    /// LOCK CMPXCHG16B.
    Cmpxchg16b,
    /// INT3 and the return from its handler.
    Int3,
    /// The measured loop.
    Loop,
}

/// The program's bytes: a whole number of pages.
pub(super) fn bytes() -> &'static [u8] {
    let start = &raw const forkvm_tiny_start;
    // SAFETY: the assembly puts both labels into one read-only section, `end` after `start`, and
    // everything between them is initialised and never written.
    unsafe { slice::from_raw_parts(start, offset_of(&raw const forkvm_tiny_end)) }
}

/// Where an entry is, in bytes from the program's start.
pub(super) fn entry(entry: Entry) -> usize {
    offset_of(match entry {
        Entry::SystemCall => &raw const forkvm_tiny_system_call,
        Entry::Clac => &raw const forkvm_tiny_clac,
        Entry::Popcnt => &raw const forkvm_tiny_popcnt,
        Entry::Xrstor => &raw const forkvm_tiny_xrstor,
        Entry::Cmpxchg16b => &raw const forkvm_tiny_cmpxchg16b,
        Entry::Int3 => &raw const forkvm_tiny_int3,
        Entry::Loop => &raw const forkvm_tiny_loop,
    })
}

/// Where the handler of an exception is, in bytes from the program's start.
pub(super) fn vector(vector: u8) -> usize {
    offset_of(&raw const forkvm_tiny_vectors) + usize::from(vector) * 16
}

/// Where the user's page is, in bytes from the program's start.
pub(super) fn user_page() -> usize {
    offset_of(&raw const forkvm_tiny_user)
}

fn offset_of(label: *const u8) -> usize {
    label.addr() - (&raw const forkvm_tiny_start).addr()
}
