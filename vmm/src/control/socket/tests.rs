use std::{fs::File, io::Read};

use proptest::prelude::*;

use super::*;
use crate::control::{Event, Export, Launch, NetworkNamespace, Purpose, Request, Source, Writes};

fn launch(exports: usize) -> Request {
    Request::Launch(Launch {
        source: Source::Fork {
            template: "0123456789abcdef".into(),
            writes: Writes::Ignore,
        },
        purpose: Purpose::Run,
        network_namespace: NetworkNamespace::Join,
        console: true,
        exports: (0..exports)
            .map(|index| Export {
                name: format!("vol-{index}"),
                read_only: index % 2 == 0,
                shared: true,
            })
            .collect(),
    })
}

#[test]
fn a_packet_arrives_whole_with_its_descriptors_in_order() {
    let (ours, theirs) = Socket::pair().unwrap();
    let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    for (file, text) in files.iter().zip(["first", "second"]) {
        std::os::unix::fs::FileExt::write_all_at(file, text.as_bytes(), 0).unwrap();
    }
    let request = launch(3);
    ours.send(&request, &[files[0].as_fd(), files[1].as_fd()])
        .unwrap();
    ours.send(&Request::Pause, &[]).unwrap();
    let (received, fds) = theirs.receive::<Request>().unwrap().unwrap();
    assert_eq!(received, request);
    let texts: Vec<_> = fds
        .into_iter()
        .map(|fd| {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            text
        })
        .collect();
    assert_eq!(texts, ["first", "second"]);
    assert_eq!(
        theirs.receive::<Request>().unwrap().unwrap().0,
        Request::Pause
    );
}

#[test]
fn the_end_is_told_from_an_empty_packet() {
    let (ours, theirs) = Socket::pair().unwrap();
    drop(ours);
    assert!(theirs.receive::<Request>().unwrap().is_none());
}

#[test]
fn as_many_exports_as_descriptors_fit_into_a_packet() {
    let (ours, theirs) = Socket::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let request = launch(MAX_DESCRIPTORS - 4);
    let fds = vec![file.as_fd(); MAX_DESCRIPTORS];
    ours.send(&request, &fds).unwrap();
    let (received, fds) = theirs.receive::<Request>().unwrap().unwrap();
    assert_eq!(received, request);
    assert_eq!(fds.len(), MAX_DESCRIPTORS);
}

#[test]
fn what_is_too_large_is_not_sent() {
    let (ours, theirs) = Socket::pair().unwrap();
    let file = tempfile::tempfile().unwrap();
    let fds = vec![file.as_fd(); MAX_DESCRIPTORS + 1];
    assert!(matches!(
        ours.send(&Request::Pause, &fds),
        Err(Error::TooLarge)
    ));
    let step = "x".repeat(MAX_PACKET);
    assert!(matches!(
        ours.send(&Event::Progress { step }, &[]),
        Err(Error::TooLarge)
    ));
    theirs.set_nonblocking(true).unwrap();
    assert!(theirs.receive::<Event>().unwrap_err().would_block());
}

#[test]
fn a_packet_that_is_cut_by_the_buffer_is_refused() {
    let (ours, theirs) = Socket::pair().unwrap();
    let bytes = vec![b' '; MAX_PACKET + 1];
    rustix::net::send(&ours, &bytes, SendFlags::NOSIGNAL).unwrap();
    assert!(matches!(theirs.receive::<Request>(), Err(Error::TooLarge)));
}

#[test]
fn unknown_requests_and_fields_are_refused() {
    for text in [
        r#""Pause "#,
        r#""halt""#,
        r#"{"connect":{"port":1,"host":2}}"#,
        r#"{"connect":{"port":4294967296}}"#,
        r#"{"connect":{}}"#,
    ] {
        let (ours, theirs) = Socket::pair().unwrap();
        rustix::net::send(&ours, text.as_bytes(), SendFlags::NOSIGNAL).unwrap();
        assert!(
            matches!(theirs.receive::<Request>(), Err(Error::Syntax(_))),
            "{text}"
        );
    }
}

proptest! {
    #[test]
    fn any_packet_is_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 1..512)) {
        let (ours, theirs) = Socket::pair().unwrap();
        rustix::net::send(&ours, &bytes, SendFlags::NOSIGNAL).unwrap();
        match theirs.receive::<Request>() {
            Ok(Some((request, fds))) => {
                prop_assert!(fds.is_empty());
                let again = serde_json::to_vec(&request).unwrap();
                prop_assert_eq!(serde_json::from_slice::<Request>(&again).unwrap(), request);
            }
            Ok(None) => prop_assert!(false, "no end was sent"),
            Err(error) => prop_assert!(matches!(error, Error::Syntax(_))),
        }
    }

    #[test]
    fn requests_survive_the_way(port in any::<u32>(), vcpus in any::<u8>(), memory_bytes in any::<u64>(), cmdline in ".*") {
        for request in [
            Request::Connect { port },
            Request::Launch(Launch {
                source: Source::Boot { vcpus, memory_bytes, cmdline: cmdline.clone() },
                purpose: Purpose::Freeze,
                network_namespace: NetworkNamespace::New,
                console: false,
                exports: Vec::new(),
            }),
        ] {
            let text = serde_json::to_vec(&request).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Request>(&text).unwrap(), request);
        }
    }
}
