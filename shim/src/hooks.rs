//! Hooks of `config.json` that run on the host (OCI runtime specification, "POSIX-platform Hooks"):
//! prestart, createRuntime, poststart and poststop, with the container's state on standard input.

use std::{
    io::{self, Read as _, Write as _},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use oci_spec::runtime::{ContainerState, Hook, State};
use rustix::{
    process::Signal,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::reaper::Reaper;

/// Bytes of a failed hook's standard error that are shown.
const SHOWN: u64 = 4096;

/// Why a hook failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot run the {kind} hook {path}: {source}")]
    Run {
        kind: &'static str,
        path: String,
        source: io::Error,
    },
    #[error("the {kind} hook {path} failed ({status}): {stderr}")]
    Failed {
        kind: &'static str,
        path: String,
        status: String,
        stderr: String,
    },
    #[error("the {kind} hook {path} did not end within {seconds} s")]
    Late {
        kind: &'static str,
        path: String,
        seconds: u64,
    },
    #[error("cannot encode the state for hooks: {0}")]
    State(serde_json::Error),
}

/// Runs hooks, in the mount namespace of the host.
#[derive(Clone)]
pub(crate) struct HookRunner {
    reaper: Reaper,
    host_mounts: Arc<std::os::fd::OwnedFd>,
}

/// The state that hooks read, as JSON.
pub(crate) fn state(
    id: &str,
    bundle: &std::path::Path,
    pid: u32,
    status: ContainerState,
    annotations: Option<&std::collections::HashMap<String, String>>,
) -> Result<Vec<u8>, Error> {
    let mut state = State::default();
    state.set_version("1.1.0".to_owned());
    state.set_id(id.to_owned());
    state.set_status(status);
    state.set_pid(Some(pid.cast_signed()));
    state.set_bundle(bundle.to_owned());
    state.set_annotations(annotations.cloned());
    serde_json::to_vec(&state).map_err(Error::State)
}

impl HookRunner {
    pub(crate) fn new(reaper: Reaper, host_mounts: std::os::fd::OwnedFd) -> Self {
        Self {
            reaper,
            host_mounts: Arc::new(host_mounts),
        }
    }

    /// Runs all hooks of a kind in order; the first that fails ends it.
    pub(crate) async fn run(
        &self,
        kind: &'static str,
        hooks: &[Hook],
        state: &[u8],
    ) -> Result<(), Error> {
        for hook in hooks {
            self.run_one(kind, hook, state).await?;
        }
        Ok(())
    }

    async fn run_one(&self, kind: &'static str, hook: &Hook, state: &[u8]) -> Result<(), Error> {
        let path = hook.path().display().to_string();
        let failed = |source| Error::Run {
            kind,
            path: path.clone(),
            source,
        };
        let mut command = Command::new(hook.path());
        if let Some((name, arguments)) = hook.args().as_deref().and_then(<[String]>::split_first) {
            command.arg0(name).args(arguments);
        }
        command.env_clear();
        for variable in hook.env().iter().flatten() {
            if let Some((name, value)) = variable.split_once('=') {
                command.env(name, value);
            }
        }
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let host_mounts = Arc::clone(&self.host_mounts);
        let enter = move || {
            move_into_link_name_space(host_mounts.as_fd(), Some(LinkNameSpaceType::Mount))
                .map_err(io::Error::from)
        };
        // SAFETY: needed to leave the shim's mount namespace between fork and exec; setns(2) is
        // one system call on a descriptor that lives in the closure, it neither allocates nor
        // locks, and the child has one thread.
        unsafe { command.pre_exec(enter) };
        let mut child = self.reaper.spawn(&mut command).map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // Some kilobytes, less than a pipe holds (pipe(7)): this does not block. A hook that
            // does not read its input is no error.
            let _ = stdin.write_all(state);
        }
        let status = match hook.timeout() {
            Some(seconds) => {
                let limit = Duration::from_secs(seconds.unsigned_abs());
                match tokio::time::timeout(limit, &mut child.ended).await {
                    Ok(status) => status,
                    Err(_) => {
                        child.signal(Signal::KILL);
                        let _ = child.ended.await;
                        return Err(Error::Late {
                            kind,
                            path,
                            seconds: limit.as_secs(),
                        });
                    }
                }
            }
            None => (&mut child.ended).await,
        };
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => {
                let mut stderr = Vec::new();
                if let Some(pipe) = child.stderr.take() {
                    // What a child of the hook may still write is not waited for.
                    let _ = rustix::io::ioctl_fionbio(&pipe, true);
                    let _ = pipe.take(SHOWN).read_to_end(&mut stderr);
                }
                let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
                Err(Error::Failed {
                    kind,
                    path,
                    status: status.to_string(),
                    stderr,
                })
            }
            Err(_) => Err(failed(io::Error::other("its end was not seen"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// A hook that runs `script` in a shell.
    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let hook = serde_json::json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["NAME=value"], "timeout": timeout
        });
        serde_json::from_value(hook).unwrap()
    }

    async fn run(runner: &HookRunner, hooks: &[Hook]) -> Result<(), Error> {
        let state = state("c1", Path::new("/b"), 42, ContainerState::Creating, None).unwrap();
        runner.run("prestart", hooks, &state).await
    }

    // One test: each reaper collects every child of the process, those of others too.
    #[tokio::test]
    async fn hooks() {
        let mounts = fs::File::open("/proc/self/ns/mnt").unwrap();
        // And one reaper, for the same reason: a second would take the first one's children.
        let runner = HookRunner::new(Reaper::start().unwrap(), mounts.into());
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let write = format!("cat > {0}; echo \" $NAME $HOME\" >> {0}", out.display());
        run(&runner, &[hook(&write, None)]).await.unwrap();
        let text = fs::read_to_string(&out).unwrap();
        let (state, environment) = text.rsplit_once('}').unwrap();
        let state: serde_json::Value = serde_json::from_str(&format!("{state}}}")).unwrap();
        assert_eq!(
            (state["id"].as_str(), state["pid"].as_i64()),
            (Some("c1"), Some(42))
        );
        assert_eq!(
            (state["bundle"].as_str(), state["status"].as_str()),
            (Some("/b"), Some("creating"))
        );
        assert_eq!(
            environment.trim(),
            "value",
            "nothing of the shim's own environment"
        );

        let second = format!("echo second > {}", out.display());
        let failing = [hook("echo broken >&2; exit 3", None), hook(&second, None)];
        let message = run(&runner, &failing).await.unwrap_err().to_string();
        assert!(
            message.contains("broken") && message.contains("exit status: 3"),
            "{message}"
        );
        assert!(
            !fs::read_to_string(&out).unwrap().contains("second"),
            "the rest is not run"
        );

        let message = run(&runner, &[hook("sleep 1000", Some(1))])
            .await
            .unwrap_err()
            .to_string();
        assert!(message.contains("did not end within 1 s"), "{message}");

        let mut missing = hook("true", None);
        missing.set_path("/nonexistent/hook".into());
        let message = run(&runner, &[missing]).await.unwrap_err().to_string();
        assert!(message.contains("/nonexistent/hook"), "{message}");
    }
}
