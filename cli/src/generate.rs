//! Manual pages and shell completions, made from the command line's definition.

use std::{
    io,
    path::{Path, PathBuf},
};

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::Args;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot write manual pages to {folder}: {source}")]
    Write { folder: PathBuf, source: io::Error },
}

/// Writes a page for each command into a folder.
pub(crate) fn man(folder: &Path) -> Result<(), Error> {
    clap_mangen::generate_to(Args::command(), folder).map_err(|source| Error::Write {
        folder: folder.to_owned(),
        source,
    })
}

/// Prints the completions of a shell.
pub(crate) fn completions(shell: Shell) {
    clap_complete::generate(shell, &mut Args::command(), "forkvm", &mut io::stdout());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_visible_command_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        man(folder.path()).unwrap();
        for page in [
            "forkvm",
            "forkvm-check",
            "forkvm-template-build",
            "forkvm-template-rm",
            "forkvm-template-prune",
            "forkvm-template-verify",
            "forkvm-ps",
            "forkvm-bench",
        ] {
            let text = std::fs::read_to_string(folder.path().join(format!("{page}.1"))).unwrap();
            assert!(text.contains(".SH NAME"), "{page}");
        }
        assert!(!folder.path().join("forkvm-completions.1").exists());
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = man(Path::new("/nonexistent/folder")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/folder"));
    }
}
