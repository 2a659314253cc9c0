# make run: set everything up and fine-tune a tokenizer on bundled photographs. make help: the rest.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin

TRAIN_ARGS ?=
# $(call train,DATA,RECIPE): train runs/RECIPE, or resume it
train = if [ -d runs/$(2) ]; then $(BIN)/smalto train --resume runs/$(2) $(TRAIN_ARGS); \
	else $(BIN)/smalto train $(1) --recipe recipes/$(2).toml --out runs/$(2) $(TRAIN_ARGS); fi

.DEFAULT_GOAL := help
.PHONY: .venv help run run-generator test test-slow photos photos-f4 photos-f8 emoji check bench clean

help: ## list the targets
	@grep -E '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: .venv ## set up, fine-tune photos-f4, write runs/demo/report.html (2 minutes on 2 cores after the setup)
	$(BIN)/smalto demo $(ARGS)

run-generator: .venv ## set up, train a tokenizer and a generator of emoji, make new ones (80 minutes on 2 cores)
	$(call train,emoji,emoji-tokenizer)
	$(BIN)/smalto tokenize emoji --tokenizer runs/emoji-tokenizer --size 72 --flip --out runs/emoji.lance
	$(call train,runs/emoji.lance,emoji-generator)
	$(BIN)/smalto generate runs/emoji-generator --count 100 --guidance 3 --out runs/emoji-samples $(ARGS)

test: .venv check ## set up, then style, types, imports and the default tests
	$(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)

test-slow: .venv ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

photos: .venv ## fetch 454 photographs under free licenses from Debian's packages into data/photos
	PYTHON="$(CURDIR)/$(BIN)/python" datasets/photos.sh

photos-f4: ## retrain the tokenizer photos-f4 and measure it (30 minutes on 2 cores)
photos-f8: ## retrain the tokenizer photos-f8 and measure it (two hours on 2 cores)
photos-f4 photos-f8: .venv
	test -f data/photos/ATTRIBUTION.tsv || $(MAKE) photos
	$(call train,data/photos/train,$@)
	$(BIN)/python benchmarks/pretrained.py runs/$@ data/photos --install $@

emoji: .venv ## retrain the generator emoji with its tokenizer and measure it (80 minutes on 2 cores)
	$(call train,emoji,emoji-tokenizer)
	test -d runs/emoji-shipped || $(BIN)/python benchmarks/emoji.py runs/emoji-shipped --round runs/emoji-tokenizer
	$(BIN)/smalto tokenize emoji --tokenizer runs/emoji-shipped --size 72 --flip --out runs/emoji-shipped.lance
	$(call train,runs/emoji-shipped.lance,emoji-generator)
	$(BIN)/python benchmarks/emoji.py runs/emoji-generator --install

check: .venv ## style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: .venv ## measure; results go to benchmarks/results (five hours; let nothing else run)
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/readers.py
	$(BIN)/python benchmarks/tokenization.py
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[bench]" && $(BIN)/python benchmarks/train.py && $(BIN)/python benchmarks/store.py
	rm -rf runs/bench-vqgan && $(BIN)/python benchmarks/vqgan.py runs/bench-vqgan && $(BIN)/python docs/make_vqgan.py runs/bench-vqgan/photos-vqgan-small
	test -f data/photos/ATTRIBUTION.tsv || $(MAKE) photos
	$(BIN)/python benchmarks/local.py data/photos runs/bench-local
	$(BIN)/python benchmarks/finetuning.py runs/bench-finetuning
	$(BIN)/python benchmarks/generate.py
	rm -rf runs/bench-var && $(BIN)/python benchmarks/var.py runs/bench-var && $(BIN)/python docs/make_var.py runs/bench-var/var-small
	rm -rf runs/bench && $(BIN)/python benchmarks/demo.py runs/bench && $(BIN)/python docs/make_image.py runs/bench/demo

.venv: .venv/installed ## only set up; PIP_ARGS=... goes to pip

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "smalto needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

clean: ## remove the environment and caches; runs stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
