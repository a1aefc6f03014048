//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// Looks after forkvm on this machine: checks it, makes templates, lists running containers
#[derive(Debug, Parser)]
#[command(name = "forkvm", version, max_term_width = 100)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say whether this machine can run forkvm's containers, and what to do if not
    ///
    /// One line for each question. The questions about KVM are answered by running a tiny guest.
    /// Exit status 1 if containers cannot start.
    Check {
        /// Print a JSON array, for programs
        #[arg(long)]
        json: bool,
    },
    /// Make, list and remove templates, from which containers' virtual machines are forked
    #[command(subcommand)]
    Template(Template),
    /// List running containers
    Ps {
        /// Show the named time points of each start
        #[arg(long)]
        timings: bool,
        /// Print a JSON array, for programs
        #[arg(long)]
        json: bool,
    },
    /// Write manual pages
    #[command(hide = true)]
    Man {
        /// Folder for the pages; must exist
        folder: PathBuf,
    },
    /// Print a shell's completions
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// Make a template, if it is not there yet
    Build {
        /// Which template
        which: Which,
        /// Make it anew even if it is there and whole
        #[arg(long)]
        force: bool,
    },
    /// List templates
    Ls {
        /// Print only ids
        #[arg(short, long, conflicts_with = "json")]
        quiet: bool,
        /// Print a JSON array, for programs
        #[arg(long)]
        json: bool,
    },
    /// Show what a template was made from, and read it whole to see whether it is damaged
    Inspect {
        /// The template's id, or "base" for the one that containers start from
        id: String,
    },
    /// Remove templates
    Rm {
        /// The templates' ids, or "base" for the one that containers start from
        #[arg(required_unless_present = "all")]
        ids: Vec<String>,
        /// Remove all templates
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
}

/// A kind of template.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Which {
    /// A booted kernel and a listening agent, without an image
    Base,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn rm_takes_ids_or_all() {
        let parse =
            |args: &[&str]| Args::try_parse_from([&["forkvm", "template", "rm"], args].concat());
        assert!(parse(&["0123456789abcdef", "base"]).is_ok());
        assert!(parse(&["--all"]).is_ok());
        assert!(parse(&[]).is_err());
        assert!(parse(&["base", "--all"]).is_err());
    }
}
