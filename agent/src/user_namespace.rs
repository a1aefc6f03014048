//! An exec in a container with a user namespace of its own. libcontainer's tenant joins every other namespace and leaves
//! this one out: here it makes the process as the guest's root, and the last step before the program is to enter the
//! user namespace and to become in it who was asked for (user_namespaces(7), setns(2)).

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use libcontainer::{capabilities::drop_privileges, syscall::syscall::create_syscall};
use nix::{
    sched::{CloneFlags, setns},
    unistd::{Gid, Uid, setgroups, setresgid, setresuid},
};
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, Process, User};
use serde::{Deserialize, Serialize};

/// Who the process is to be, as the spec of an exec says, in the user namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Identity {
    user: User,
    capabilities: LinuxCapabilities,
}

impl Identity {
    /// Takes it out of the process of an exec, which is the guest's root instead: only that may make a process of several
    /// namespaces that belong to another user namespace.
    pub(crate) fn take(process: &mut Process) -> Self {
        let identity = Self {
            user: process.user().clone(),
            capabilities: process.capabilities().clone().unwrap_or_default(),
        };
        let mut root = User::default();
        root.set_umask(identity.user.umask());
        let all: Capabilities = every_capability();
        let mut full = LinuxCapabilities::default();
        full.set_bounding(Some(all.clone()))
            .set_permitted(Some(all.clone()))
            .set_effective(Some(all))
            .set_inheritable(Some(Capabilities::new()))
            .set_ambient(Some(Capabilities::new()));
        process.set_user(root);
        process.set_capabilities(Some(full));
        identity
    }
}

/// All that this kernel may know; libcontainer passes over those that it does not.
fn every_capability() -> Capabilities {
    caps::all()
        .into_iter()
        .map(|capability| {
            <Capability as libcontainer::capabilities::CapabilityExt>::from_cap(capability)
        })
        .collect()
}

/// A user namespace to enter, with who to be in it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    namespace: Arc<OwnedFd>,
    identity: Identity,
}

impl Entry {
    /// Opens the user namespace of the process `pid`. It is done before the other namespaces are entered: in those the
    /// process has another number, if any.
    pub(crate) fn of(pid: u32, identity: Identity) -> io::Result<Self> {
        let namespace = fs::File::open(format!("/proc/{pid}/ns/user"))?;
        Ok(Self {
            namespace: Arc::new(namespace.into()),
            identity,
        })
    }

    /// Enters it. Nothing has to be kept over the change of user: who comes in has every capability there, and was not
    /// the namespace's root before, so that ceasing to be root takes none away (capabilities(7)).
    pub(crate) fn enter(&self) -> Result<(), String> {
        let failed = |what: &str, error: &dyn std::fmt::Display| format!("cannot {what}: {error}");
        setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWUSER)
            .map_err(|error| failed("enter the container's user namespace", &error))?;
        let user = &self.identity.user;
        let groups = user.additional_gids().iter().flatten();
        let groups: Vec<Gid> = groups.map(|gid| Gid::from_raw(*gid)).collect();
        setgroups(&groups).map_err(|error| failed("set the additional groups", &error))?;
        let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
        setresgid(gid, gid, gid).map_err(|error| failed("set the group", &error))?;
        setresuid(uid, uid, uid).map_err(|error| failed("set the user", &error))?;
        drop_privileges(&self.identity.capabilities, &*create_syscall())
            .map_err(|error| failed("drop capabilities", &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_becomes_root_and_who_it_was_to_be_is_kept() {
        let mut process: Process = serde_json::from_str(
            r#"{"cwd":"/","args":["id"],"user":{"uid":7,"gid":8,"umask":23,"additionalGids":[9]},
                "capabilities":{"effective":["CAP_CHOWN"],"permitted":["CAP_CHOWN"]}}"#,
        )
        .unwrap();
        let identity = Identity::take(&mut process);
        assert_eq!((identity.user.uid(), identity.user.gid()), (7, 8));
        assert_eq!(identity.user.additional_gids(), &Some(vec![9]));
        let effective = identity.capabilities.effective().clone().unwrap();
        assert_eq!(effective, Capabilities::from([Capability::Chown]));

        let user = process.user();
        assert_eq!((user.uid(), user.gid(), user.umask()), (0, 0, Some(23)));
        assert_eq!(user.additional_gids(), &None);
        let capabilities = process.capabilities().clone().unwrap();
        let permitted = capabilities.permitted().clone().unwrap();
        assert!(
            permitted.contains(&Capability::SysAdmin) && permitted.contains(&Capability::Setuid)
        );
        assert_eq!(capabilities.ambient(), &Some(Capabilities::new()));
    }

    #[test]
    fn ones_own_user_namespace_cannot_be_entered() {
        let mut process = Process::default();
        let entry = Entry::of(std::process::id(), Identity::take(&mut process)).unwrap();
        let error = entry.enter().unwrap_err();
        assert!(error.contains("user namespace"), "{error}");
    }
}
