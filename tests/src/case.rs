//! A case: a name and either one container with what is expected of it, or a scenario of several
//! steps.

use crate::{container::Container, failure::Failure, machine::Runtime, scene::Scene};

/// A scenario of several steps.
pub type Scenario = fn(&Scene<'_>) -> Result<(), Failure>;

/// What a case does.
#[derive(Clone, Debug)]
enum Body {
    /// Runs one container and judges it.
    Row(Box<Container>),
    /// Anything else.
    Scenario(Scenario),
}

/// One line of the table.
#[derive(Clone, Debug)]
pub struct Case {
    name: &'static str,
    body: Body,
    forkvm_only: Option<&'static str>,
    alone: bool,
}

/// A case that runs one container.
pub fn row(name: &'static str, container: Container) -> Case {
    Case {
        name,
        body: Body::Row(Box::new(container)),
        forkvm_only: None,
        alone: false,
    }
}

/// A case of several steps.
pub fn scenario(name: &'static str, scenario: Scenario) -> Case {
    Case {
        name,
        body: Body::Scenario(scenario),
        forkvm_only: None,
        alone: false,
    }
}

impl Case {
    /// Nothing else runs meanwhile: for what disturbs others. What is left behind is then looked
    /// for right after the case.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Not run on runc, for a reason that `--list` shows.
    #[must_use]
    pub fn forkvm_only(mut self, reason: &'static str) -> Self {
        self.forkvm_only = Some(reason);
        self
    }

    /// The case's name: `topic/what`.
    pub fn name(&self) -> &'static str {
        self.name
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
        match &self.body {
            Body::Row(container) => scene.run(container).map(drop)?,
            Body::Scenario(steps) => steps(scene)?,
        }
        scene.proved()
    }
}
