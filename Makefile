# make demo            set up .venv and run the whole path on synthetic CT (CT="FILE FOLDER" for real scans)
# make test            set up .venv and pass every check
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
CT ?=
OUT ?= .demo
CPP := $(wildcard csrc/*.cpp csrc/*.hpp csrc/include/tapct/*.hpp csrc/gpu/*.cpp csrc/gpu/*.cu \
  tests/native/*.cpp tests/native/*.hpp tests/fuzz/*.cpp)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test setup dev lint types contracts docs native wheel pytest fuzz format clean

demo: setup
	$(BIN)/tapct-fast demo --out $(OUT) $(if $(CT),--ct $(CT))

# Cheap checks first; each is a target of its own.
test: lint types contracts docs native wheel pytest

# What a build without isolation needs comes first.
$(VENV)/.base: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tapct_fast needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch triton numpy blosc2 pybind11 scikit-build-core cmake ninja
	touch $@

# The package itself, editable, with the extra of that name; changed C++ sources build it anew.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.base pyproject.toml CMakeLists.txt $(CPP)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[$*]'
	touch $@

setup: $(VENV)/.demo
dev: $(VENV)/.dev

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

types: dev
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tapct_fast._native

contracts: dev
	$(BIN)/lint-imports

# The site in docs/_build/html; -E runs every tutorial again, -W makes a warning an error.
docs: dev
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html

native: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/native -G Ninja -DTAPCT_BUILD_TESTS=ON -DTAPCT_WERROR=ON -DTAPCT_CUDA=OFF -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/native
	$(BIN)/ctest --test-dir build/native --output-on-failure

# The wheel, used from an empty folder; -S leaves out the editable install's hook.
wheel: dev
	rm -rf build/wheel && mkdir -p build/wheel/empty
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/python -m pip install -q --no-deps --target build/wheel/site build/wheel/*.whl
	cd build/wheel/empty && $(CURDIR)/$(BIN)/python -S $(CURDIR)/tests/use_wheel.py $(CURDIR)/build/wheel/site $$($(CURDIR)/$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Ten minutes for each native parser, with AddressSanitizer and UBSan; needs clang.
FUZZ_SECONDS ?= 600
fuzz: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/fuzz -G Ninja -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTAPCT_BUILD_FUZZERS=ON -DTAPCT_CUDA=OFF -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build build/fuzz
	$(BIN)/python tests/fuzz/seeds.py build/fuzz/corpus
	set -e; for name in dicom gzip nifti b2nd; do \
	  build/fuzz/fuzz_$$name -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -timeout=10 -rss_limit_mb=4096 build/fuzz/corpus/$$name; done

# A test per core, each of one thread.
pytest: dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build $(VENV) .demo docs/_build docs/api
