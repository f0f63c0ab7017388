# Every target sets up what it needs in $(VENV). Outside of this folder are only compiled kernels, in
# ~/.cache/dropconnect-surgery.
PYTHON ?= python3
VENV ?= .venv
# Which torch to install when $(VENV) has none. Any build from 2.9 on will do.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
SOURCES := pyproject.toml $(shell find surgery transforms adapters -name '*.py' -o -name py.typed -o -path '*/kernels/*')

.PHONY: help setup demo examples test random interrupts test-all test-no-compiler test-oldest test-oldest-quick \
	test-newest test-newest-quick test-libraries \
	bench bench-quick bench-page bench-strip bench-moments bench-gpu evidence mutants \
	coverage fuzz statistics soak sweep docs lint wheel release-check clean
.NOTPARALLEL:  # targets share build/, dist/ and the cores

help:
	@echo "make setup     all that a developer needs, into $(VENV)"
	@echo "make demo      fine-tune a real checkpoint with DropConnect (5 to 7 minutes on 2 cores)"
	@echo "make examples  the demo, and the other examples in short forms (about 10 minutes)"
	@echo "make test      the tests (about 7 minutes on 2 cores)"
	@echo "make test-all  the tests with the long sweeps"
	@echo "make test-no-compiler  those that kernels matter for, as on a machine without a C++ compiler"
	@echo "make test-oldest  the tests with the oldest torch, transformers and Python that are supported"
	@echo "make test-oldest-quick  those of them that are nearest to torch and transformers"
	@echo "make test-newest  the tests with the newest releases of all dependencies, and the newest Python here"
	@echo "make test-newest-quick  those of them that are nearest to torch and transformers"
	@echo "make sweep     every architecture of transformers, into docs/architectures.md (half an hour)"
	@echo "make random    COUNT (10000) random sequences of what is done to models, and half as many to graphs"
	@echo "make interrupts  COUNT (10000) interrupts of every verb, and a tenth as many writes that are cut off"
	@echo "make mutants   change the code of ROOM (planning) here and there, list what no test notices"
	@echo "make coverage  the tests again, and which lines and branches of the package they do not reach (15 minutes)"
	@echo "make fuzz      COUNT (10000) changed files given to inspect, strip, convert, bake and load (a minute)"
	@echo "make statistics  the tests of masks, with those of TestU01 and dieharder where they are installed"
	@echo "make soak      train for MINUTES (30) with schedules, checkpoints and resumes; nothing may grow"
	@echo "make bench     speed and memory beside plain layers and peers, into out/bench (about 15 minutes)"
	@echo "make bench-quick  the same without what takes long (under 2 minutes)"
	@echo "make bench-page   make bench, into docs/performance.md"
	@echo "make bench-strip   surgery strip on 5 GB beside cp, into docs/command-line.md (2 minutes, 15 GB of disk)"
	@echo "make bench-moments predict_moments beside Monte Carlo and plain weights (20 minutes)"
	@echo "make bench-gpu    the same on a GPU, into out/bench-gpu.md (under 4 minutes); nothing without one"
	@echo "make evidence  SEEDS (5) of what is missing in docs/evidence.md; DEVICE=cuda on a GPU (hours on 2 cores)"
	@echo "make docs      the site, into out/site (python3 -m http.server -d out/site; search needs a server)"
	@echo "make lint      ruff and mypy"
	@echo "make wheel     build the wheel and check what is in it"
	@echo "make test-libraries  the tests with real libraries: timm, diffusers, Lightning, TRL, ... (10 minutes and more)"
	@echo "make release-check  all that must pass before a release (an hour and more on 2 cores)"
	@echo "make clean     remove what the others have made"

setup: $(VENV)/.test $(VENV)/.examples $(VENV)/.dev

demo: $(VENV)/.examples
	$(BIN)/python examples/finetune_trainer.py

SHORT := out/short

examples: demo
	$(BIN)/python examples/train_lstm.py --epochs 1 --articles 20 --output $(SHORT)/lstm
	$(BIN)/python examples/paper_mlp.py --quick --output $(SHORT)/paper_mlp
	$(BIN)/python examples/uncertainty.py --steps 8 --samples 4 --test-size 30 --output $(SHORT)/uncertainty
	$(BIN)/python examples/lora.py --steps 8 --test-size 100 --output $(SHORT)/lora
	$(BIN)/python examples/vision.py --seeds 2 --pretraining 100 --steps 50 --output $(SHORT)/vision
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 examples/finetune_ddp.py --steps 8 --output $(SHORT)/ddp

# One thread a worker: threads that wait for each other cost more than they bring on small models.
test test-all test-no-compiler test-oldest test-oldest-quick test-newest test-newest-quick test-libraries: export OMP_NUM_THREADS := 1
test-no-compiler: export CXX := no-such-compiler

