use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn spec(root: &Path) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "root": { "path": root },
        "process": {
            "user": { "uid": 33, "gid": 34 },
            "args": ["true"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "noNewPrivileges": false,
            "apparmorProfile": "docker-default",
            "capabilities": { "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"] }
        },
        "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }] }
    })
}

fn prepared(spec: &Value) -> Result<Prepared, Error> {
    prepare(spec.to_string().as_bytes(), "one", false)
}

#[test]
fn what_libcontainer_would_take_otherwise_is_settled() {
    let root = tempfile::tempdir().unwrap();
    let prepared = prepared(&spec(root.path())).unwrap();
    let process = prepared.spec.process().as_ref().unwrap();
    assert_eq!(process.no_new_privileges(), None);
    assert_eq!(*process.apparmor_profile(), None);
    let capabilities = process.capabilities().as_ref().unwrap();
    let chown: Capabilities = [Capability::Chown].into();
    assert_eq!(*capabilities.bounding(), Some(chown.clone()));
    assert_eq!(*capabilities.effective(), Some(chown));
    for set in [
        capabilities.permitted(),
        capabilities.inheritable(),
        capabilities.ambient(),
    ] {
        assert_eq!(*set, Some(Capabilities::new()));
    }
    assert!(
        process
            .env()
            .as_ref()
            .unwrap()
            .contains(&"HOME=/".to_owned())
    );
    let cgroup = prepared
        .spec
        .linux()
        .as_ref()
        .unwrap()
        .cgroups_path()
        .clone();
    assert_eq!(cgroup, Some("/forkvm/one".into()));
    assert_eq!(prepared.owner, Owner { uid: 33, gid: 34 });
}

#[test]
fn a_process_without_capabilities_has_none() {
    let root = tempfile::tempdir().unwrap();
    let mut spec = spec(root.path());
    spec["process"]
        .as_object_mut()
        .unwrap()
        .remove("capabilities");
    let prepared = prepared(&spec).unwrap();
    let process = prepared.spec.process().as_ref().unwrap();
    let capabilities = process.capabilities().as_ref().unwrap();
    assert_eq!(*capabilities.effective(), Some(Capabilities::new()));
    assert_eq!(*capabilities.permitted(), Some(Capabilities::new()));
}

#[test]
fn network_sysctls_are_the_guests_only_without_a_network_namespace() {
    let root = tempfile::tempdir().unwrap();
    let mut spec = spec(root.path());
    spec["linux"]["sysctl"] = json!({ "net.core.somaxconn": "7", "kernel.shmmax": "8" });
    let guests = prepared(&spec).unwrap();
    assert_eq!(
        guests.guest_sysctls,
        [("net.core.somaxconn".to_owned(), "7".to_owned())]
    );
    let left = guests
        .spec
        .linux()
        .as_ref()
        .unwrap()
        .sysctl()
        .clone()
        .unwrap();
    assert_eq!(
        left.into_iter().collect::<Vec<_>>(),
        [("kernel.shmmax".to_owned(), "8".to_owned())]
    );
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({ "type": "network" }));
    assert!(prepared(&spec).unwrap().guest_sysctls.is_empty());
}

#[test]
fn what_cannot_be_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let refused = |change: fn(&mut Value)| {
        let mut spec = spec(root.path());
        change(&mut spec);
        prepared(&spec).unwrap_err().to_string()
    };
    assert_eq!(
        refused(|spec| spec["process"] = Value::Null),
        "the spec has no `process`"
    );
    assert_eq!(
        refused(|spec| spec["linux"] = Value::Null),
        "the spec has no `linux`"
    );
    assert_eq!(
        refused(|spec| spec["root"] = Value::Null),
        "the spec has no `root`"
    );
    assert_eq!(
        refused(|spec| spec["process"]["terminal"] = json!(true)),
        "the spec and the streams do not agree about a terminal"
    );
    assert_eq!(
        refused(|spec| spec["hooks"] = json!({ "createContainer": [{ "path": "/bin/hook" }] })),
        "createContainer hooks cannot run in the guest"
    );
    assert_eq!(
        refused(|spec| spec["linux"]["namespaces"] = json!([{ "type": "network", "path": "/x" }])),
        "the net namespace /x is not one of this guest"
    );
}

