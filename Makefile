# The two commands: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip would compile 19,000 files, on one core; what is imported is compiled and kept then.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo demo-t2i test test-all bench study family clean-venv

demo: $(VENV)/.ready
	$(BIN)/python -m launch.demo --workdir=runs/demo $(DEMO_FLAGS)

# Text to image, on captioned emoji: DIR has noto_png128.zip and captions.jsonl (docs/user_guide.md).
demo-t2i: $(VENV)/.ready
	$(BIN)/python -m launch.demo_t2i --emoji=$(or $(EMOJI),data/emoji) --workdir=runs/emoji $(DEMO_FLAGS)

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 2 --dist=loadgroup $(TEST_FLAGS)

# And what takes gigabytes of memory, or shows a second time what `test` shows once.
test-all: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 2 --dist=loadgroup -m 'slow or not slow' $(TEST_FLAGS)

bench: $(VENV)/.ready
	$(BIN)/python -m launch.bench --out=bench/results.json

study: $(VENV)/.ready
	$(BIN)/python -m launch.study --all --workdir=runs/study $(STUDY_FLAGS)

# Every method, base and +DDIL, from one teacher with and without guidance: hours, resumable.
family: study-family study-inference

study-%: $(VENV)/.ready
	$(BIN)/python -m launch.study $* --workdir=runs/study $(STUDY_FLAGS)

$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready requirements-test.txt
	$(PIP) -r requirements-test.txt
	touch $@

clean-venv:
	rm -rf $(VENV)
