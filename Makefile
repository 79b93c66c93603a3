# make train      set up and run train_mac.py; pass arguments through ARGS, e.g. make train ARGS="--preset full"
# make sample     text from the newest run; e.g. make sample ARGS="'Once upon' --run runs/full --seed 1"
# make eval       bits per byte of its test split by length of context
# make chat       a conversation with it; e.g. make chat ARGS="--state chat.pt"
# make test       set up and run the tests; e.g. make test ARGS="-k neural_memory"
# make lint       ruff, codespell and mypy
# make shapes     run the fast tests with the shape annotations checked
# make coverage   run the tests and print the lines they miss
# make wheel      build the wheel, install it into an empty folder, and import it from there
# make docs       build the documentation into site/
# make bench      run benchmarks/ on this machine
# make pictures   draw docs/assets, e.g. make pictures ARGS="surprise retention"
# make golden     regenerate the figures of the reference package that the tests compare with

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
# each process begins with consecutive tests, which share fixtures, and takes over tests of others once it is done
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: train sample eval chat test lint shapes coverage wheel docs bench pictures golden clean

train: $(VENV)/.ready
	$(BIN)/python train_mac.py $(ARGS)

sample: $(VENV)/.ready
	$(BIN)/python -m titans_pytorch generate $(ARGS)

eval: $(VENV)/.ready
	$(BIN)/python -m titans_pytorch evaluate $(ARGS)

chat: $(VENV)/.ready
	$(BIN)/python -m titans_pytorch chat $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python $(PYTEST) $(ARGS)

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

# inside compiled programs nothing is checked
shapes: $(VENV)/.ready-lint
	$(BIN)/python $(PYTEST) --shapes -k 'not compile' \
		tests/attention tests/generation tests/memory tests/models tests/ops $(ARGS)

coverage: $(VENV)/.ready-lint
	$(BIN)/python $(PYTEST) --cov --cov-report term $(ARGS)

wheel: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target dist/installed dist/*.whl
	cd dist && PYTHONPATH=installed $(abspath $(BIN))/python -c \
		"import titans_pytorch as t; print(t.__version__, t.__file__); assert 'installed' in t.__file__"

# the variable silences an advertisement
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/layer.py $(ARGS)

pictures: $(VENV)/.ready
	$(BIN)/python benchmarks/pictures.py $(ARGS)

golden: $(VENV)/.ready-reference
	cd tests/golden && ../../$(VENV)/reference/bin/python make_golden.py

# torch first and alone, so that packages that depend on it keep this build
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
	rm -rf $(VENV) dist runs site .coverage .pytest_cache .ruff_cache .mypy_cache
