# Everything runs in .venv, which the first target that needs it makes. pip only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --durations 10

.PHONY: help demo test test-all lint bench bench-export bench-compose bench-quality docs kills check-extras clean

help:
	@echo "make demo   learn on the bundled pipeline, export, draw six ways, print the table (out/demo)"
	@echo "make test   the tests that a change must pass: minutes (docs/testing.md)"
	@echo "make test-all   all tests: long; SLICE=3/8 for the third of eight parts"
	@echo "make lint   ruff and mypy"
	@echo "make bench  benchmarks: long, prints ratios; bench-export, bench-compose, bench-quality for one kind"
	@echo "make docs   write the generated pages of docs/"
	@echo "make kills  fifty kills at random moments of save, export and learning: old or new, never half"
	@echo "make check-extras   a fresh environment per extra, and the README's quick start in it: long"

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/lazycompress demo out/demo --overwrite

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[executorch]'
	$(PYTEST) $(if $(SLICE),--slice $(SLICE))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typed/lazycompress
	ln -sfn ../../../integrations build/typed/lazycompress/integrations
	$(BIN)/mypy
	$(BIN)/mypy examples/web/make.py

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

bench-export: $(STAMP)
	$(BIN)/python -m tests.benchmarks.export_latency --shape S/2 B/2 XL/2 --precision f32 bf16 --batch 1 2 8
	$(BIN)/python -m tests.benchmarks.export_memory --shape XL/2
	$(BIN)/python -m tests.benchmarks.export_time

bench-compose: $(STAMP)
	$(BIN)/python -m tests.benchmarks.compose_latency
	$(BIN)/python -m tests.benchmarks.compose_accuracy
	$(BIN)/python -m tests.benchmarks.compose_size
	$(BIN)/python -m tests.benchmarks.compose_time
	$(BIN)/python -m tests.benchmarks.int8_plans

bench-quality: $(STAMP)
	$(BIN)/pip install --quiet --no-deps cache-dit
	$(BIN)/python -m tests.benchmarks.quality
	$(BIN)/python -m tests.benchmarks.quality --write docs/quality.md

docs: $(STAMP)
	$(BIN)/lazycompress recipes --reference > docs/recipes.md
	$(BIN)/python -m tests.coverage --write docs/coverage.md
	$(BIN)/python -m tests.hostile --write docs/robustness.md

kills: $(STAMP)
	$(BIN)/python -m tests.kills

check-extras: $(STAMP)
	$(BIN)/python -m tests.extras

clean:
	rm -rf $(VENV) out build *.egg-info
