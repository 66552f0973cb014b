# Two commands do everything: `make demo` runs the main job, `make test` passes the tests.
# Both set up .venv first; nothing else needs to be installed but Python 3.11 or 3.12 and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint setup perf_analyzer prometheus clean

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

# Without Prometheus the tests that need it are skipped, and say so.
test: setup
	@$(MAKE) -s --no-print-directory prometheus || echo "no Prometheus here; its tests will be skipped"
	$(BIN)/python -m pytest -n 2 --dist loadfile

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

# Prometheus and promtool from Debian's or Ubuntu's package, unpacked beside the virtual environment's own packages: no root,
# nothing installed. apt's lists are fetched into a folder of their own, since those of the machine may be missing or old.
PROMETHEUS := $(VENV)/prometheus
APT := apt-get -qq -o Dir::State=$(abspath $(PROMETHEUS))/apt -o Dir::Cache=$(abspath $(PROMETHEUS))/apt \
  -o Dir::State::status=/var/lib/dpkg/status -o APT::Sandbox::User=
prometheus: $(PROMETHEUS)/usr/bin/promtool

$(PROMETHEUS)/usr/bin/promtool:
	@rm -rf $(PROMETHEUS) && mkdir -p $(PROMETHEUS)/apt/lists/partial $(PROMETHEUS)/apt/archives/partial
	$(APT) update
	cd $(PROMETHEUS)/apt && $(APT) download prometheus
	dpkg-deb -x $(PROMETHEUS)/apt/prometheus_*.deb $(PROMETHEUS)/new
	@rm -r $(PROMETHEUS)/apt && mv $(PROMETHEUS)/new/usr $(PROMETHEUS)/usr && rm -r $(PROMETHEUS)/new
	@touch $@

clean:
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache
