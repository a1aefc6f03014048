//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use forkvm::bench::{Options, Set};

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
    /// Measure how fast this machine forks, beside a cold boot and beside runc
    ///
    /// Prints tables, and writes a report (JSON) and plots (SVG). Each set can be measured by itself:
    ///   monitor  the monitor's own share of a fork; any /dev/kvm will do
    ///   fork     a fork of the base template beside a cold boot, to the agent's answer
    ///   sweep    the same by memory of the guest, and by number of living children
    ///   run      `ctr run --rm` beside runc; needs containerd and an image with /bin/true
    ///   burst    many `ctr run -d` at once beside runc
    #[command(verbatim_doc_comment)]
    Bench(Bench),
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

/// Options of `bench`.
#[derive(Debug, Parser)]
pub(crate) struct Bench {
    /// What to measure; everything if none is named
    #[arg(value_name = "SET")]
    sets: Vec<BenchSet>,
    /// How many forks are measured; what takes long is done a fraction of it
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Folder for the report and the plots
    #[arg(long, default_value = "forkvm-bench", value_name = "FOLDER")]
    out: PathBuf,
    /// Name of the report in it
    #[arg(long, default_value = "bench")]
    name: String,
    /// Add to what the report holds already
    #[arg(long)]
    add: bool,
    /// Image of the containers [default: the first that containerd has with busybox in its name]
    #[arg(long)]
    image: Option<String>,
    /// How many containers `burst` starts at once
    #[arg(long, default_value_t = 30, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=500))]
    burst: u16,
    /// How this machine keeps time, for the figures' names [default: hardware, or software processor]
    #[arg(long, value_name = "WORDS")]
    mode: Option<String>,
    /// Print the figures as a JSON array, for programs
    #[arg(long)]
    json: bool,
}

impl Bench {
    /// The sets in their order, and how they are measured.
    pub(crate) fn into_parts(self) -> (Vec<Set>, Options) {
        let all = BenchSet::value_variants();
        let sets = if self.sets.is_empty() {
            all
        } else {
            &self.sets
        };
        let sets = sets.iter().map(|set| match set {
            BenchSet::Monitor => Set::Monitor,
            BenchSet::Fork => Set::Fork,
            BenchSet::Sweep => Set::Sweep,
            BenchSet::Run => Set::Run,
            BenchSet::Burst => Set::Burst,
        });
        let options = Options {
            runs: self.runs.into(),
            mode: self.mode.unwrap_or_else(|| {
                let software = forkvm_vmm::on_software_processor();
                if software {
                    "software processor"
                } else {
                    "hardware"
                }
                .into()
            }),
            out: self.out,
            name: self.name,
            add: self.add,
            image: self.image,
            burst: self.burst.into(),
            json: self.json,
        };
        (sets.collect(), options)
    }
}

/// A set of `bench`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum BenchSet {
    /// The monitor's own share of a fork
    Monitor,
    /// A fork beside a cold boot
    Fork,
    /// By memory and by number of children
    Sweep,
    /// A container beside runc
    Run,
    /// Many containers at once beside runc
    Burst,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Template {
    /// Make a template before a container asks for it
    ///
    /// A container whose template is missing has it built; who comes after it finds it. This makes it in advance, if it is
    /// not there or cannot be used.
    Build {
        /// Which kind
        #[arg(default_value = "base")]
        which: Which,
        /// For containers of this containerd namespace (Docker's is "moby"); several may be given
        #[arg(long, value_name = "NAME", default_value = "default")]
        namespace: Vec<String>,
        /// For containers that are limited to this many processors
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
        vcpus: Option<u64>,
        /// For containers whose memory is limited to this many MiB
        #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
        memory: Option<u64>,
        /// Make it anew even if it is there and whole; running containers keep the old one
        #[arg(long)]
        force: bool,
        /// Print a JSON array, for programs
        #[arg(long)]
        json: bool,
    },
    /// List templates, and what happened to them
    Ls {
        /// Print only ids
        #[arg(short, long, conflicts_with = "json")]
        quiet: bool,
        /// Print a JSON object with "templates" and "record", for programs
        #[arg(long)]
        json: bool,
    },
    /// Show what a template was made from and where it fits
    Inspect {
        /// The template's id, or enough of its beginning
        id: String,
        /// Print a JSON object, for programs
        #[arg(long)]
        json: bool,
    },
    /// Remove templates that no container uses
    Rm {
        /// The templates' ids, or enough of their beginnings
        #[arg(required_unless_present = "all")]
        ids: Vec<String>,
        /// Remove all templates
        #[arg(long, conflicts_with = "ids")]
        all: bool,
        /// Print a JSON array, for programs
        #[arg(long)]
        json: bool,
    },
    /// Remove templates that are of no use any more, and what killed builds have left
    ///
    /// That is: damaged; made with another kernel, agent or monitor or on another machine; older than
    /// templates.max_age_days; and those not used for longest, while there are more than the configuration allows. None
    /// that is in use.
    Prune {
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Print a JSON array, for programs
        #[arg(long)]
        json: bool,
    },
    /// Read templates whole to see whether they are damaged
    ///
    /// Exit status 1 if one is.
    Verify {
        /// The templates' ids, or enough of their beginnings; all if none is given
        ids: Vec<String>,
        /// Print a JSON array, for programs
        #[arg(long)]
        json: bool,
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
    fn bench_measures_everything_unless_told() {
        let sets = |args: &[&str]| {
            let args = Args::try_parse_from([&["forkvm", "bench"], args].concat()).unwrap();
            match args.command {
                Command::Bench(bench) => bench.into_parts().0,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(sets(&[]).len(), BenchSet::value_variants().len());
        assert_eq!(sets(&["run", "fork"]), [Set::Run, Set::Fork]);
        for wrong in [["--runs", "0"], ["--burst", "0"]] {
            let args = [&["forkvm", "bench"], &wrong[..]].concat();
            assert!(Args::try_parse_from(args).is_err(), "{wrong:?}");
        }
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

    #[test]
    fn build_needs_no_words_and_takes_several_namespaces() {
        let parse =
            |args: &[&str]| Args::try_parse_from([&["forkvm", "template", "build"], args].concat());
        let namespaces = |args: &[&str]| match parse(args).unwrap().command {
            Command::Template(Template::Build { namespace, .. }) => namespace,
            other => panic!("{other:?}"),
        };
        assert_eq!(namespaces(&[]), ["default"]);
        assert_eq!(
            namespaces(&["base", "--namespace", "moby", "--namespace", "k8s.io"]),
            ["moby", "k8s.io"]
        );
        assert!(parse(&["--vcpus", "0"]).is_err());
        assert!(parse(&["image"]).is_err());
    }
}
