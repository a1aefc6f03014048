//! What the Task API does, written down once more and small: a container as a table of processes. The service has to answer
//! any calls in any order as this does, and two calls at once as one of their two orders.

use std::collections::{BTreeMap, BTreeSet};

use ttrpc::Code;

/// Names of processes: the init process and two execs.
pub(super) const IDS: [&str; 3] = ["", "e1", "e2"];

/// SIGKILL and a signal that every process of the model ignores.
pub(super) const SIGNALS: [u32; 3] = [9, 15, 99];

/// What a client asks, and what the guest does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Create,
    Start(usize),
    Exec(usize),
    Kill(usize, usize),
    Delete(usize),
    Pause,
    Resume,
    Wait(usize),
    Pids,
    Stats,
    Update,
    Resize(usize),
    CloseStdin(usize),
    Checkpoint,
    /// A process of the guest ends by itself.
    Exits(usize, u32),
    /// The monitor is gone.
    MachineEnds,
}

/// What is answered: a number where there is one to tell (an exit status, a number of processes), else 0.
pub(super) type Answer = Result<u32, Code>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Process {
    Created,
    Running,
    Paused,
    Stopped(u32),
}

/// SIGKILL's exit status.
const KILLED: u32 = 137;

const REFUSED: Answer = Err(Code::FAILED_PRECONDITION);
const MISSING: Answer = Err(Code::NOT_FOUND);

/// The container, if there is one.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    processes: BTreeMap<usize, Process>,
    paused: bool,
    /// Execs that were killed while the container was paused.
    killed: BTreeSet<usize>,
    /// Topics and processes of the events, in their order.
    pub(super) events: Vec<(&'static str, usize)>,
}

impl Model {
    /// The state of every process.
    pub(super) fn states(&self) -> [Option<Process>; 3] {
        [0, 1, 2].map(|id| match self.processes.get(&id)? {
            // All of a paused container's processes stand still.
            Process::Running if self.paused => Some(Process::Paused),
            process => Some(*process),
        })
    }

    /// Whether the guest's process `id` could do something now.
    pub(super) fn runs(&self, id: usize) -> bool {
        self.is(id, Process::Running) && !self.paused
    }

    fn is(&self, id: usize, process: Process) -> bool {
        self.processes.get(&id) == Some(&process)
    }

    fn has_ended(&self) -> bool {
        matches!(self.processes.get(&0), Some(Process::Stopped(_)))
    }

    /// One process ends. The init process takes all others along, and its machine.
    fn end(&mut self, id: usize, status: u32) {
        if id == 0 {
            self.killed.clear();
            for exec in [1, 2] {
                if self.is(exec, Process::Running) {
                    self.end(exec, KILLED);
                }
            }
        }
        self.processes.insert(id, Process::Stopped(status));
        self.events.push(("exit", id));
    }

    /// The answer to a call, and what follows from it.
    pub(super) fn apply(&mut self, call: Call) -> Answer {
        let id = match call {
            Call::Create => return self.create(),
            Call::Start(id)
            | Call::Exec(id)
            | Call::Kill(id, _)
            | Call::Delete(id)
            | Call::Wait(id)
            | Call::Resize(id)
            | Call::CloseStdin(id)
            | Call::Exits(id, _) => id,
            _ => 0,
        };
        if !self.processes.contains_key(&0) {
            return MISSING;
        }
        if let Call::Kill(_, signal) = call
            && SIGNALS[signal] > 64
        {
            return Err(Code::INVALID_ARGUMENT);
        }
        if call == Call::Exec(id) {
            return self.exec(id);
        }
        let Some(&process) = self.processes.get(&id) else {
            return MISSING;
        };
        match call {
            Call::Start(_) => return self.start(id, process),
            Call::Kill(_, signal) => return self.kill(id, process, SIGNALS[signal]),
            Call::Delete(_) => return self.delete(id, process),
            Call::Pause if self.runs(0) => {
                self.paused = true;
                self.events.push(("paused", 0));
            }
            Call::Resume if self.is(0, Process::Running) && self.paused => {
                self.paused = false;
                self.events.push(("resumed", 0));
                for exec in std::mem::take(&mut self.killed) {
                    self.end(exec, KILLED);
                }
            }
            Call::Wait(_) => {
                if let Process::Stopped(status) = process {
                    return Ok(status);
                }
            }
            Call::Pids if !self.has_ended() => {
                let execs = [1, 2]
                    .into_iter()
                    .filter(|id| self.is(*id, Process::Running));
                return Ok(1 + execs.count() as u32);
            }
            Call::Stats if self.has_ended() => return MISSING,
            Call::Update if self.has_ended() || self.paused => return REFUSED,
            // None of them has a terminal; there is no process to resume, or none to pause.
            Call::Resize(_) | Call::Pause | Call::Resume => return REFUSED,
            Call::Checkpoint => return Err(Code::UNIMPLEMENTED),
            Call::Exits(_, status) if process == Process::Running => self.end(id, status),
            Call::MachineEnds if !self.has_ended() => self.end(0, KILLED),
            _ => {}
        }
        Ok(0)
    }

    fn create(&mut self) -> Answer {
        if self.processes.contains_key(&0) {
            return Err(Code::ALREADY_EXISTS);
        }
        self.processes.insert(0, Process::Created);
        self.events.push(("create", 0));
        Ok(0)
    }

    fn exec(&mut self, id: usize) -> Answer {
        if self.has_ended() || self.paused {
            return REFUSED;
        }
        if self.processes.contains_key(&id) {
            return Err(Code::ALREADY_EXISTS);
        }
        self.processes.insert(id, Process::Created);
        self.events.push(("exec-added", id));
        Ok(0)
    }

    fn start(&mut self, id: usize, process: Process) -> Answer {
        if process != Process::Created || self.paused || self.has_ended() {
            return REFUSED;
        }
        self.processes.insert(id, Process::Running);
        self.events
            .push((if id == 0 { "start" } else { "exec-started" }, id));
        Ok(0)
    }

    fn kill(&mut self, id: usize, process: Process, signal: u32) -> Answer {
        match process {
            Process::Stopped(_) => return MISSING,
            Process::Created if id != 0 => return REFUSED,
            _ => {}
        }
        match signal {
            // An exec of a paused container hears of it later; the init process is killed with the machine.
            9 if id != 0 && self.paused => drop(self.killed.insert(id)),
            9 => self.end(id, KILLED),
            _ => {}
        }
        Ok(0)
    }

    fn delete(&mut self, id: usize, process: Process) -> Answer {
        let status = match process {
            Process::Stopped(status) => status,
            // As with runc: what never ran has not failed.
            Process::Created if id != 0 => 0,
            Process::Created => KILLED,
            Process::Running | Process::Paused => return REFUSED,
        };
        if id != 0 {
            self.processes.remove(&id);
            return Ok(status);
        }
        if process == Process::Created {
            self.end(0, KILLED);
        }
        self.events.push(("delete", 0));
        self.processes.clear();
        self.paused = false;
        Ok(status)
    }
}