test: $(VENV)/.test $(VENV)/.examples
	$(BIN)/pytest -n auto -m "not slow"

test-all: $(VENV)/.test $(VENV)/.examples
	$(BIN)/pytest -n auto

WITH_KERNELS := $(patsubst %,tests/modules/test_%.py,example family fused_linear gaussian_sites surroundings)
WITH_KERNELS += $(patsubst %,tests/ops/test_%.py,engine example example_traced gaussian) tests/ops/cpu/test_native.py

test-no-compiler: $(VENV)/.test $(VENV)/.examples
	$(BIN)/pytest -n auto -m "not slow" $(WITH_KERNELS)

# The oldest of all that pyproject.toml allows, in an environment of its own; run before each release.
# Old releases have wheels for old Pythons, numpy 1.26 and safetensors 0.4.3 up to 3.12.
# The slice is for CI: what is nearest to the inside of torch and of transformers.
OLDEST := .venv-oldest
OLDEST_PYTHON := $(shell for python in \
	python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python3 $(PYTHON) python3.11 python3.12; \
	do $$python -c "import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))" \
	2>/dev/null && echo $$python && break; done)
SLICE := $(patsubst %,tests/%.py,operating/test_round_trip modules/test_family)
SLICE += $(patsubst %,tests/moments/test_moments_%.py,models views)
SLICE += $(patsubst %,tests/survive/test_%.py,compile compile_cold export)
SLICE += tests/torch_private $(patsubst %,tests/%.py,ops/test_mask adapters/test_trainer adapters/test_trainer_saves)

test-oldest: WHICH := tests --ignore tests/examples --ignore tests/benchmarks
test-oldest-quick: WHICH := $(SLICE)

test-oldest test-oldest-quick: export PIP_CONSTRAINT := $(CURDIR)/tests/oldest.txt
test-oldest test-oldest-quick:
ifeq ($(strip $(OLDEST_PYTHON)),)
	@echo "$@ is skipped: the oldest releases need Python 3.10, 3.11 or 3.12, and none is here" >&2
else
	$(MAKE) VENV=$(OLDEST) PYTHON=$(OLDEST_PYTHON) TORCH=torch $(OLDEST)/.test
	$(OLDEST)/bin/pytest -n auto -m "not slow" $(WHICH)
endif

# The newest of all that pyproject.toml allows, made newer at each run, with the newest Python that is here.
NEWEST := .venv-newest
NEWEST_PYTHON := $(shell for python in \
	python3.14 $(HOME)/.pyenv/versions/3.14.*/bin/python3 python3.13 \
	$(HOME)/.pyenv/versions/3.13.*/bin/python3 python3.12 $(PYTHON); \
	do $$python -c "import ensurepip" 2>/dev/null && echo $$python && break; done)

test-newest: WHICH := tests --ignore tests/examples --ignore tests/benchmarks
test-newest-quick: WHICH := $(SLICE)

test-newest test-newest-quick:
	$(MAKE) VENV=$(NEWEST) PYTHON=$(NEWEST_PYTHON) TORCH=torch $(NEWEST)/.test
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager torch "$$(ls dist/*.whl)[test]"
	$(NEWEST)/bin/pytest -n auto -m "not slow" $(WHICH)

# Models of timm need a torchvision that was built for the torch that is there, so they come together; if they
# do not fit, the sweep goes without them.
SWEEP := .venv-sweep

sweep:
	$(MAKE) VENV=$(SWEEP) TORCH="$(TORCH) torchvision timm" $(SWEEP)/.test
	$(SWEEP)/bin/python -c "import torchvision" 2>/dev/null || $(SWEEP)/bin/pip uninstall --quiet --yes torchvision timm
	OMP_NUM_THREADS=1 $(SWEEP)/bin/python -m tests.sweep --workers 2

# Libraries that pin and pull in much, in an environment of their own. PyPI's torch is gigabytes, so this is
# for releases. A torchvision that was built for another torch breaks transformers: then the tests go
# without it, and without timm.
LIBRARIES := .venv-libraries

test-libraries:
	$(MAKE) VENV=$(LIBRARIES) TORCH="torch torchvision" $(LIBRARIES)/.libraries
	$(LIBRARIES)/bin/pytest tests/libraries

# A twentieth of a second each on one core; a fault prints the command that plays its sequence again.
COUNT := 10000
FIRST := 0

random: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.random_surgery --count $(COUNT) --first $(FIRST) --workers $$(nproc)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.random_surgery --count $$(($(COUNT) / 2)) --first $(FIRST) --workers $$(nproc) --graphs

# An interrupt takes 0.1 s, a write that is cut off 0.3 s.
interrupts: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.survive.interrupts --random $(COUNT)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.survive.writes --count $$(($(COUNT) / 10))

# A change takes as long as the tests that notice it: a sample of 100 takes half an hour or more; with
# CASES=2, which keeps two cases of each test, a few minutes.
ROOM := planning
SAMPLE := 100
CASES := 0

