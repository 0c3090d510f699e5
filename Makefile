# `make demo`, `make test`, `make check`. The first of them makes .venv and installs everything into it.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
# the last that a run writes
CARD := lora/README.md
# two files at a time, with a thread each, in their order: by size, those with few but long tests would come last
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check docs dist format clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

# Two runs from the same seed, one without and one with exploration, and what tells them apart.
demo: $(DEMO)/baseline/$(CARD) $(DEMO)/diffexp/$(CARD)
	$(BIN)/diffexp compare $(DEMO)/baseline $(DEMO)/diffexp --out $(DEMO)/comparison
	@echo "Look at $(DEMO)/comparison/curves.png and grid.png; the LoRA files are in $(DEMO)/diffexp/lora."

$(DEMO)/baseline/$(CARD): | .venv/installed
	$(BIN)/diffexp train demo --out $(DEMO)/baseline

$(DEMO)/diffexp/$(CARD): | .venv/installed
	$(BIN)/diffexp train demo-diffexp --out $(DEMO)/diffexp

test: .venv/installed
	$(TESTS)

check: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(TESTS)

docs: .venv/installed
	$(BIN)/python -m tools.docs
	@echo "Look at site/index.html."

# The wheel in an environment of its own, with nothing of this folder in sight.
dist: .venv/installed
	rm -rf dist build/dist
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/dist
	build/dist/bin/pip install --quiet --constraint constraints.txt torch
	build/dist/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build/dist && bin/diffexp sample emoji --prompt "a cat" --n 1 --out painted
	@ls -l dist

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv $(DEMO) build dist site .cache
