# Each target works alone on a fresh clone with Python 3.11+ and a C++ compiler; all of them use ./.venv.
#
#   make demo        what the zoo's models make, the plans behind it, and a table beside eager PyTorch
#   make test        the whole test suite
#   make lint        ruff and mypy
#   make bench       kernels and models against their peers, interleaved
#   make gpu-check   on a machine with an NVIDIA GPU: all that only a GPU can show
#   make sanitize    the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
#   make races       the C++ kernels under ThreadSanitizer
#   make test-arm    the C++ kernels for AArch64, under an emulator
#   make native      the three before, in one run
#   make zoo         train and export the zoo's models anew (hours on a CPU)
#   make clean       remove what these targets made
#
# JOBS: how many processes `make test`, `native`, `sanitize`, `races` and `test-arm` use; PYTHON: the interpreter of the
# environment; PIP_FLAGS go to every pip install, for instance
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"    (PyTorch without CUDA: 200 MB)

PYTHON    ?= python3
PIP_FLAGS ?=
PYTEST    ?= -q
JOBS      ?= 2
VENV      := .venv
BIN       := $(VENV)/bin
PIP       := $(BIN)/python -m pip --disable-pip-version-check
CSRC      := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
SETUP     := pyproject.toml setup.py constraints.txt $(CSRC)
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: demo test lint bench gpu-check sanitize races test-arm native need-arm zoo clean
.DELETE_ON_ERROR:

$(VENV)/pip.stamp:
	@echo "== environment: $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fusegen needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp a set of extras: nothing is installed again until what it was made from changes.  ALSO: the sets it holds.
$(VENV)/run.stamp: EXTRAS :=
$(VENV)/test.stamp: EXTRAS := [test]
$(VENV)/lint.stamp: EXTRAS := [test,lint]
$(VENV)/lint.stamp: ALSO := $(VENV)/run.stamp $(VENV)/test.stamp
$(VENV)/bench.stamp: EXTRAS := [bench]
$(VENV)/%.stamp: $(SETUP) | $(VENV)/pip.stamp
	@echo "== install: fusegen$(EXTRAS)"
	$(PIP) install $(PIP_FLAGS) -c constraints.txt -e ".$(EXTRAS)"
	@touch $@ $(ALSO)

demo: $(VENV)/run.stamp
	@$(BIN)/python -m fusegen.demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST)

# The link tree shows mypy the package under the names it is imported by.
lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	@mkdir -p .links/fusegen
	@for f in fusegen/*; do ln -sfn ../../$$f .links/$$f; done
	@for d in kernels runtime models bench; do ln -sfn ../../$$d .links/fusegen/$$d; done
	cd .links && ../$(BIN)/mypy --config-file ../pyproject.toml -p fusegen

bench: $(VENV)/bench.stamp
	$(BIN)/fusegen bench kernels
	$(BIN)/fusegen bench models

gpu-check: $(VENV)/run.stamp
	$(BIN)/python -m fusegen.bench.gpu_check

# The kernels outside of Python; see tests/native.
NATIVE = $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST) -p no:cacheprovider

sanitize: $(VENV)/test.stamp
	$(NATIVE) tests/native/test_sanitize.py

races: $(VENV)/test.stamp
	$(NATIVE) tests/native/test_races.py

test-arm: need-arm $(VENV)/test.stamp
	$(NATIVE) tests/native/test_arm.py

native: need-arm $(VENV)/test.stamp
	$(NATIVE) tests/native/test_sanitize.py tests/native/test_races.py tests/native/test_arm.py

need-arm:
	@command -v aarch64-linux-gnu-g++ >/dev/null && { command -v qemu-aarch64-static || command -v qemu-aarch64; } >/dev/null || \
	  { echo "make $(MAKECMDGOALS) needs two Debian packages: apt-get install g++-aarch64-linux-gnu qemu-user-static" >&2; exit 1; }

zoo: $(VENV)/run.stamp
	$(BIN)/python -m fusegen.models.zoo.emoji.train --out build/emoji
	$(BIN)/python -m fusegen.models.zoo.emoji.export build/emoji -o models/zoo/emoji.fg
	$(BIN)/python -m fusegen.models.zoo.emoji_gan.train --out build/emoji-gan --steps 12800
	$(BIN)/python -m fusegen.models.zoo.emoji_gan.export build/emoji-gan -o models/zoo/emoji-gan.fg
	$(BIN)/python -m fusegen.models.zoo.pycode.train --out build/pycode
	$(BIN)/python -m fusegen.models.zoo.pycode.export build/pycode -o models/zoo/pycode.fg

clean:
	rm -rf $(VENV) .links build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find kernels -name '*.so' -delete
