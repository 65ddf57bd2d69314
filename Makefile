# `make demo` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-all browser check bench docs clean

demo: $(VENV)/.installed
	$(BIN)/headscope rank retrieval --model zoo:needle --top 8

test: $(VENV)/.installed-dev browser
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -q -n 3 --dist loadfile -m "not slow"

test-all: $(VENV)/.installed-dev browser
	$(BIN)/python -m pytest -q -n 3 --dist loadfile

# Tests of pages run in a Chromium of the system. On Debian, as root, one is installed; elsewhere
# they are skipped without one, unless CI is set.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null \
	|| command -v google-chrome >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	chromium fonts-dejavu-core >/dev/null; } \
	|| { echo "no Chromium: tests of pages need one"; [ -z "$$CI" ]; }

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/seam.py
	$(BIN)/python benchmarks/readings.py
	$(BIN)/python benchmarks/patching.py
	$(BIN)/python benchmarks/screening.py
	$(BIN)/python benchmarks/probes.py
	$(BIN)/python benchmarks/sight.py
	$(BIN)/python benchmarks/dashboard.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

# torch comes first and pinned: without the pin, other packages pull a build of several gigabytes.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,app]'
	touch $@
