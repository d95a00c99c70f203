PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-long test-amx test-versions install sanitize sanitize-python clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: install  ## set up .venv and run the model that ships in the package
	$(BIN)/moestro run demo "Once upon a time"

test: install  ## set up .venv, then lint, type-check and run the tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

test-long: install  ## run the tests that take minutes each
	$(BIN)/pytest -n 2 --dist worksteal -m long -o timeout=3600 --seed $$(date +%s)

test-versions:  ## run the tests on the oldest and the newest versions that pyproject.toml allows (an hour, 6 GB each)
	$(PYTHON) scripts/test_versions.py $(COMBINATION)

install: $(VENV)/.installed  ## set up .venv only

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

sanitize: sanitize-thread sanitize-address,undefined  ## build the C++ test driver with sanitizers and run it (-j2: both at once)

sanitize-%:
	cmake -S csrc -B build/$* -DMOESTRO_DRIVER=ON -DMOESTRO_SANITIZE=$* -DMOESTRO_EMULATE_AMX=ON
	cmake --build build/$* -j$$(getconf _NPROCESSORS_ONLN)
	build/$*/driver $(SEED)

SANITIZED := build/sanitize-python
# Preloaded, since Python itself is built without; libstdc++ too, or the sanitizer finds no __cxa_throw to watch.
PRELOADED = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)
REACH_KERNELS := $(patsubst %,tests/test_%.py,bindings strided stored cpu_kernels solver few_tokens dense experts fuse \
	batched_decode fuse_families families fork watch cache_tensors model_surgery)

sanitize-python: install  ## build the extension with ASan and UBSan and run the tests that reach it (some 8 min on 2 cores)
	rm -rf $(SANITIZED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(SANITIZED) \
		-C build-dir=build/sanitize-python-objects -C install.strip=false -C cmake.define.MOESTRO_SANITIZE=address,undefined .
	grep -q __asan_init $(SANITIZED)/moestro/compute/_kernels*.so
	LD_PRELOAD="$(PRELOADED)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest -n 2 --dist worksteal -o timeout=900 --kernels $(SANITIZED)/moestro/compute/_kernels*.so $(REACH_KERNELS)

EMULATED := build/emulated-amx
# Products of many tokens, and what reaches them from whole models.
REACH_TILES := $(patsubst %,tests/test_%.py,cpu_kernels few_tokens bindings bench_kernels act_order prompts fuse)

test-amx: install  ## build the extension with AMX's tiles in plain C++ and run the kernels' tests at that level (needs AVX-512 VNNI)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(EMULATED) --upgrade \
		-C build-dir=build/emulated-amx-objects -C cmake.define.MOESTRO_EMULATE_AMX=ON .
	$(BIN)/pytest -n 2 --dist worksteal -o timeout=900 --kernels $(EMULATED)/moestro/compute/_kernels*.so -k amx $(REACH_TILES)

clean:  ## remove .venv and what builds and tests leave
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
