# The commands of the project. What each does in detail is in the scripts it calls; all take --help.

TARGET := $(or $(CARGO_TARGET_DIR),target)
TRIPLE := x86_64-unknown-linux-gnu
# What is installed, as PRODUCT:PATH:MODE under $(TARGET) and $(DESTDIR).
ARTEFACTS := \
	$(TRIPLE)/release/forkvm:usr/bin/forkvm:755 \
	$(TRIPLE)/release/containerd-shim-forkvm-v2:usr/bin/containerd-shim-forkvm-v2:755 \
	$(TRIPLE)/release/forkvm-vmm:usr/libexec/forkvm/forkvm-vmm:755 \
	guest/vmlinux:usr/share/forkvm/vmlinux:644 \
	guest/initramfs.cpio:usr/share/forkvm/initramfs.cpio:644
PROGRAMS := forkvm containerd-shim-forkvm-v2 forkvm-vmm forkvm-e2e forkvm-conformance forkvm-figures forkvm-syscalls
AGENT := $(TARGET)/agent/$(TRIPLE)/release/forkvm-agent
MULTIARCH := x86_64-linux-gnu
STATIC_SECCOMP := LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/$(MULTIARCH)

.DEFAULT_GOAL := help
.PHONY: help deps build binaries agent kernel guest install images host shell demo test conformance fuzz soak figures report fmt lint clean

help: ## this text
	@echo "usage: make TARGET"; echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: ## containers in forked microVMs beside runc, timed; installs and builds what is missing
	@tests/demo

test: ## formatting, lints, unit tests and the end-to-end tables
	@tests/run

conformance: ## suites that others wrote, on runc first; needs Go
	@tests/conformance

fuzz: ## fuzz by hand: make fuzz TARGET=files TIME=10m (all targets, a minute each, if nothing is said)
	@# TARGET is the folder of what is built, unless it was said on the command line of this very make.
	@tests/fuzz-run --time $(or $(TIME),60) $(if $(filter command%,$(origin TARGET)),$(TARGET))

soak: ## containers and execs one after the other, a thousand of each (CYCLES=N): nothing may grow
	@tests/run soak $(CYCLES)

figures: ## measure one set of figures afresh: make figures NAME=demo, or NAME=fork
	@$(if $(NAME),tests/figures $(NAME),echo "name the figures: make figures NAME=demo" >&2; exit 2)

report: ## all figures measured so far, as one table
	@tests/report

shell: host ## a shell in the test host with the current build installed
	@tests/host shell

host: ## bring up the test host with the current build installed
	@tests/host up

images: ## the container images of demo and tests, made from Debian packages
	@tests/images/build

deps: ## install the Debian packages that are missing
	@tests/deps

build: binaries guest ## everything that is installed

# Linked statically: a start runs the shim three times and the monitor once, each of which would spend more on loading
# libraries than on its arguments. They run on any distribution, too.
binaries:
	$(STATIC_SECCOMP) RUSTFLAGS="-C target-feature=+crt-static" \
	cargo build --release --locked --target $(TRIPLE) -p forkvm -p forkvm-shim -p forkvm-vmm -p forkvm-tests --bins --target-dir $(TARGET)
	@# A shared library in a program that is linked statically ends it before its first line.
	@cd $(TARGET)/$(TRIPLE)/release && ! readelf --dynamic $(PROGRAMS) | grep NEEDED

# The guest has no libraries: the agent is linked statically, libseccomp included. It lies in the guest's memory, so it is
# built for size; and at a fixed address, or each worker would write its 22,000 relocations into pages of its own.
# Its intermediate files, if they are kept elsewhere, are too, so that it is built beside the others.
agent:
	$(if $(CARGO_BUILD_BUILD_DIR),CARGO_BUILD_BUILD_DIR=$(CARGO_BUILD_BUILD_DIR)/agent) $(STATIC_SECCOMP) CARGO_PROFILE_RELEASE_OPT_LEVEL=s CARGO_PROFILE_RELEASE_LTO=fat CARGO_PROFILE_RELEASE_CODEGEN_UNITS=1 \
	RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
	cargo build --release --locked -p forkvm-agent --target $(TRIPLE) --target-dir $(TARGET)/agent

guest: agent kernel
	guest-image/build-initramfs $(AGENT) $(TARGET)/guest/initramfs.cpio

kernel:
	guest-image/build-kernel $(TARGET)/guest

install: ## install what was built under DESTDIR; PARTIAL=1 leaves out what is not built
	@set -e; for artefact in $(ARTEFACTS); do \
		product=$(TARGET)/$${artefact%%:*} rest=$${artefact#*:}; path=$(DESTDIR)/$${rest%%:*}; \
		if [ -e $$product ]; then install -D -m $${rest##*:} $$product $$path; \
		elif [ -n "$(PARTIAL)" ]; then echo "not built, left out: $$product" >&2; \
		else echo "not built: $$product; run: make build" >&2; exit 1; fi; \
	done
	@mkdir -p $(DESTDIR)/usr/bin && ln -sf containerd-shim-forkvm-v2 $(DESTDIR)/usr/bin/containerd-shim-io-forkvm

fmt: ## format the Rust sources
	cargo fmt --all

lint: ## formatting, lints, and the licences and versions of dependencies
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@tests/deny

clean: ## remove what was built (not the cache of slow things in ~/.cache/forkvm)
	rm -rf $(TARGET)
