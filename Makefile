# make train    set up and run train_mac.py; further arguments through ARGS, e.g. make train ARGS="--preset full"
# make test     set up and run the suite; e.g. make test ARGS="-k neural_memory"
# make lint     ruff and mypy
# make docs     build the documentation into site/
# make bench    benchmarks/, on whatever the machine has
# make pictures draw docs/assets, e.g. make pictures ARGS="surprise retention"
# make golden   remake the figures of the reference package that the suite compares with

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: train test lint docs bench pictures golden clean

train: $(VENV)/.ready
	$(BIN)/python train_mac.py $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 $(ARGS)

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the variable silences an advertisement
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/layer.py $(ARGS)

pictures: $(VENV)/.ready
	$(BIN)/python benchmarks/pictures.py $(ARGS)

golden: $(VENV)/.ready-reference
	cd tests/golden && ../../$(VENV)/reference/bin/python make_golden.py

# torch first and alone: what depends on it then takes the build that is there
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.ready-lint: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.ready-reference: constraints.txt
	$(PYTHON) -m venv $(VENV)/reference
	$(VENV)/reference/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV)/reference/bin/pip install --quiet -c constraints.txt titans-pytorch==0.5.5
	touch $@

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache .mypy_cache
