use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn sh(script: &str) -> Vec<String> {
    vec!["sh".into(), "-c".into(), script.into()]
}

#[test]
fn output_and_status_are_kept_apart() {
    let output = run(&sh("cat; echo err >&2; exit 3"), b"in", soon()).unwrap();
    assert_eq!(output.end, End::Exited(3));
    assert_eq!(output.stdout, b"in");
    assert_eq!(output.stderr, b"err\n");
}

#[test]
fn a_signal_is_not_an_exit_status() {
    let output = run(&sh("kill -9 $$"), b"", soon()).unwrap();
    assert_eq!(output.end, End::Signalled(9));
}

#[test]
fn the_deadline_kills_the_whole_group() {
    let began = Instant::now();
    let deadline = began + Duration::from_millis(100);
    let failure = run(&sh("sleep 100 & sleep 100"), b"", deadline).unwrap_err();
    assert!(failure.message().contains("in time"), "{failure}");
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_line_is_waited_for() {
    let mut running = Running::spawn(&sh("read x; echo got $x; read y"), Streams::Pipes).unwrap();
    running.write(b"one\n").unwrap();
    assert_eq!(running.line("got", soon()).unwrap(), "got one");
    running.close_stdin();
    running.wait(soon()).unwrap().exits(1).unwrap();
}

#[test]
fn a_line_that_never_comes_is_an_error_at_the_programs_end() {
    let running = Running::spawn(&sh("echo other"), Streams::Pipes).unwrap();
    let failure = running.line("wanted", soon()).unwrap_err();
    assert!(failure.to_string().contains("other"), "{failure}");
}

#[test]
fn a_terminal_has_its_size() {
    let running = Running::spawn(&sh("stty size"), Streams::Terminal(33, 101)).unwrap();
    let output = running.wait(soon()).unwrap().exits(0).unwrap();
    assert_eq!(output.text(), "33 101\n");
}

#[test]
fn a_command_line_can_be_pasted() {
    let arguments = ["echo", "a b", "it's", "", "plain-1"].map(String::from);
    assert_eq!(shell_quoted(&arguments), r"echo 'a b' 'it'\''s' '' plain-1");
}