mutants: $(VENV)/.test $(VENV)/.examples
	$(BIN)/pip install --quiet cosmic-ray coverage
	OMP_NUM_THREADS=1 $(BIN)/python .ci/mutate.py $(ROOM) --sample $(SAMPLE) --cases $(CASES)

# Processes that tests start count too; code that torch.compile traces, C++ and Triton's own do not. All
# processes take the folder, and not the wheel. How it is measured stands in pyproject.toml. With CASES=3 no
# more than three cases of each test, in a third of the time.
UNCOUNTED := $(patsubst %,--ignore tests/%,examples benchmarks docs sweep peers libraries)

coverage: export PYTHONPATH := $(CURDIR):$(CURDIR)/.ci
coverage: $(VENV)/.test $(VENV)/.examples
	$(BIN)/pip install --quiet "coverage>=7.17"
	rm -rf out/coverage
	CASES=$(CASES) OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n auto -p some_cases -m "not slow" tests $(UNCOUNTED)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage json --quiet -o out/coverage/all.json
	$(BIN)/python .ci/gaps.py < out/coverage/all.json

SEED := 0

fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.checkpoints.fuzz --count $(COUNT) --seed $(SEED)

# TestU01 and dieharder come from Debian (apt-get install libtestu01-0-dev, of its part non-free, and dieharder);
# without them, the other tests.
statistics: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ops.battery
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/ops/test_randomness.py -s

MINUTES := 30

soak: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.adapters.soak --minutes $(MINUTES)

# The peers pin old versions of what they need, so they have an environment of their own.
BENCH := .venv-bench

bench: OPTIONS :=
bench-quick: OPTIONS := --quick
bench-page: OPTIONS := --page docs/performance.md

bench bench-quick bench-page:
	$(MAKE) VENV=$(BENCH) $(BENCH)/.peers
	$(BENCH)/bin/python -m benchmarks $(OPTIONS)

bench-strip: $(VENV)/.wheel
	$(BIN)/python -m benchmarks.strip --page docs/command-line.md

bench-moments: $(VENV)/.wheel
	$(BIN)/python -m benchmarks.moments
	$(BIN)/python -m benchmarks.moments_cost

HAS_GPU := -c "import sys, torch; sys.exit(not torch.cuda.is_available())"

bench-gpu:
	$(MAKE) VENV=$(BENCH) $(BENCH)/.wheel
	! $(BENCH)/bin/python $(HAS_GPU) || $(MAKE) VENV=$(BENCH) $(BENCH)/.peers
	$(BENCH)/bin/python -m benchmarks.gpu

# Goes on where it was stopped. Fashion-MNIST is Debian's package dataset-fashion-mnist.
SEEDS := 5
DEVICE := cpu

evidence: $(VENV)/.examples
	$(BIN)/python -m benchmarks.evidence --seeds $(SEEDS) --device $(DEVICE) --page docs/evidence.md

# The API is read from the wheel, where all packages lie as they are imported; nothing of it is run.
DOCS := .venv-docs

docs: wheel
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet -r docs/requirements.txt
	rm -rf out/api
	$(DOCS)/bin/pip install --quiet --no-deps --target out/api dist/*.whl
	$(DOCS)/bin/zensical build --clean --strict -f mkdocs.yml

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/typecheck.py

wheel: $(VENV)/.torch
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python .ci/check_wheel.py dist/*.whl

# Cheap before dear, so that what is wrong is soon known.
release-check: wheel lint docs test-all test-no-compiler examples test-oldest test-newest test-libraries

clean:
	rm -rf $(VENV) $(BENCH) $(OLDEST) $(NEWEST) $(LIBRARIES) $(SWEEP) $(DOCS) build dist out *.egg-info

# A virtual environment with torch, then the wheel with one set of extras. The wheel is installed, and
# not the folders, so that what is tested is what is shipped.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.wheel: $(VENV)/.torch $(SOURCES) README.md LICENSE
	$(MAKE) wheel
	$(BIN)/pip install --quiet --no-deps --force-reinstall dist/*.whl
	touch $@

$(VENV)/.test $(VENV)/.examples $(VENV)/.dev: $(VENV)/.%: $(VENV)/.wheel
	$(BIN)/pip install --quiet "$$(ls dist/*.whl)[$*]"
	touch $@

$(VENV)/.libraries: $(VENV)/.test tests/libraries/requirements.txt
	$(BIN)/pip install --quiet -r tests/libraries/requirements.txt
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision
	touch $@

$(VENV)/.peers: $(VENV)/.examples benchmarks/peers.txt benchmarks/peers-need.txt
	$(BIN)/pip install --quiet -r benchmarks/peers-need.txt
	$(BIN)/pip install --quiet --no-deps -r benchmarks/peers.txt
	touch $@
