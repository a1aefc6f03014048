//! Messages in an `Any`, as containerd's `typeurl` names them: by package and message, without a host.

use protobuf::{Message, well_known_types::any::Any};

/// Packs a message of a protobuf package. The library's `convert_to_any` asks the message's descriptor for its name, and the first
/// to ask has the descriptors of all messages built: 3.2 million instructions, as many as the shim needs for all else of a
/// Create.
///
/// # Errors
/// None that is known: a message in memory can be written.
pub(crate) fn packed<M: Message>(package: &str, message: &M) -> protobuf::Result<Any> {
    Ok(Any {
        type_url: format!("{package}.{}", M::NAME),
        value: message.write_to_bytes()?,
        ..Any::default()
    })
}

#[cfg(test)]
mod tests {
    use containerd_shim::util::convert_to_any;
    use containerd_shim_protos::{
        cgroups_v2::metrics::Metrics,
        events::task::{
            TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
            TaskPaused, TaskResumed, TaskStart,
        },
        shim::oci::ProcessDetails,
    };
    use protobuf::MessageFull;

    use super::*;

    /// A message is packed as the library would.
    fn check(package: &str, message: impl MessageFull) {
        let ours = packed(package, &message).unwrap();
        assert_eq!(ours, convert_to_any(Box::new(message)).unwrap());
    }

    #[test]
    fn messages_have_the_names_that_their_descriptors_have() {
        let events = crate::events::PACKAGE;
        check(
            events,
            TaskCreate {
                container_id: "c".into(),
                io: Some(TaskIO::default()).into(),
                pid: 7,
                ..Default::default()
            },
        );
        check(events, TaskStart::default());
        check(events, TaskExecAdded::default());
        check(events, TaskExecStarted::default());
        check(events, TaskExit::default());
        check(events, TaskDelete::default());
        check(events, TaskPaused::default());
        check(events, TaskResumed::default());
        check(events, TaskOOM::default());
        check(crate::stats::PACKAGE, Metrics::default());
        check(crate::service::DETAILS, ProcessDetails::default());
    }
}
