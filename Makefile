PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-versions install sanitize clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: install  ## set up .venv and run the model that ships in the package
	$(BIN)/moestro run demo "Once upon a time"

test: install  ## set up .venv, then lint, type-check and run the tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

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
	cmake -S csrc -B build/$* -DMOESTRO_DRIVER=ON -DMOESTRO_SANITIZE=$*
	cmake --build build/$* -j$$(getconf _NPROCESSORS_ONLN)
	build/$*/driver $(SEED)

clean:  ## remove .venv and what builds and tests leave
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
