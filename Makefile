# `make demo`, `make test` and `make docs` do all the set-up: a virtual environment in .venv, under the pins of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
DEMO := adamw galore lora-pre-stable mlorc gossamer
STAMP := .venv/.installed
# tests run side by side, one a core; a thread pool in each would fight over the cores
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: demo test docs lint clean

# threads that wait without spinning leave the cores to whatever else runs
demo: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/gossamer bench quick --methods $(DEMO) --out runs/demo

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

# the site, in docs/_build/html; a warning is an error
docs: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m sphinx -W --keep-going -q -c docs -d docs/_build/doctrees . docs/_build/html
	$(TEST_ENV) $(BIN)/gossamer report results --out docs/_build/html/report
	@echo docs/_build/html/index.html

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "gossamer: 'python3 -m venv' failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv docs/_build
