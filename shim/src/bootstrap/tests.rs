use containerd_shim::bootstrap::Extension;
use containerd_shim::util::convert_to_any;

use super::*;

fn flags() -> Flags {
    Flags {
        id: "c1".to_owned(),
        namespace: "default".to_owned(),
        address: "/run/containerd/containerd.sock".to_owned(),
        ..Default::default()
    }
}

fn options() -> Any {
    let options = Options {
        shim_cgroup: "/shims".to_owned(),
        ..Default::default()
    };
    convert_to_any(Box::new(options)).unwrap()
}

fn params(id: &str) -> BootstrapParams {
    BootstrapParams {
        instance_id: id.to_owned(),
        namespace: "default".to_owned(),
        containerd_ttrpc_address: "/run/containerd/containerd.sock.ttrpc".to_owned(),
        containerd_grpc_address: "/run/containerd/containerd.sock".to_owned(),
        socket_dir: Some("/run/x/s".to_owned()),
        extensions: vec![Extension {
            value: Some(options()).into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[test]
fn nothing_on_stdin_is_the_old_protocol() {
    let request = request(&[], &flags()).unwrap();
    assert!(!request.bootstrap);
    assert_eq!(request.socket_folder, Path::new(SOCKET_FOLDER));
    assert_eq!(request.shim_cgroup, "");
}

#[test]
fn runtime_options_are_not_taken_for_bootstrap_params() {
    let request = request(&options().write_to_bytes().unwrap(), &flags()).unwrap();
    assert!(!request.bootstrap);
    assert_eq!(request.shim_cgroup, "/shims");
}

#[test]
fn options_of_runc_are_known_by_their_name() {
    let mut any = options();
    assert!(names_options(&any));
    any.type_url = format!("type.googleapis.com/{}", any.type_url);
    assert!(names_options(&any));
    any.type_url = "runtimeoptions.v1.Options".to_owned();
    assert!(!names_options(&any));
}

#[test]
fn bootstrap_params_of_this_container_are_believed() {
    let request = request(&params("c1").write_to_bytes().unwrap(), &flags()).unwrap();
    assert!(request.bootstrap);
    assert_eq!(request.socket_folder, Path::new("/run/x/s"));
    assert_eq!(
        request.ttrpc_address,
        "/run/containerd/containerd.sock.ttrpc"
    );
    assert_eq!(request.shim_cgroup, "/shims");
    assert!(!request.debug);
}

#[test]
fn bootstrap_params_of_another_container_are_not() {
    let request = request(&params("c2").write_to_bytes().unwrap(), &flags()).unwrap();
    assert!(!request.bootstrap);
    assert_eq!(request.socket_folder, Path::new(SOCKET_FOLDER));
}

#[test]
fn a_log_level_of_debug_or_below_turns_debug_on() {
    for (level, debug) in [(-8, true), (-5, true), (-4, true), (0, false), (8, false)] {
        let mut params = params("c1");
        params.log_level = protobuf::EnumOrUnknown::from_i32(level);
        let request = request(&params.write_to_bytes().unwrap(), &flags()).unwrap();
        assert_eq!(request.debug, debug, "level {level}");
    }
}

#[test]
fn the_socket_has_the_name_that_containerd_expects() {
    // printf /run/containerd/containerd.sock/default/c1 | sha256sum
    assert_eq!(
        socket_name("/run/containerd/containerd.sock", "default", "c1"),
        "d25aa4ef11a84e954e74a5bcff06557d0b6ea8d0c00243896f29826694bbd888"
    );
}

#[test]
fn a_container_of_a_pod_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let write = |kind: &str| {
        let config = format!(
            r#"{{"annotations":{{"io.kubernetes.cri.container-type":"{kind}","io.kubernetes.cri.sandbox-id":"pod7"}}}}"#
        );
        fs::write(folder.path().join("config.json"), config).unwrap();
    };
    let bundle = Bundle::open(folder.path().to_str().unwrap()).unwrap();
    write("container");
    let error = refuse_pods(&bundle, "c1").unwrap_err().to_string();
    assert!(error.contains("c1") && error.contains("pod7"), "{error}");
    write("sandbox");
    refuse_pods(&bundle, "c1").unwrap();
}

proptest::proptest! {
    /// Whatever stands on stdin, `start` neither panics nor takes it for another's parameters.
    #[test]
    fn any_input_is_survived(input: Vec<u8>) {
        if let Ok(request) = request(&input, &flags()) {
            proptest::prop_assert!(!request.bootstrap);
        }
    }
}
