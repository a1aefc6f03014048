//! What a worker and the agent say to each other: one JSON value a packet of a socket pair of type
//! SOCK_SEQPACKET. The agent's request is the first, and carries the descriptors of the streams.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use crate::user_namespace::Identity;

/// A report's length at most. Longer ones are cut by the sender.
pub(crate) const PACKET: usize = 16 * 1024;

/// A request's length at most: less than a socket holds (`net.core.wmem_default`, 208 KiB), so that sending never waits.
const REQUEST: usize = 128 * 1024;

/// Standard input, output and error.
const STREAMS: usize = 3;

/// What a worker is to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) container_id: String,
    /// Folder with the container's config.json.
    pub(crate) bundle: PathBuf,
    /// Where libcontainer keeps its state.
    pub(crate) state: PathBuf,
    /// Socket to which the terminal's master is sent.
    pub(crate) console: Option<PathBuf>,
    /// Rows and columns of the terminal at first.
    pub(crate) window: Option<(u16, u16)>,
    /// The additional groups of the process.
    pub(crate) groups: Vec<u32>,
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
    /// Whether the container has a seccomp filter, which is in its config.json.
    pub(crate) filtered: bool,
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

/// Sends a request with the process's streams, of which there are three, or none with a terminal.
pub(crate) fn send_request(
    socket: impl AsFd,
    request: &Request,
    streams: &[OwnedFd],
) -> io::Result<()> {
    let packet = serde_json::to_vec(request)?;
    if packet.len() > REQUEST {
        return Err(io::Error::other(format!(
            "the request has {} bytes; at most {REQUEST} are possible",
            packet.len()
        )));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(STREAMS))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let streams: Vec<BorrowedFd<'_>> = streams.iter().map(AsFd::as_fd).collect();
    if !streams.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(&streams)) {
        return Err(io::Error::other("there are too many streams"));
    }
    sendmsg(
        socket,
        &[IoSlice::new(&packet)],
        &mut rights,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Waits for the request: `None` if the agent has gone without one.
pub(crate) fn receive_request(socket: impl AsFd) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
    // The length first: few requests are as long as they may be.
    let (_, length) = rustix::net::recv(
        &socket,
        &mut [0_u8; 0][..],
        RecvFlags::PEEK | RecvFlags::TRUNC,
    )?;
    let mut packet = vec![0; length.min(REQUEST)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(STREAMS))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        &socket,
        &mut [IoSliceMut::new(&mut packet)],
        &mut rights,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let streams = rights.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    let streams = streams.collect();
    Ok(Some((
        serde_json::from_slice(&packet[..received.bytes])?,
        streams,
    )))
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

    fn request(container_id: &str) -> Request {
        Request {
            container_id: container_id.to_owned(),
            bundle: "/bundle".into(),
            state: "/state".into(),
            console: None,
            window: Some((24, 80)),
            groups: vec![7, 8],
            exec: None,
        }
    }

    #[test]
    fn a_request_arrives_with_its_streams() {
        let (ours, theirs) = pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap().into();
        send_request(&ours, &request("one"), &[reader, writer, null]).unwrap();
        let (received, streams) = receive_request(&theirs).unwrap().unwrap();
        assert_eq!(received.container_id, "one");
        assert_eq!(received.window, Some((24, 80)));
        let [reader, writer, _null] = <[OwnedFd; 3]>::try_from(streams).unwrap();
        rustix::io::write(&writer, b"through").unwrap();
        let mut through = [0; 7];
        rustix::io::read(&reader, &mut through).unwrap();
        assert_eq!(&through, b"through");
        let flags = rustix::io::fcntl_getfd(&reader).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn a_request_is_as_long_as_it_may_be_or_refused() {
        let (ours, theirs) = pair().unwrap();
        let long = "x".repeat(REQUEST - 1000);
        send_request(&ours, &request(&long), &[]).unwrap();
        let (received, streams) = receive_request(&theirs).unwrap().unwrap();
        assert_eq!((received.container_id, streams.len()), (long, 0));
        let error = send_request(&ours, &request(&"x".repeat(REQUEST)), &[]).unwrap_err();
        assert!(error.to_string().contains("at most 131072"), "{error}");
    }

    #[test]
    fn an_agent_that_goes_without_a_request_is_no_request() {
        let (ours, theirs) = pair().unwrap();
        drop(ours);
        assert!(receive_request(&theirs).unwrap().is_none());
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
