# Two commands do everything: `make demo` runs the main job, `make test` passes the tests.
# Both set up .venv first; nothing else needs to be installed but Python 3.11 or 3.12 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint setup perf_analyzer clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@echo "setting up $(VENV) (about two minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "need Python 3.11 or 3.12, got $$($(PYTHON) --version); try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/hsnn demo $(if $(KEEP),--keep)

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy model_repository/hsnn_index

# NVIDIA's load generator, for `hsnn bench capacity`: the newest one that runs on glibc 2.36, with the CUDA runtime it is
# linked to, apart from the packages of $(VENV). It also needs libb64.so.0d: apt-get install libb64-0d.
perf_analyzer: setup
	$(BIN)/pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(VENV)/perf_analyzer \
	  tritonclient==2.51.0 nvidia-cuda-runtime-cu12
	$(BIN)/python -c 'from hsnn_bench.perf_analyzer import find; print(find().binary)'

clean:
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache
