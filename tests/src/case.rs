//! A case: a name and either one container with what is expected of it, or a scenario of several
//! steps.

use std::sync::Arc;

use crate::{
    config_file::ConfigFile, container::Container, failure::Failure, machine::Runtime, scene::Scene,
};

type Steps = dyn Fn(&Scene<'_>) -> Result<(), Failure> + Send + Sync;

/// What a case does.
#[derive(Clone)]
enum Body {
    /// Runs one container and judges it.
    Row(Box<Container>),
    /// Anything else.
    Scenario(Arc<Steps>),
}

/// One line of the table.
#[derive(Clone)]
pub struct Case {
    name: String,
    body: Body,
    forkvm_only: Option<&'static str>,
    alone: bool,
    patient: bool,
    vcpus: Option<u8>,
}

/// A case that runs one container.
pub fn row(name: impl Into<String>, container: Container) -> Case {
    Case::new(name.into(), Body::Row(Box::new(container)))
}

/// A case of several steps.
pub fn scenario(
    name: impl Into<String>,
    steps: impl Fn(&Scene<'_>) -> Result<(), Failure> + Send + Sync + 'static,
) -> Case {
    Case::new(name.into(), Body::Scenario(Arc::new(steps)))
}

impl Case {
    fn new(name: String, body: Body) -> Self {
        Case {
            name,
            body,
            forkvm_only: None,
            alone: false,
            patient: false,
            vcpus: None,
        }
    }

    /// The same case once more, on forkvm with this many vCPUs, as `NAME-with-N-vcpus`. It runs alone, as the
    /// configuration says how many there are.
    #[must_use]
    pub fn with_vcpus(&self, vcpus: u8) -> Self {
        Case {
            name: format!("{}-with-{vcpus}-vcpus", self.name),
            vcpus: Some(vcpus),
            ..self.clone()
        }
        .alone()
        .forkvm_only("containers on runc see the machine's processors")
    }

    /// Nothing else runs meanwhile: for what disturbs others. What is left behind is then looked
    /// for right after the case.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// It may take longer the more there is to repeat ([`Scene::repeats`]).
    #[must_use]
    pub fn patient(mut self) -> Self {
        self.patient = true;
        self
    }

    /// Not run on runc, for a reason that `--list` shows.
    #[must_use]
    pub fn forkvm_only(mut self, reason: &'static str) -> Self {
        self.forkvm_only = Some(reason);
        self
    }

    /// The case's name: `topic/what`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many vCPUs it asks for; None takes what is configured.
    pub fn vcpus(&self) -> Option<u8> {
        self.vcpus
    }

    /// Whether its time grows with what there is to repeat.
    pub fn is_patient(&self) -> bool {
        self.patient
    }

    /// Whether it runs while no other case does.
    pub fn is_alone(&self) -> bool {
        self.alone
    }

    /// Why it is not run on runc.
    pub fn why_forkvm_only(&self) -> Option<&'static str> {
        self.forkvm_only
    }

    /// Whether it runs on this runtime.
    pub fn runs_on(&self, runtime: Runtime) -> bool {
        runtime == Runtime::Forkvm || self.forkvm_only.is_none()
    }

    /// Runs it.
    ///
    /// # Errors
    /// What was not as expected.
    pub fn run(&self, scene: &Scene<'_>) -> Result<(), Failure> {
        let _config = self.vcpus.map(ConfigFile::with_vcpus).transpose()?;
        match &self.body {
            Body::Row(container) => scene.run(container).map(drop)?,
            Body::Scenario(steps) => steps(scene)?,
        }
        scene.proved()
    }
}
