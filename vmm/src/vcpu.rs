//! vCPUs: a thread each, which runs the guest and carries out its exits.
//!
//! A vCPU is stopped by a flag and a signal. The signal's handler sets `immediate_exit` in the
//! page that the thread shares with KVM, so a signal that arrives just before `KVM_RUN` makes that
//! call return at once, and one that arrives in it interrupts it: no kick is lost.

use std::{
    cell::Cell,
    io,
    os::unix::thread::JoinHandleExt,
    ptr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use forkvm_api::{READY_LISTENING, READY_PORT, points};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::{
    eventfd::EventFd,
    signal::{SIGRTMIN, register_signal_handler},
};

use crate::{
    devices::{Devices, console::Output},
    snapshot::{VcpuState, vcpu_state},
};

/// Ports of the early console: a 16550's first register and its line status.
const SERIAL_DATA: u16 = 0x3f8;
const SERIAL_STATUS: u16 = 0x3fd;
/// Transmitter empty: every byte is taken at once.
const SERIAL_READY: u8 = 0x60;

/// What vCPUs share with the thread that controls them.
pub(crate) struct Shared {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) devices: Devices,
    pub(crate) console: Option<Arc<Output>>,
    /// Whether a vCPU parks itself right behind the ready signal.
    pub(crate) park_when_ready: bool,
    /// CLOCK_MONOTONIC in ns before the first KVM_RUN of vCPU 0, and behind the first exit.
    pub(crate) entered: OnceLock<u64>,
    pub(crate) first_exit: OnceLock<u64>,
    /// Set once the agent listens.
    pub(crate) listening: OnceLock<()>,
    pub(crate) reports: Reports,
}

/// Where vCPUs report to.
#[derive(Debug)]
pub(crate) struct Reports {
    pub(crate) sender: mpsc::Sender<Report>,
    pub(crate) wake: EventFd,
    /// The time point at which vCPU 0 reports [`Report::Reached`] and goes no further.
    pub(crate) stop_at: Option<String>,
}

/// What a vCPU reports.
#[derive(Debug)]
pub(crate) enum Report {
    /// vCPU 0 is at the point where it was to stop.
    Reached,
    /// The first exit of the machine was taken.
    FirstExit,
    /// The agent listens.
    Listening,
    /// The vCPU has stopped and has no exit to complete.
    Parked,
    /// The guest has ended.
    Stopped(String),
    /// The vCPU cannot go on.
    Failed(String),
}

impl Reports {
    fn send(&self, report: Report) {
        // The receiver is gone only when the process ends.
        if self.sender.send(report).is_ok() {
            let _ = self.wake.write(1);
        }
    }

    /// vCPU 0 passes a time point.
    fn pass(&self, point: &str) {
        if self.stop_at.as_deref() == Some(point) {
            self.send(Report::Reached);
            loop {
                thread::park();
            }
        }
    }
}

/// What a parked vCPU is told.
enum Command {
    Resume,
    Save(
        Arc<Vec<u32>>,
        mpsc::Sender<Result<VcpuState, vcpu_state::Error>>,
    ),
}

/// A vCPU's thread, from outside.
pub(crate) struct Handle {
    pause: Arc<AtomicBool>,
    commands: mpsc::Sender<Command>,
    thread: JoinHandle<()>,
}

thread_local! {
    /// This thread's `kvm_run.immediate_exit`, for the signal's handler.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|flag| {
        let flag = flag.get();
        if !flag.is_null() {
            // SAFETY: the pointer is set by `Thread::run` to the vCPU's mapped page and cleared
            // before that is unmapped; the handler runs on the same thread.
            unsafe { flag.write_volatile(1) };
        }
    });
}

/// Installs the handler of the kick. Once a process, before the first vCPU.
pub(crate) fn install_kick() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)
}

/// Starts a vCPU's thread; it enters the guest at once.
pub(crate) fn spawn(vcpu: VcpuFd, id: u8, shared: Arc<Shared>) -> io::Result<Handle> {
    let pause = Arc::new(AtomicBool::new(false));
    let (commands, receiver) = mpsc::channel();
    let thread = Thread {
        vcpu,
        id,
        shared,
        pause: pause.clone(),
        commands: receiver,
    };
    Ok(Handle {
        pause,
        commands,
        thread: thread::Builder::new()
            .name(format!("vcpu{id}"))
            // Runs exits and device registers alone; std's default is 2 MiB.
            .stack_size(256 << 10)
            .spawn(move || thread.run())?,
    })
}

impl Handle {
    /// Asks the vCPU to stop; it reports [`Report::Parked`] when it has.
    pub(crate) fn pause(&self) {
        self.pause.store(true, Ordering::SeqCst);
        // SAFETY: the thread was not joined (its handle is owned here), so its id is valid.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), SIGRTMIN()) };
    }

    /// Lets a parked vCPU go on.
    pub(crate) fn resume(&self) {
        self.pause.store(false, Ordering::SeqCst);
        // A thread that has ended has reported why.
        let _ = self.commands.send(Command::Resume);
    }

    /// State of a parked vCPU; `None` if its thread has ended.
    pub(crate) fn save(&self, msrs: Arc<Vec<u32>>) -> Option<Result<VcpuState, vcpu_state::Error>> {
        let (sender, receiver) = mpsc::channel();
        self.commands.send(Command::Save(msrs, sender)).ok()?;
        receiver.recv().ok()
    }
}

