//! What a worker and the agent say to each other: one JSON value a packet of a socket pair of type
//! SOCK_SEQPACKET.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};

use crate::user_namespace::Identity;

/// A packet's length at most. Longer messages are cut by the sender.
pub(crate) const PACKET: usize = 16 * 1024;

/// What a worker is to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) container_id: String,
    /// Folder with the container's config.json.
    pub(crate) bundle: PathBuf,
    /// Where libcontainer keeps its state.
    pub(crate) state: PathBuf,
    /// The descriptors of stdin, stdout and stderr; empty with a terminal.
    pub(crate) stdio: Vec<i32>,
    /// Socket to which the terminal's master is sent.
    pub(crate) console: Option<PathBuf>,
    /// Rows and columns of the terminal at first.
    pub(crate) window: Option<(u16, u16)>,
    /// An exec: the file with the OCI `process` object.
    pub(crate) exec: Option<Exec>,
}

/// What is special to an exec.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Exec {
    pub(crate) process: PathBuf,
    /// Capabilities that libcontainer leaves to the process so that the executor can finish its
    /// work, and that the executor takes away: names as in the spec.
    pub(crate) borrowed: Vec<String>,
    /// The guest's number of the user who is to own its terminal.
    pub(crate) terminal_owner: u32,
    /// In a container with a user namespace of its own: who the process is to be in it.
    pub(crate) user_namespace: Option<UserNamespace>,
}

/// A user namespace for an exec.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct UserNamespace {
    /// A process in it: the container's init.
    pub(crate) of: u32,
    pub(crate) identity: Identity,
}

/// What a worker, or the process that it made, has to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    /// A line for the agent's log. Levels as in the crate `log`.
    Log { level: u8, text: String },
    /// Done; the process's PID.
    Made { pid: u32 },
    /// It cannot be made, or, after `Made`, cannot be executed.
    Failed { error: String },
}

/// A pair of connected sockets, both closed on exec.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends a report; waits if the other side is behind.
pub(crate) fn send(socket: impl AsFd, report: &Report) {
    let mut packet = serde_json::to_vec(report).unwrap_or_default();
    if packet.len() > PACKET {
        let cut = |text: &str| text.chars().take(PACKET / 16).collect::<String>();
        let shorter = match report {
            Report::Log { level, text } => Report::Log {
                level: *level,
                text: cut(text),
            },
            Report::Failed { error } => Report::Failed { error: cut(error) },
            Report::Made { pid } => Report::Made { pid: *pid },
        };
        packet = serde_json::to_vec(&shorter).unwrap_or_default();
    }
    // Nobody is there to be told of an agent that has gone.
    let _ = rustix::net::send(socket, &packet, SendFlags::NOSIGNAL);
}

/// Receives a report without waiting: `None` if there is none, an error of kind `UnexpectedEof` when
/// the last sender has gone.
pub(crate) fn try_receive(socket: impl AsFd) -> io::Result<Option<Report>> {
    let mut packet = vec![0; PACKET];
    match rustix::net::recv(socket, packet.as_mut_slice(), RecvFlags::DONTWAIT) {
        Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok((length, _)) => Ok(Some(serde_json::from_slice(&packet[..length])?)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_report_arrives_whole_or_cut(text in ".{0,200}", times in 1_usize..500) {
            let (ours, theirs) = pair().unwrap();
            let error = text.repeat(times);
            send(&ours, &Report::Failed { error: error.clone() });
            let Some(Report::Failed { error: received }) = try_receive(&theirs).unwrap() else {
                panic!("no report arrived");
            };
            prop_assert!(error.starts_with(&received));
            prop_assert!(received == error || received.chars().count() == PACKET / 16);
        }
    }

    #[test]
    fn the_end_of_the_last_sender_is_told() {
        let (ours, theirs) = pair().unwrap();
        assert_eq!(try_receive(&theirs).unwrap(), None);
        drop(ours);
        assert_eq!(
            try_receive(&theirs).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
