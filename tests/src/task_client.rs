//! The task service of a container's shim, asked directly: what containerd asks of it, without containerd.

use std::{fs, path::Path, time::Duration};

use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse, ExecProcessRequest, StartRequest, WaitRequest},
    protobuf::{Message, well_known_types::any::Any},
    ttrpc,
};

use crate::failure::Failure;

/// The name of the service that every shim knows, runc's of containerd 1.7 too.
const SERVICE: &str = "containerd.task.v2.Task";

/// Where containerd 1.x and 2.x keep the bundles of ctr's containers.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/default";

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
        let client = ttrpc::Client::connect(address.trim())
            .map_err(|error| Failure::new(format!("the shim at {address}: {error}")))?;
        Ok(Self {
            client,
            id: id.to_owned(),
        })
    }

    /// Adds a process to the container, `process` being an OCI `process` object, without standard streams.
    ///
    /// # Errors
    /// The shim refuses it.
    pub fn exec(&self, exec_id: &str, process: &serde_json::Value) -> Result<(), Failure> {
        let mut request = ExecProcessRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec_id.to_owned();
        let mut spec = Any::new();
        spec.type_url = PROCESS.to_owned();
        spec.value = process.to_string().into_bytes();
        request.spec = Some(spec).into();
        self.call("Exec", &request).map(drop)
    }

    /// Executes it.
    ///
    /// # Errors
    /// It cannot be executed.
    pub fn start(&self, exec_id: &str) -> Result<(), Failure> {
        let mut request = StartRequest::new();
        request.id.clone_from(&self.id);
        request.exec_id = exec_id.to_owned();
        self.call("Start", &request).map(drop)
    }

    /// Waits for its end and removes it; answers its exit status.
    ///
    /// # Errors
    /// The shim does not know it.
    pub fn finish(&self, exec_id: &str) -> Result<u32, Failure> {
        let mut wait = WaitRequest::new();
        wait.id.clone_from(&self.id);
        wait.exec_id = exec_id.to_owned();
        self.call("Wait", &wait)?;
        let mut delete = DeleteRequest::new();
        delete.id.clone_from(&self.id);
        delete.exec_id = exec_id.to_owned();
        let answer = self.call("Delete", &delete)?;
        let answer = DeleteResponse::parse_from_bytes(&answer)
            .map_err(|error| Failure::new(format!("the answer to Delete: {error}")))?;
        Ok(answer.exit_status)
    }

    fn call(&self, method: &str, message: &impl Message) -> Result<Vec<u8>, Failure> {
        let failed = |error: String| Failure::new(format!("{method} of {}: {error}", self.id));
        let mut request = ttrpc::Request::new();
        request.service = SERVICE.to_owned();
        request.method = method.to_owned();
        request.timeout_nano = LIMIT.as_nanos().try_into().unwrap_or(i64::MAX);
        request.payload = message
            .write_to_bytes()
            .map_err(|error| failed(error.to_string()))?;
        let answer = self.client.request(request);
        Ok(answer.map_err(|error| failed(error.to_string()))?.payload)
    }
}
