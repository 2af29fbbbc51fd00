# The project's verbs. Each calls cargo or a script; nothing is decided here.
# Tests always build the whole workspace: cargo would build third-party crates again for any other choice of packages.

CARGO := cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
TOOLS := scripts/install-tools
BENCH := $(CARGO) bench --workspace --locked --features lvp/bench --bench performance

.PHONY: help build build-linux run demo test e2e faults lint format fuzz-smoke fuzz bench bench-document schema clean

help: ## List the verbs
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

build: ## Build target/release/lvp
	$(TOOLS) build
	$(CARGO) build --release --locked

build-linux: build ## The same: lvp runs on Linux only

run: build ## Build and run the daemon with the environment's settings
	$(TARGET)/release/lvp serve

demo: ## Show the main job end to end: no root, no LVM, no libvirt daemon, nothing prepared
	$(TOOLS) test
	$(CARGO) build --workspace --locked --quiet
	$(TARGET)/debug/demo

test: ## Run every test that needs no test machine
	$(TOOLS) test
	$(CARGO) test --workspace --locked

e2e: build ## Run the scenarios on real LVM, libvirt and MinIO, in a virtual machine
	$(TOOLS) all
	$(CARGO) xtask bed build
	$(CARGO) xtask minio build
	scripts/e2e

faults: test build ## Every test there is, with provisions broken at every point in every way; tables in target/faults (three hours on two cores)
	$(TOOLS) all
	$(CARGO) xtask bed build
	$(CARGO) xtask minio build
	FAULTS_ALL=1 scripts/e2e

lint: ## Check format, lints and documentation
	$(TOOLS) build
	$(CARGO) fmt --all --check
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy --workspace --all-targets --all-features --locked --quiet -- -D warnings

format: ## Format the code
	$(CARGO) fmt --all
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml

fuzz-smoke: ## Fuzz every target for some seconds, always with the same inputs
	$(TOOLS) build
	scripts/fuzz smoke

fuzz: ## Fuzz every target for FUZZ_SECONDS (600) each, and hold changed images against qemu-img
	$(TOOLS) fuzz
	scripts/fuzz long

bench: ## Measure against curl, sha256sum and qemu-img; prints ratios (BENCH_QUICK=1: fewer cases)
	$(TOOLS) all
	$(BENCH)

bench-document: ## Put the numbers of the last `make bench` into docs/reference/performance.md
	$(BENCH) -- --document

schema: ## Write what is generated from the code and committed: schema/, docs/reference
	UPDATE=1 $(CARGO) test --workspace --locked --test generated

clean: ## Remove what was built
	$(CARGO) clean
