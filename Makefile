# Everything a contributor or CI runs. `make demo` and `make test` set up what they need in .venv.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCHES ?= 2.10 2.11 2.12 2.13 2.14 2.15
# torch's CUDA builds ask for one version of Triton, its CPU builds for none; there is none for macOS
TRITON ?= $(if $(filter Darwin,$(shell uname)),,triton>=3.6,<3.10)
OTHER_TRITON ?= 3.7.1
CXX ?= g++
PY := $(VENV)/bin/python
CORE_FLAGS := -std=c++17 -Icsrc -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -pthread
CORE := $(wildcard tests/native/*.cpp csrc/step/*.cpp)
CORE_DEPS := $(CORE) $(wildcard tests/native/*.h csrc/step/*.h)

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

.PHONY: help setup setup-arm setup-macos demo test pytest pytest-cpu pytest-gpu pytest-triton test-sqrt test-long lint native native-arm asan bench bench-quick bench-loop bench-gpu gpu bench-compare docs wheel wheels sdist test-wheel clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# ---- set-up

$(VENV)/tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "setuptools>=77" wheel ninja numpy "$(TORCH)" $(if $(TRITON),"$(TRITON)")
	touch $@

$(VENV)/installed: $(VENV)/tools setup.py $(wildcard csrc/*.cpp csrc/*/*)
	FASTOPT_CXXFLAGS="-Wall -Werror=unused -Werror=return-type" $(PY) -m pip install --quiet --no-build-isolation -e ".[demo,test]"
	touch $@

setup: $(VENV)/installed  ## a virtual environment in .venv with torch, triton and fastopt

setup-arm:  ## what native-arm needs, on Debian and Ubuntu
	sudo apt-get update -q && sudo apt-get install -yq g++-aarch64-linux-gnu qemu-user

setup-macos:  ## what a build on macOS needs beside Apple's compiler
	brew install libomp

# ---- the main job

demo: setup  ## train with fastopt beside torch.optim; prints a table, writes a plot
	$(PY) examples/demo.py

# ---- tests

test: setup  ## everything CI runs, two things at a time
	$(MAKE) --no-print-directory --jobs=2 lint pytest-cpu pytest-gpu native pytest-triton

GPU_TESTS := $(wildcard tests/test_gpu*.py) tests/test_kernels.py tests/test_ptx_tools.py
pytest: setup
	$(PY) -m pytest
pytest-cpu: setup
	$(PY) -m pytest $(GPU_TESTS:%=--ignore=%)
pytest-gpu: setup  ## the tests of kernels on the interpreter; none needs a GPU
	$(PY) -m pytest $(GPU_TESTS)

pytest-triton: setup $(if $(TRITON),$(VENV)/triton-$(OTHER_TRITON)/triton)  ## the kernels under another Triton
	$(if $(TRITON),PYTHONPATH=$(VENV)/triton-$(OTHER_TRITON) $(PY) -m pytest tests/test_kernels.py)

$(VENV)/triton-$(OTHER_TRITON)/triton: $(VENV)/tools
	$(PY) -m pip install --quiet --no-deps --target $(VENV)/triton-$(OTHER_TRITON) triton==$(OTHER_TRITON)

test-sqrt: setup  ## the Python tests with a torch whose square root is exact, and with one that is off by a unit in the last place
	for kind in exact off; do FASTOPT_TEST_SQRT=$$kind PYTHONPATH=$(CURDIR)/tests/tools/torch_sqrt $(PY) -m pytest || exit 1; done

test-long: setup  ## the slow tests: wheel and sdist, distributed, frameworks, memory
	$(PY) -m pytest -m slow

lint: setup  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

native: build/core-plain.passed build/core-asan.passed build/core-tsan.passed  ## the C++ core alone: plain, ASan + UBSan, TSan
build/core-plain: FLAGS := -O3
build/core-asan: FLAGS := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -DSTRIDE=1009
build/core-tsan: FLAGS := -O1 -g -fsanitize=thread -DSTRIDE=4093
build/core-%: $(CORE_DEPS)
	@mkdir -p build
	$(CXX) $(CORE_FLAGS) $(FLAGS) $(CORE) -o $@
build/%.passed: build/%
	./$< | tee $@.log && mv $@.log $@

