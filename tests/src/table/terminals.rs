//! Containers and exec processes on a terminal.

use crate::{
    case::{Case, scenario},
    container::{BUSYBOX, Client, PYTHON, ctr, docker},
    failure::Failure,
    process::{Running, Streams},
    scene::Scene,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("terminal/size-and-resize", size),
        scenario("terminal/lines-and-control-c", control_c),
        scenario("terminal/of-an-exec", exec),
        scenario("terminal/of-docker", docker_terminal),
    ]
}

/// Waits inside for each size: the client sets the first one after the process has started.
const SIZES: &str = r"
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
print(all(os.isatty(stream) for stream in (0, 1, 2)), os.ttyname(0), flush=True)
for wanted in (101, 33), (120, 40):
    while tuple(os.get_terminal_size(0)) != wanted: signal.sigwait([signal.SIGWINCH])
    print('size', *wanted, flush=True)
";

fn size(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = ctr(PYTHON).option(&["--tty"]).python(SIZES);
    let (_, running) = scene.start_with(&container, Streams::Terminal(33, 101))?;
    running.line("size 101 33", scene.deadline())?;
    running.resize(40, 120)?;
    running.line("size 120 40", scene.deadline())?;
    let seen = "True /dev/pts/0\nsize 101 33\nsize 120 40\n";
    scene.finish(&container.stdout(seen), running).map(drop)
}

/// The terminal inside edits lines, echoes, and turns ^C into a signal.
fn control_c(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "trap 'echo interrupted; exit 3' INT; echo ready; read line; echo \"<$line>\"; \
                  while :; do sleep 1000 & wait $!; done";
    let container = ctr(BUSYBOX).option(&["--tty"]).sh(script).exits(3);
    let (_, mut running) = scene.start_with(&container, Streams::Terminal(24, 80))?;
    running.line("ready", scene.deadline())?;
    running.write(b"typo\x7fed\r")?;
    running.line("<typed>", scene.deadline())?;
    running.write(b"\x03")?;
    let container = container.stdout_has(["ready\n", "<typed>\n", "interrupted\n"]);
    scene.finish(&container, running).map(drop)
}

fn exec(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = scene.detach(&ctr(BUSYBOX).command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Ctr, &id)?;
    let words = ["ctr", "task", "exec", "--tty", "--exec-id", "tty", &id];
    let mut words: Vec<String> = words.map(String::from).into();
    words.extend(["sh", "-c", "tty; read line; echo \"<$line>\"; exit 6"].map(String::from));
    let mut running = Running::spawn(&words, Streams::Terminal(24, 80))?;
    running.line("/dev/pts/0", scene.deadline())?;
    running.write(b"typed\r")?;
    running.line("<typed>", scene.deadline())?;
    running.wait(scene.deadline())?.exits(6).map(drop)
}

fn docker_terminal(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = docker(BUSYBOX)
        .option(&["--interactive", "--tty"])
        .sh("tty; read line; echo \"<$line>\"; exit 6")
        .exits(6);
    let (_, mut running) = scene.start_with(&container, Streams::Terminal(24, 80))?;
    running.line("/dev/pts/0", scene.deadline())?;
    running.write(b"typed\r")?;
    running.line("<typed>", scene.deadline())?;
    scene.finish(&container, running).map(drop)
}
