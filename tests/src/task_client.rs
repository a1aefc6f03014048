//! The task service of a container's shim, asked directly: what containerd asks of it, without containerd.

use std::{fs, path::Path, time::Duration};

use containerd_shim_protos::{
    api::{
        ConnectRequest, ConnectResponse, CreateTaskRequest, DeleteRequest, DeleteResponse,
        ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest, StateRequest,
        StateResponse, Status, WaitRequest, WaitResponse,
    },
    protobuf::{Message, well_known_types::any::Any},
    ttrpc,
};
use rustix::process::Pid;

use crate::failure::Failure;

/// The name of the service that every shim knows, runc's of containerd 1.7 too.
const SERVICE: &str = "containerd.task.v2.Task";

/// Where containerd 1.x and 2.x keep the bundles of ctr's containers.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/default";

/// The containerd namespace of the containers.
pub const NAMESPACE: &str = "default";

/// Where a request says its namespace (containerd, `pkg/namespaces/ttrpc.go`).
const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// What a process of an exec is called in an `Any` (containerd's typeurl of the OCI runtime specification).
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// No call may take longer.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection to the shim of one container.
pub struct TaskClient {
    client: ttrpc::Client,
    id: String,
}

impl TaskClient {
    /// Connects to the shim of the running container `id` in ctr's namespace.
    ///
    /// # Errors
    /// There is no such container, or its shim does not listen.
    pub fn of(id: &str) -> Result<Self, Failure> {
        let file = Path::new(BUNDLES).join(id).join("address");
        let address = fs::read_to_string(&file).map_err(Failure::io(file.display()))?;
        Self::at(address.trim(), id)
    }

    /// Connects to the shim that listens at `address`, to ask for the container `id`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn at(address: &str, id: &str) -> Result<Self, Failure> {
        let client = ttrpc::Client::connect(address)
            .map_err(|error| Failure::new(format!("the shim at {address}: {error}")))?;
        Ok(Self {
            client,
            id: id.to_owned(),
        })
    }

    /// Makes the container. `request` needs no id.
    ///
    /// # Errors
    /// The shim refuses it.
    pub fn create(&self, mut request: CreateTaskRequest) -> Result<(), Failure> {
        request.id.clone_from(&self.id);
        self.call("Create", &request).map(drop)
    }

    /// The shim's process.
    ///
    /// # Errors
    /// The shim does not tell it.
    pub fn shim(&self) -> Result<Pid, Failure> {
        let mut request = ConnectRequest::new();
        request.id.clone_from(&self.id);
        let answer: ConnectResponse = self.ask("Connect", &request)?;
        let pid = i32::try_from(answer.shim_pid).ok().and_then(Pid::from_raw);
        pid.ok_or_else(|| {
            Failure::new(format!("Connect said that the shim is {}", answer.shim_pid))
        })
    }

    /// What the container is doing.
    ///
    /// # Errors
    /// The shim does not know it.
    pub fn status(&self) -> Result<Status, Failure> {
        let mut request = StateRequest::new();
        request.id.clone_from(&self.id);
        let answer: StateResponse = self.ask("State", &request)?;
        Ok(answer.status.enum_value_or_default())
    }

    /// Sends a signal to all processes of the container.
    ///
    /// # Errors
    /// The shim refuses it.
    pub fn kill(&self, signal: u32) -> Result<(), Failure> {
        let mut request = KillRequest::new();
        request.id.clone_from(&self.id);
        request.signal = signal;
        request.all = true;
        self.call("Kill", &request).map(drop)
    }

    /// Asks the shim to end, which it does only if it has no container.
    ///
    /// # Errors
    /// The shim refuses it.
    pub fn shutdown(&self) -> Result<(), Failure> {
        let mut request = ShutdownRequest::new();
        request.id.clone_from(&self.id);
        self.call("Shutdown", &request).map(drop)
    }

    /// Adds a process to the container, `process` being an OCI `process` object that writes to the FIFOs `stdout` and
    /// `stderr`, or nowhere if they are "".
    ///
    /// # Errors
    /// The shim refuses it.
    pub fn exec(
        &self,
        exec_id: &str,
        process: &serde_json::Value,
        [stdout, stderr]: [&str; 2],
    ) -> Result<(), Failure> {
        let mut request = ExecProcessRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec_id.to_owned();
        request.stdout = stdout.to_owned();
        request.stderr = stderr.to_owned();
        let mut spec = Any::new();
        spec.type_url = PROCESS.to_owned();
        spec.value = process.to_string().into_bytes();
        request.spec = Some(spec).into();
        self.call("Exec", &request).map(drop)
    }

    /// Executes it; "" is the container's own process, as everywhere here.
    ///
    /// # Errors
    /// It cannot be executed.
    pub fn start(&self, exec_id: &str) -> Result<(), Failure> {
        let mut request = StartRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec_id.to_owned();
        self.call("Start", &request).map(drop)
    }

    /// Waits for its end; answers its exit status.
    ///
    /// # Errors
    /// The shim does not know it.
    pub fn wait(&self, exec_id: &str) -> Result<u32, Failure> {
        let mut request = WaitRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec_id.to_owned();
        let answer: WaitResponse = self.ask("Wait", &request)?;
        Ok(answer.exit_status)
    }

    /// Removes it, once it has ended; answers its exit status.
    ///
    /// # Errors
    /// It runs, or the shim does not know it.
    pub fn delete(&self, exec_id: &str) -> Result<u32, Failure> {
        let mut request = DeleteRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec_id.to_owned();
        let answer: DeleteResponse = self.ask("Delete", &request)?;
        Ok(answer.exit_status)
    }

    /// Waits for its end and removes it; answers its exit status.
    ///
    /// # Errors
    /// The shim does not know it.
    pub fn finish(&self, exec_id: &str) -> Result<u32, Failure> {
        self.wait(exec_id)?;
        self.delete(exec_id)
    }

    fn ask<A: Message>(&self, method: &str, message: &impl Message) -> Result<A, Failure> {
        let answer = self.call(method, message)?;
        A::parse_from_bytes(&answer)
            .map_err(|error| Failure::new(format!("the answer to {method}: {error}")))
    }

    fn call(&self, method: &str, message: &impl Message) -> Result<Vec<u8>, Failure> {
        let failed = |error: String| Failure::new(format!("{method} of {}: {error}", self.id));
        let mut request = ttrpc::Request::new();
        request.service = SERVICE.to_owned();
        request.method = method.to_owned();
        request.timeout_nano = LIMIT.as_nanos().try_into().unwrap_or(i64::MAX);
        request.metadata = vec![ttrpc::proto::KeyValue {
            key: NAMESPACE_KEY.to_owned(),
            value: NAMESPACE.to_owned(),
            ..Default::default()
        }];
        request.payload = message
            .write_to_bytes()
            .map_err(|error| failed(error.to_string()))?;
        let answer = self.client.request(request);
        Ok(answer.map_err(|error| failed(error.to_string()))?.payload)
    }
}