/// Tells the guest's watchdog that a vCPU stands still until it is entered again, so that it is not taken for a processor that hangs
/// (KVM API document, `KVM_KVMCLOCK_CTRL`).
///
/// # Errors
/// KVM's, but for EINVAL: this guest has no kvm-clock.
pub(crate) fn tell_watchdog(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    match vcpu.kvmclock_ctrl() {
        Err(error) if error.errno() != libc::EINVAL => Err(error),
        _ => Ok(()),
    }
}

/// What to do behind an exit.
enum Next {
    Run,
    Park,
    Stop(Report),
}

struct Thread {
    vcpu: VcpuFd,
    id: u8,
    shared: Arc<Shared>,
    pause: Arc<AtomicBool>,
    commands: mpsc::Receiver<Command>,
}

impl Thread {
    fn run(mut self) {
        IMMEDIATE_EXIT.with(|flag| flag.set(&raw mut self.vcpu.get_kvm_run().immediate_exit));
        if self.id == 0 {
            self.shared.entered.get_or_init(crate::now);
            self.shared.reports.pass(points::VCPU_ENTERED);
        }
        let report = self.run_until_stopped();
        IMMEDIATE_EXIT.with(|flag| flag.set(ptr::null_mut()));
        if let Some(report) = report {
            self.shared.reports.send(report);
        }
    }

    /// `None` when the controlling thread is gone.
    fn run_until_stopped(&mut self) -> Option<Report> {
        loop {
            let mut park = false;
            match self.step() {
                Ok(Some(Next::Run)) => {}
                Ok(Some(Next::Park)) => park = true,
                Ok(Some(Next::Stop(report))) => return Some(report),
                Ok(None) => {}
                Err(report) => return Some(report),
            }
            if park || self.pause.load(Ordering::SeqCst) {
                if let Err(report) = self.complete_exit() {
                    return Some(report);
                }
                self.shared.reports.send(Report::Parked);
                self.wait_parked()?;
            }
        }
    }

    /// Enters the guest once. `None`: it was kicked.
    fn step(&mut self) -> Result<Option<Next>, Report> {
        match self.vcpu.run() {
            Ok(exit) => {
                if self.shared.first_exit.get().is_none()
                    && self.shared.first_exit.set(crate::now()).is_ok()
                {
                    self.shared.reports.pass(points::VCPU_FIRST_EXIT);
                    self.shared.reports.send(Report::FirstExit);
                }
                Ok(Some(handle(exit, &self.shared)))
            }
            Err(error) if error.errno() == libc::EINTR => {
                self.vcpu.set_kvm_immediate_exit(0);
                Ok(None)
            }
            // A vCPU that waits for its start (KVM_RUN in the API document).
            Err(error) if error.errno() == libc::EAGAIN => Ok(None),
            Err(error) => Err(Report::Failed(format!(
                "vCPU {}: KVM_RUN: {error}",
                self.id
            ))),
        }
    }

    /// An I/O exit is pending until KVM_RUN is entered again (KVM API document, "KVM_EXIT_IO"):
    /// enters it with `immediate_exit` set, which completes the instruction and runs nothing.
    fn complete_exit(&mut self) -> Result<(), Report> {
        loop {
            self.vcpu.set_kvm_immediate_exit(1);
            match self.step()? {
                // Kicked: nothing is pending any more.
                None => return Ok(()),
                // The next element of a string instruction.
                Some(Next::Run | Next::Park) => {}
                Some(Next::Stop(report)) => return Err(report),
            }
        }
    }

    fn wait_parked(&mut self) -> Option<()> {
        loop {
            match self.commands.recv().ok()? {
                Command::Resume => {
                    // Time has gone on meanwhile.
                    if let Err(error) = tell_watchdog(&self.vcpu) {
                        log::warn!("vCPU {}: KVM_KVMCLOCK_CTRL: {error}", self.id);
                    }
                    return Some(());
                }
                Command::Save(msrs, reply) => {
                    let state = VcpuState::save(&self.shared.vm, &self.vcpu, self.id, &msrs);
                    // Whoever asked is waiting.
                    let _ = reply.send(state);
                }
            }
        }
    }
}

fn handle(exit: VcpuExit<'_>, shared: &Shared) -> Next {
    match exit {
        VcpuExit::MmioRead(address, data) => shared.devices.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => shared.devices.mmio_write(address, data),
        VcpuExit::IoOut(READY_PORT, data) => {
            // Once: whoever in the guest may use I/O ports can write here without end.
            if data.first() == Some(&READY_LISTENING) && shared.listening.set(()).is_ok() {
                shared.reports.send(Report::Listening);
                if shared.park_when_ready {
                    return Next::Park;
                }
            }
        }
        VcpuExit::IoOut(SERIAL_DATA, data) => {
            if let Some(console) = &shared.console {
                console.write(data);
            }
        }
        VcpuExit::IoOut(..) => {}
        VcpuExit::IoIn(SERIAL_STATUS, data) => data.fill(SERIAL_READY),
        // Nothing there: the bus reads as ones.
        VcpuExit::IoIn(_, data) => data.fill(0xff),
        // A triple fault: how a guest without firmware reboots, and how a panic ends.
        VcpuExit::Shutdown => {
            return Next::Stop(Report::Stopped(
                "the guest has shut down or panicked".into(),
            ));
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        other => return Next::Stop(Report::Failed(format!("unexpected vCPU exit {other:?}"))),
    }
    Next::Run
}
