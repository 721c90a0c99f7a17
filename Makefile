# `make demo` and `make test` need Python 3.11 or newer and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HARNESS := $(VENV)/.harness
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test test-all test-faults golden golden-renew parity check format docs tiny-model bench clean

demo: $(READY)  ## train a DPO LoRA on the embedded model and data, then ask it something
	dir=runs/demo-$$(date +%Y%m%d-%H%M%S) && $(BIN)/llmrecipe train recipe=dpo_lora run.dir=$$dir && \
		$(BIN)/llmrecipe chat $$dir --prompt "What is the hen like? Please leave out the duck."

test: $(READY)  ## the fast suite
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow and not faults" -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(READY) $(HARNESS)  ## everything: parity with trl, peft and lm-evaluation-harness, whole recipes, two processes, kills
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: $(READY)  ## runs and pipelines killed at every stage and moment: what goes on equals what ran through
	$(ONE_THREAD) $(BIN)/python -m pytest -m faults -n 2 --dist worksteal

golden: $(READY)  ## whether small trainings, counters and imports are what they were (tests/golden)
	$(ONE_THREAD) $(BIN)/python -m pytest tests/golden

golden-renew: $(READY)  ## write them anew: REASON="why" [ONLY="dpo_lora counters imports"]
	@$(ONE_THREAD) $(BIN)/python -m tests.golden.renew "$(REASON)" $(ONLY)

parity: $(READY)  ## how far every method is from its reference: a table; REASON="why" where a difference grew tenfold
	$(ONE_THREAD) $(BIN)/python -m pytest tests/methods -n 2 --dist loadfile -m parity \
		--deviations tests/benchmarks/results --deviations-reason "$(REASON)"

check: $(READY)  ## lint, format, layers and types
	$(BIN)/ruff check llmrecipe tests
	$(BIN)/ruff format --check llmrecipe tests
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy llmrecipe

format: $(READY)  ## put the code into shape
	$(BIN)/ruff check --fix llmrecipe tests
	$(BIN)/ruff format llmrecipe tests

docs: $(READY)  ## refresh the tables of the documentation that are generated
	$(BIN)/python -m llmrecipe.cli.doc_tables

bench: $(READY)  ## the same work here and in TRL + PEFT, in turn; prints ratios
	$(BIN)/python tests/benchmarks/harness.py

tiny-model: $(READY)  ## corpus and weights of the embedded model, from nothing
	rm -rf build/tiny
	$(BIN)/python -m llmrecipe.data.toy.generate
	$(BIN)/python -m llmrecipe.data.toy.generate --sets pretrain_text pretrain_talk --out build/tiny
	$(BIN)/python -m llmrecipe.models.tiny start build/tiny/start
	$(ONE_THREAD) $(BIN)/llmrecipe train recipe=tiny_model model.path=build/tiny/start \
		'data.path=[build/tiny/pretrain_text,build/tiny/pretrain_talk]' run.dir=build/tiny/run
	$(BIN)/python -m llmrecipe.models.tiny install build/tiny/run

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

$(HARNESS): $(READY)
	$(BIN)/python -c "import lm_eval" 2>/dev/null || $(PIP) -e ".[eval]"
	touch $(HARNESS)

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch by itself first: its exact version decides which build the rest is resolved against.
	$(PIP) "torch$$(sed -n 's/^torch==/==/p' .ci/constraints.txt)"
	$(PIP) -e ".[dev,plots]"
	touch $(READY)
