# Every target sets up what it needs. Two to know: make txt2img PROMPT="a red apple"; make test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python

.PHONY: txt2img test test-all check format clean fuzz bench

# The prompt goes through the environment, so that quotes, apostrophes and dollar signs in it stay what they are.
txt2img: export PROMPT_TEXT := $(value PROMPT)
txt2img: .venv/.installed
	@$(PY) scripts/txt2img.py --prompt="$$PROMPT_TEXT" $(ARGS)

test: .venv/.installed-dev
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not slow"

test-all: .venv/.installed-dev
	$(PY) -m pytest -q

check: .venv/.installed-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not slow"

# A hundred thousand damaged models: each loads or is refused in one line.
fuzz: .venv/.installed-dev
	$(PY) tests/families/fuzz.py

# A thousand kills of training runs at random moments, full disks, flipped bytes, signals: each run ends as if left alone.
.PHONY: chaos
chaos: .venv/.installed-dev
	$(PY) tests/training/chaos.py $(ARGS)

# The benchmarks in their short form, into docs/performance.md; ARGS names some of them. Peers that do not install are left out, by name.
bench: .venv/.installed-dev .venv/.installed-bench
	$(PY) benchmarks/run.py $(ARGS)

format: .venv/.installed-dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps k-diffusion==0.1.1.post1
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/compvis stable-diffusion-sdkit==2.1.3
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/optional bitsandbytes==0.50.2
	@touch $@

.venv/.installed-bench: requirements-bench.txt
	-$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/bench -r requirements-bench.txt
	@touch $@

.PHONY: weights corpus
weights: weights/lpips_alex.safetensors weights/lpips_vgg.safetensors weights/inception.safetensors

weights/%.safetensors: | .venv/.installed
	$(PY) scripts/fetch_weights.py --out weights --only $*

corpus: .venv/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check resvg-py==0.5.0
	$(PY) scripts/make_corpus.py --out data/parquet $(ARGS)