native-arm: build/core-plain.passed  ## the core cross-compiled for AArch64, under qemu: the same hash (g++-aarch64-linux-gnu, qemu-user)
	aarch64-linux-gnu-g++ $(CORE_FLAGS) -O3 -DSTRIDE=1009 -static $(CORE) -o build/core-arm
	qemu-aarch64 build/core-arm > build/core-arm.log
	cat build/core-arm.log
	test "$$(grep hash build/core-arm.log)" = "$$(grep hash $<)"

asan: setup  ## a user's code that interrupts steps, with the extension under ASan; Linux, g++
	FASTOPT_CXXFLAGS="-O1 -g1 -fsanitize=address -fno-omit-frame-pointer" \
		$(PY) setup.py -q build --build-base build/asan --build-lib build/asan/lib
	cd build/asan/lib && \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH=$(CURDIR) \
		$(CURDIR)/$(PY) -W ignore -m tests.interruptions

# ---- benchmarks

bench: setup  ## fastopt against torch.optim, 6 to 12 minutes
	$(PY) -m bench.run
bench-quick: setup  ## the same in a minute
	$(PY) -m bench.run --quick
bench-loop: setup  ## whole training iterations part by part, steps with cold caches, clipping and averaging
	$(PY) -m bench.loop
bench-gpu: setup  ## on a machine with a GPU: correctness, then speed
	$(PY) -m bench.gpu
gpu:  ## all that a GPU has to say, in nine minutes, with the torch of PYTHON: build/gpu/summary.md; FULL=1 takes longer, DRY=1 needs no GPU
	$(PYTHON) -m bench.gpu_all $(if $(FULL),--full) $(if $(DRY),--dry)
bench-compare: setup  ## what got slower from OLD=a.json to NEW=b.json
	$(PY) -m bench.compare $(OLD) $(NEW)

# ---- documentation, wheels

docs: build/docs/installed  ## the site, in build/site; fails at a broken link
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --strict
build/docs/installed:
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet "mkdocs-material==9.*" "mkdocstrings[python]==1.*"
	touch $@

wheel: $(TORCHES:%=build/torch/%)  ## one wheel for this PYTHON and every torch in TORCHES, in dist; needs a C++ compiler
	FASTOPT_TORCHES="$^" $(PYTHON) -m pip wheel --no-deps --wheel-dir dist .
build/torch/%:  # about 0.5 GB each: headers, and the libraries to link with
	$(PYTHON) tools/unpack_torch.py $* $@

INSTALLED_TESTS ?= state hot_step numerics checkpoints
# "No compiler on the PATH" is the point of a wheel. The tests are copied, as the folder fastopt beside them hides the wheel.
test-wheel:  ## the wheel in dist, installed beside TORCH in a fresh environment without a compiler, and tests
	rm -rf build/installed && mkdir -p build/installed && cp -r tests bench kernels pyproject.toml build/installed
	$(PYTHON) -m venv build/installed/venv
	build/installed/venv/bin/python -m pip install --quiet "$(TORCH)" numpy pytest pytest-benchmark expecttest
	build/installed/venv/bin/python -m pip install --quiet --no-index --find-links dist --only-binary=:all: fastopt
	cd build/installed && PATH=$(CURDIR)/build/installed/venv/bin venv/bin/python -W error:fastopt:RuntimeWarning -m pytest \
	  $(INSTALLED_TESTS:%=tests/test_%.py)

sdist:  ## the source distribution, in dist
	$(PYTHON) -m pip install --quiet --target build/pep517 build
	FASTOPT_NO_EXTENSION=1 PYTHONPATH=build/pep517 $(PYTHON) -m build --sdist --outdir dist .

wheels: build/wheels/installed $(TORCHES:%=build/torch/%)  ## such wheels for every supported Python; needs Docker on Linux
	FASTOPT_TORCHES="$(TORCHES:%=build/torch/%)" CIBW_TEST_REQUIRES="$(TORCH)" build/wheels/bin/cibuildwheel --output-dir dist
build/wheels/installed:
	$(PYTHON) -m venv build/wheels
	build/wheels/bin/python -m pip install --quiet "cibuildwheel==3.*"
	touch $@

clean:
	rm -rf build dist *.egg-info fastopt/_C*.so .venv
