# Each target sets up .venv by itself: Python >= 3.11, a C++17 compiler and make are all it takes.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train demo test full acceptance bench check clean

train: .venv/train  ## train a small model on the embedded text
	$(BIN)/python -m fastgpt.pretrain $(ARGS)

demo: .venv/train  ## pretraining, finetuning, reward model and PPO, then compare the models
	$(BIN)/python -m fastgpt.pipeline $(ARGS)

# Interpreted and compiled kernels cannot share a process, hence two runs of pytest.
test: .venv/test  ## the whole test suite
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpret $(ARGS)
	$(BIN)/python -m pytest $(ARGS)

full: .venv/full  ## with the long matrices, soak and fuzz runs
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpret -m 'not acceptance' $(ARGS)
	$(BIN)/python -m pytest -m 'not acceptance' $(ARGS)

acceptance: .venv/test  ## does the whole way improve a model? minutes, downloads 2 MB
	$(BIN)/python -m pytest -m acceptance $(ARGS)

bench: .venv/bench  ## throughput, each figure behind a correctness check
	$(BIN)/python -m pytest bench $(ARGS)

check: .venv/dev  ## lint, format, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/attend/* tests/csrc/*.cpp tests/csrc/*.h

.venv/%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --editable '.$(EXTRAS)'
	touch $@

.venv/test: EXTRAS := [test]
.venv/full: EXTRAS := [test,harness]
.venv/bench: EXTRAS := [test,bench]
.venv/dev: EXTRAS := [test,bench,dev]

clean:
	rm -rf .venv build dist runs *.egg-info fastgpt/*.so
