//! Hooks of `config.json` that run on the host: their order, what they are told, and what becomes of the container when
//! one fails.

use serde_json::{Value, json};

use crate::{
    case::{Case, scenario},
    failure::{Failure, ensure},
    oci_config::OciConfig,
    scene::Scene,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("hooks/in-order-and-told-the-state", in_order),
        scenario("hooks/a-failure-refuses-the-container", refuses),
        scenario("hooks/a-failing-poststart-ends-it", poststart),
        scenario("hooks/a-failing-poststop-is-no-error", poststop),
        scenario("hooks/of-the-container-are-refused", of_the_container)
            .forkvm_only("runc runs programs of the host in the container's namespaces"),
    ]
}

/// A hook that runs `script` in a shell of the host.
fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["NAME=value"]})
}

/// A hook that writes a line to `log`: its kind, its whole environment but for what the shell itself sets, whether the process it is told
/// of is alive, and the state.
fn telling(scene: &Scene<'_>, kind: &str) -> Value {
    let log = scene.path_text("log");
    hook(&format!(
        "state=$(tr -d '\\n'); pid=$(echo \"$state\" | grep -o '\"pid\": *[0-9]*' | grep -o '[0-9]*')
         env=$(env | grep -v -E '^(PWD|SHLVL|_|OLDPWD)=' | tr '\\n' ' ')
         alive=gone; test -e \"/proc/${{pid:-none}}/ns/net\" && alive=alive
         echo \"{kind}|$env|$alive|$state\" >>{log}"
    ))
}

fn in_order(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = OciConfig::new(scene)?
        .with("/annotations", json!({"test.case": "in order"}))
        .push("/hooks/prestart", telling(scene, "prestart"))
        .push("/hooks/prestart", telling(scene, "second prestart"))
        .push("/hooks/createRuntime", telling(scene, "createRuntime"))
        .push("/hooks/poststart", telling(scene, "poststart"))
        .push("/hooks/poststop", telling(scene, "poststop"))
        .push("/hooks/poststop", telling(scene, "second poststop"))
        .sh("exit 7")
        .container(scene)?
        .exits(7);
    let id = scene.next_id();
    scene.run(&container)?;
    let log = scene.read(scene.path("log"))?;
    let mut found = Vec::new();
    for line in log.lines() {
        let mut fields = line.splitn(4, '|');
        let [kind, environment, alive, state] = [(); 4].map(|()| fields.next().unwrap_or_default());
        let state: Value = serde_json::from_str(state)
            .map_err(|error| Failure::new(format!("{error} in the state of {line}")))?;
        let about = state["id"] == json!(id)
            && state["annotations"]["test.case"] == json!("in order")
            && state["bundle"]
                .as_str()
                .is_some_and(|path| path.ends_with(&id))
            && state["ociVersion"]
                .as_str()
                .is_some_and(|version| version.starts_with("1."));
        ensure(about && environment == "NAME=value ", || {
            format!("a hook has been told {line}")
        })?;
        let status = match state["status"].as_str().unwrap_or_default() {
            // What runc says to a poststart hook, up to 1.1 at least; the specification has it running.
            "created" if kind == "poststart" => "running",
            status => status,
        };
        found.push(format!("{kind}: {status} {alive}"));
    }
    let expected = [
        "prestart: creating alive",
        "second prestart: creating alive",
        "createRuntime: creating alive",
        "poststart: running alive",
        "poststop: stopped gone",
        "second poststop: stopped gone",
    ];
    ensure(found == expected, || format!("the hooks were {found:?}"))
}

/// Whatever fails before the start is told in the client's error; the hooks behind it are not run.
fn refuses(scene: &Scene<'_>) -> Result<(), Failure> {
    let mut late = hook("exec sleep 1000");
    late["timeout"] = json!(1);
    let missing = json!({"path": "/no/such/hook"});
    let failing = hook("echo broken >&2; exit 3");
    for (kind, hook, words) in [
        ("prestart", &failing, ["hook", "exit status", "broken"]),
        ("createRuntime", &failing, ["hook", "exit status", "broken"]),
        ("createRuntime", &late, ["hook", "1", "hook"]),
        (
            "prestart",
            &missing,
            ["/no/such/hook", "no such file", "hook"],
        ),
    ] {
        let container = OciConfig::new(scene)?
            .push(&format!("/hooks/{kind}"), hook.clone())
            .push("/hooks/createRuntime", telling(scene, "second"))
            .sh("true")
            .container(scene)?;
        scene.run(&container.refused(words))?;
        no_other_ran(scene)?;
    }
    Ok(())
}

/// None of those behind the failing one, which would have written to the log.
fn no_other_ran(scene: &Scene<'_>) -> Result<(), Failure> {
    ensure(!scene.path("log").exists(), || {
        "a hook has run behind a failing one".to_owned()
    })
}

fn poststart(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = OciConfig::new(scene)?
        .push("/hooks/poststart", hook("echo broken >&2; exit 3"))
        .push("/hooks/poststart", telling(scene, "second"))
        .sh("exec sleep 1000")
        .container(scene)?
        .refused(["hook", "exit status", "broken"]);
    scene.run(&container)?;
    no_other_ran(scene)
}

fn poststop(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = OciConfig::new(scene)?
        .push("/hooks/poststop", hook("echo broken >&2; exit 3"))
        .push("/hooks/poststop", telling(scene, "second"))
        .sh("exit 7")
        .container(scene)?
        .exits(7);
    scene.run(&container)?;
    no_other_ran(scene)
}

fn of_the_container(scene: &Scene<'_>) -> Result<(), Failure> {
    for kind in ["createContainer", "startContainer"] {
        let container = OciConfig::new(scene)?
            .push(&format!("/hooks/{kind}"), hook("true"))
            .sh("true")
            .container(scene)?;
        scene.run(&container.refused([kind, "hooks", "inside the virtual machine"]))?;
    }
    Ok(())
}
