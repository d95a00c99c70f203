PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test install sanitize clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: install  ## set up .venv and run the model that ships in the package
	$(BIN)/moestro run demo "Once upon a time"

test: install  ## set up .venv, then lint, type-check and run the tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

install: $(VENV)/.installed  ## set up .venv only

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

sanitize:  ## build the C++ test driver with address, undefined and thread sanitizers and run it
	for kinds in address,undefined thread; do \
	  cmake -S csrc -B build/$$kinds -DMOESTRO_DRIVER=ON -DMOESTRO_SANITIZE=$$kinds && \
	  cmake --build build/$$kinds -j2 && build/$$kinds/driver || exit 1; \
	done

clean:  ## remove .venv and what builds and tests leave
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
