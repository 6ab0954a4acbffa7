# FAMILY=openmmlab uses an environment of its own, with the upstream packages of OpenMMLab; CARAFE_ENV=current uses the
# active one instead (tools/setup_env.sh).
export FAMILY
BIN := $(if $(filter current,$(CARAFE_ENV)),,.venv$(patsubst %,-%,$(filter-out onedl,$(FAMILY)))/bin/)
PYTHON := $(if $(BIN),$(BIN)python,python3)
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*/*.h tests/csrc/*.cpp tests/ptx/*.cpp tests/ptx/*.cu benchmarks/*.cpp docs/*.cpp)
BENCH_FLAGS ?= --device cpu
# Processes that run tests; a test file stays in one.
TEST_JOBS ?= 2
# The environment of test-libraries (tools/setup_env.sh).
LIBRARIES_PYTHON := .venv-libraries/bin/python

.PHONY: env demo demo-all demo-seg demo-inpaint ablation test test-libraries fuzz sanitize lint format bench gpu-check wheel wheel-check matrix clean

# MMCV=compiled also compiles mmcv's own operators, which takes 10 to 25 minutes on two cores.
env:
	@tools/setup_env.sh

demo: env
	$(PYTHON) -m studies.demo.detection

demo-all: env
	$(PYTHON) -m studies.demo.detection --all

demo-seg: env
	$(PYTHON) -m studies.demo.segmentation

demo-inpaint: env
	$(PYTHON) -m studies.demo.inpainting

# The operators of Tables 4 and 6 on generated scenes, three seeds each; TABLE=3 and others, another table.
ablation: env
	$(PYTHON) -m studies.ablation $(if $(TABLE),--table $(TABLE))

test: env
	$(PYTHON) -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

# convert() on models of torchvision, timm, transformers, segmentation_models_pytorch and ultralytics, into docs/libraries.md.
test-libraries:
	@LIBRARIES=yes tools/setup_env.sh
	CARAFE_LIBRARIES_TABLE=docs/libraries.md $(LIBRARIES_PYTHON) -m pytest tests/models tests/test_export.py

# The campaigns' long form (tests/support/campaign.py); its figures go into docs/reliability.json and .md. SEED=1 draws other
# cases, FUZZ=tests/ops/test_fuzz.py runs one campaign, CARAFE_FUZZ_OPERATORS=10000 another number of cases.
FUZZ ?= tests/ops/test_fuzz.py tests/engine/test_annotations_fuzz.py tests/engine/test_kills.py
fuzz: env
	CARAFE_FUZZ=long CARAFE_FUZZ_SEED=$(or $(SEED),0) $(PYTHON) -m pytest -n $(TEST_JOBS) $(FUZZ)
	$(PYTHON) tests/support/reliability.py --write

# The CPU library under ASan, UBSan and TSan: ten minutes on two cores.
sanitize: env
	$(PYTHON) tests/csrc/sanitize.py $(SANITIZE_FLAGS)

lint: env
	$(BIN)ruff check . && $(BIN)ruff format --check . && $(BIN)mypy
	$(BIN)clang-format --dry-run --Werror $(CXX_SOURCES)

format: env
	$(BIN)ruff check --fix . && $(BIN)ruff format .
	$(BIN)clang-format -i $(CXX_SOURCES)

bench: env
	$(PYTHON) -m benchmarks.op $(BENCH_FLAGS)

# On a machine with a GPU; needs no OpenMMLab package (benchmarks/gpu_check.py lists what it needs). GPU_CHECK_FLAGS=--dry-run
# rehearses it without one.
gpu-check:
	$(or $(wildcard $(PYTHON)),python3) -m benchmarks.gpu_check $(GPU_CHECK_FLAGS)

# An sdist and a CPU wheel for every Python and torch, audited, in dist/; then that wheel installed beside the oldest and the
# newest of these torches without a compiler (10 GB of downloads, 6 GB of disk).
wheel: env
	$(PYTHON) -m release.wheel

wheel-check:
	$(PYTHON) -m release.wheel --check $(WHEEL_CHECK_FLAGS)

# Operators and modules beside one torch and Python after another, into docs/support.md: ten minutes, 2 to 4 GB of downloads and
# 7 GB of disk for a row; MATRIX_FLAGS="--only 2.1.2" runs some, --list says which are to run.
matrix: env
	$(PYTHON) -m release.matrix $(MATRIX_FLAGS)

# What can be made again; work_dirs/ and data/ may hold somebody's training.
clean:
	rm -rf build dist *.egg-info carafe_plugin/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