#[test]
fn capabilities_are_lent_where_they_were_not() {
    let root = tempfile::tempdir().unwrap();
    let template = Template::of(&prepared(&spec(root.path())).unwrap().spec).unwrap();
    let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["true"], "cwd": "/",
        "capabilities": { "permitted": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "bounding": ["CAP_CHOWN"] } });
    let (mut process, _) = prepare_exec(process.to_string().as_bytes(), &template, false).unwrap();
    let wanted = [
        (Capability::Chown, "CAP_CHOWN"),
        (Capability::SysAdmin, "CAP_SYS_ADMIN"),
    ];
    assert_eq!(lend(&mut process, &wanted), ["CAP_SYS_ADMIN"]);
    let capabilities = process.capabilities().as_ref().unwrap();
    assert!(
        capabilities
            .permitted()
            .as_ref()
            .unwrap()
            .contains(&Capability::SysAdmin)
    );
    assert!(
        capabilities
            .effective()
            .as_ref()
            .unwrap()
            .contains(&Capability::SysAdmin)
    );
    assert!(
        !capabilities
            .bounding()
            .as_ref()
            .unwrap()
            .contains(&Capability::SysAdmin)
    );
}

#[test]
fn an_exec_without_capabilities_has_its_containers() {
    let root = tempfile::tempdir().unwrap();
    let template = Template::of(&prepared(&spec(root.path())).unwrap().spec).unwrap();
    let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["true"], "cwd": "/" });
    let (process, _) = prepare_exec(process.to_string().as_bytes(), &template, false).unwrap();
    let capabilities = process.capabilities().as_ref().unwrap();
    assert!(
        capabilities
            .effective()
            .as_ref()
            .unwrap()
            .contains(&Capability::Chown)
    );
}

#[test]
fn home_is_that_of_the_image_and_links_stay_in_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("passwd"),
        "web:x:33:33::/outside:/bin/sh\n",
    )
    .unwrap();
    let root = folder.path().join("root");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/real"), "web:x:33:33::/home/web:/bin/sh\n").unwrap();
    std::os::unix::fs::symlink("/etc/real", root.join("etc/passwd")).unwrap();
    assert_eq!(home_of(33, &root), "/home/web");
    assert_eq!(home_of(34, &root), "/");
    fs::remove_file(root.join("etc/passwd")).unwrap();
    std::os::unix::fs::symlink("../../passwd", root.join("etc/passwd")).unwrap();
    assert_eq!(home_of(33, &root), "/");
}

#[test]
fn users_of_a_user_namespace_are_mapped() {
    let mappings = json!([
        { "containerID": 0, "hostID": 1000, "size": 10 },
        { "containerID": 10, "hostID": 5000, "size": 1 }
    ]);
    let mappings: Vec<LinuxIdMapping> = serde_json::from_value(mappings).unwrap();
    assert_eq!(in_guest(0, &mappings), 1000);
    assert_eq!(in_guest(9, &mappings), 1009);
    assert_eq!(in_guest(10, &mappings), 5000);
    assert_eq!(in_guest(7, &[]), 7);
}

proptest! {
    #[test]
    fn no_bytes_make_it_fail_otherwise_than_by_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(prepare(&bytes, "one", false).is_err());
    }

    #[test]
    fn an_id_never_leaves_its_folder(id in "\\PC{0,140}") {
        if check_id(&id).is_ok() {
            let joined = Path::new("/a").join(&id);
            prop_assert_eq!(joined.parent(), Some(Path::new("/a")));
            prop_assert_eq!(Path::new(&id).file_name().and_then(|name| name.to_str()), Some(id.as_str()));
        }
    }

    #[test]
    fn any_passwd_is_read(text in "[a-z0-9:\n\\PC]{0,300}", uid in any::<u32>()) {
        if let Some(home) = home_in(&text, uid) {
            prop_assert!(!home.is_empty());
            prop_assert!(text.contains(home));
        }
    }

    #[test]
    fn a_home_is_found_behind_any_other_line(noise in "[^\n]{0,60}", uid in 1_u32..) {
        prop_assume!(home_in(&noise, uid).is_none());
        let text = format!("{noise}\nuser:x:{uid}:1::/home/user:/bin/sh\n");
        prop_assert_eq!(home_in(&text, uid), Some("/home/user"));
    }

    #[test]
    fn a_mapping_never_overflows(id in any::<u32>(), inside in any::<u32>(), outside in any::<u32>(), size in any::<u32>()) {
        let mapping = json!([{ "containerID": inside, "hostID": outside, "size": size }]);
        let mappings: Vec<LinuxIdMapping> = serde_json::from_value(mapping).unwrap();
        in_guest(id, &mappings);
    }
}

#[test]
fn additional_groups_are_taken_unless_they_are_too_many() {
    let with = |groups: Vec<u32>| {
        let mut process = Process::default();
        let mut user = process.user().clone();
        user.set_additional_gids(Some(groups));
        process.set_user(user);
        process
    };
    let mut process = with(vec![5, 6]);
    assert_eq!(take_groups(&mut process), [5, 6]);
    assert_eq!(process.user().additional_gids(), &None);
    assert!(take_groups(&mut process).is_empty());

    let many: Vec<u32> = (0..=1024).collect();
    let mut process = with(many.clone());
    assert!(take_groups(&mut process).is_empty());
    assert_eq!(process.user().additional_gids(), &Some(many));
}
