# The commands of a contributor. Each one first creates the environments that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE :=
# Use ENV only from the command line (`make ... ENV=NAME`): a shell may export a variable of that name for other uses.
ifneq ($(origin ENV),command line)
ENV :=
endif

.PHONY: help venv demo test test-all test-in weekly lint docs release build/tree

help:
	@echo "make venv      create $(VENV) (NeMo and all tools) and .venv-data (the data engine): 3 minutes"
	@echo "make demo      upcycle a real 135M Llama to 8 experts, train, export, evaluate, report:"
	@echo "               9 minutes, no GPU; into runs/demo"
	@echo "make test      run the daily tests: 6 minutes"
	@echo "make lint      check format, style, spelling, types and import layers: a minute"
	@echo
	@echo "make test-all  run the daily tests, the slow tests and five mutants: 25 minutes"
	@echo "make weekly    run the other rows of every table, kill 120 trainings and stages, and run"
	@echo "               make test under hostile variables: 42 minutes"
	@echo "make docs      build the pages and the reference into site/"
	@echo "make release   build the wheel and the source distribution into dist/, and test the wheel"
	@echo
	@echo "make demo RECIPE=smollm2_135m_e8t2_sft   run another recipe, here: tune on conversations"
	@echo "make demo ENV=bridge                     run on Megatron-Bridge (PYTHON=python3.12)"
	@echo "make test-in ENV=NAME                    run the tests of another environment or server:"
	@echo "               bridge bridge-next bridge-sample te data tf5 vllm sglang llama-cpp slurm k8s browser"
	@echo "               newest command"
	@echo "               (make test-in says what each one tests and needs)"

venv: $(VENV)/.complete .venv-data/.complete

# scripts/env.sh describes each environment. scripts/constraints has the versions, for uv and for pip.
$(VENV)/.complete: scripts/env.sh pyproject.toml scripts/constraints/nemo.txt
	PYTHON=$(PYTHON) scripts/env.sh $(VENV) dev

.venv-%/.complete:
	PYTHON=$(PYTHON) scripts/env.sh .venv-$* $*

# Environments that take long to build are rebuilt only after a change of their own list.
$(patsubst %,.venv-%/.complete,data docs tf5 vllm browser bridge-sample): scripts/env.sh pyproject.toml
.venv-data/.complete: scripts/constraints/data.txt
.venv-docs/.complete: scripts/constraints/nemo.txt
.venv-tf5/.complete: scripts/constraints/tf5.txt
.venv-bridge-sample/.complete: scripts/constraints/bridge.txt scripts/bridge.txt tests/bridge/stand_in/transformer_engine.py
.venv-bridge/.complete .venv-bridge-next/.complete: scripts/te_env.sh scripts/bridge.txt
.venv-te/.complete: scripts/te_env.sh
.venv-sglang/.complete: scripts/sglang_env.sh

# The folder is runs/demo, followed by RECIPE and ENV if they are given.
RUN_DIR ?= runs/demo$(addprefix -,$(RECIPE))$(addprefix -,$(ENV))
DEMO_VENV := $(if $(ENV),.venv-$(ENV),$(VENV))
demo: $(DEMO_VENV)/.complete .venv-data/.complete
	$(DEMO_VENV)/bin/nemo upcycle pipeline --factory $(or $(RECIPE),smollm2_135m_e8t2) dir=$(RUN_DIR) --yes

# A worker imports NeMo once for collecting, and once more for the ranks that it forks. So two cores get two workers.
# Many tests marked `full` wait for a killed or stopped process, so test-all gets three workers.
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
TEST := -n 2 -m "not full"

test: venv
	$(PYTEST) $(TEST)

test-all: venv
	$(PYTEST) -n 3 -m "not weekly"
	$(BIN)/python -m tests.mutants --sample 5

# Tests that need another environment, a server or much memory; scripts/test_in.sh lists them.
test-in:
	@scripts/test_in.sh "$(ENV)"

# The second command runs `make test` under variables that must not change any result.
weekly: venv
	$(BIN)/python -m tests.functional.soak --kills 60
	$(BIN)/python -m tests.environment $(PYTEST) $(TEST)
	$(PYTEST) -n 3 -m weekly

lint: venv build/tree
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	git ls-files | xargs $(BIN)/codespell
	$(BIN)/mypy
	cd build/tree && ../../$(BIN)/lint-imports
	$(BIN)/python scripts/count_lines.py

# A copy of the package in its installed form, in which tools that read files find recipes/ and conf/.
build/tree:
	rm -rf build/tree && mkdir -p build/tree
	cp -R nemo_upcycle pyproject.toml build/tree/
	cp -R recipes conf build/tree/nemo_upcycle/

docs: build/tree .venv-docs/.complete
	.venv-docs/bin/sphinx-build --fail-on-warning --keep-going --quiet --jobs auto -c docs . site

# The tests use only the wheel, in a fresh environment.
release: venv
	$(BIN)/python scripts/build_release.py dist
	rm -rf build/release
	PYTHON=$(PYTHON) scripts/env.sh build/release/.venv release
	$(BIN)/python -m pytest tests/release
