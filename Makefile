# make study   set up, then train the quick study and write its report
# make test    set up, then run the whole test suite on all cores
# make matrix  set up, then try all 29,298 combinations of the residual's settings (about 20 minutes)
# make test-browser   the pages that people look at, in a real browser (Debian's chromium, and npm for axe-core)
# make test-hf  what transformers does with the models, at length (about a minute)
# make test-hf-4  the same, and the first four retrofits, with transformers 4.57 in a venv of its own (.venv-hf4)
# make test-home  evaluation, export, serving, tracking, in a venv of their own (.venv-home)
# make test-scale  1, 2 and 4 processes train what one trains, and the long forms of other tests (about six minutes)
# make figures   the pictures of docs/images, from real output (two small runs, Debian's chromium)
# make docs    set up, then build the pages of docs/ as a site into build/site
# make check   lint, format and types, without running anything
# make wheel   wheel and sdist, checked, then a first run from the wheel alone in a clean environment; PYTHON=... chooses it
# make test-ray   studies on a Ray cluster of this machine (about a minute)
# make soak    kills at 200 seeded points, 10,000 checkpoints, a study of 300 runs (about 60 minutes); SHORT=1 a fiftieth of it
# make security  known faults of the pinned packages (pip-audit) and of the source (bandit), with what SECURITY.md explains
# make fingerprint BASE=COMMIT   losses of 20 steps of every preset here and at that commit, bit for bit
# make gpu     on a machine with a GPU: kernel tests, doctor, benchmark, in that order; DRY=1 goes through it without one
# make triton-study   registers and spills of the Triton kernels for sm_90, without a GPU (about 10 minutes)
# make fresh-clone   both README commands in a fresh clone of the last commit
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
EXTRAS_study := lab
EXTRAS_test := test
EXTRAS_docs := docs
EXTRAS_browser := browser
EXTRAS_ray := ray
AXE := axe-core@4.14.1

.PHONY: study wheel test security soak test-ray test-hf test-hf-4 test-home test-scale test-browser chromium figures docs matrix check fingerprint gpu triton-study fresh-clone clean

study: .venv/study.stamp
	$(BIN)/deepdelta study quick

test: .venv/test.stamp .venv/torchvision.stamp
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-hf: .venv/test.stamp .venv/torchvision.stamp
	$(BIN)/python -m pytest tests/test_hf_*.py -m "hf or not hf"

test-hf-4: .venv-hf4/stamp
	.venv-hf4/bin/python -m pytest tests/test_hf4.py tests/test_hf_model.py tests/test_hf_files.py tests/test_hf_training.py -m "hf or hf4 or not hf"

.venv-hf4/stamp: pyproject.toml constraints-hf4.txt
	@echo "Installing into .venv-hf4 (some minutes the first time)"
	$(PYTHON) -m venv .venv-hf4
	.venv-hf4/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-hf4.txt \
		--editable ".[fast,hf]" peft pytest pytest-timeout hypothesis beartype packaging psutil
	@touch $@

# A venv of its own: libraries import each other where they are there, and then warn, log and start slowly.
test-home: .venv-home/stamp
	.venv-home/bin/python -W ignore -m pytest $$(grep -l 'mark\.home' tests/test_*.py) -m home -W ignore::DeprecationWarning -W ignore::FutureWarning -W ignore::SyntaxWarning

.venv-home/stamp: pyproject.toml constraints.txt
	@echo "Installing into .venv-home (some minutes the first time)"
	$(PYTHON) -m venv .venv-home
	.venv-home/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[home]"
	.venv-home/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

test-scale: .venv/test.stamp .venv/torchvision.stamp
	$(BIN)/python -m pytest -m scale --ignore tests/test_ray.py

# The pages in Debian's Chromium, with axe-core for what people with other senses need.
test-browser: chromium .venv/test.stamp .venv/browser.stamp build/axe/package/axe.min.js
	$(BIN)/python -m pytest tests/test_browser.py tests/test_browser_report.py -m browser

chromium:
	@command -v chromium > /dev/null || { echo "Chromium is needed to see the pages: sudo apt-get install -y chromium"; exit 2; }

build/axe/package/axe.min.js: Makefile
	@command -v npm > /dev/null || { echo "npm is needed to fetch axe-core: sudo apt-get install -y npm"; exit 2; }
	mkdir -p build/axe
	cd build/axe && npm pack --silent --ignore-scripts $(AXE) && tar -xzf axe-core-*.tgz
	@touch $@

figures: chromium .venv/study.stamp .venv/browser.stamp
	$(BIN)/python docs/site/figures.py

docs: .venv/docs.stamp
	$(BIN)/mkdocs build --strict --quiet

matrix: .venv/test.stamp
	$(BIN)/python -m pytest tests/test_matrix.py -m matrix --timeout 7200

check: .venv/test.stamp
	$(BIN)/ruff check src tests docs/site
	$(BIN)/ruff format --check src tests docs/site
	$(BIN)/mypy

# The sdist, the wheel of that sdist, and what someone does first who has nothing else.
wheel:
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel/tools
	build/wheel/tools/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build twine
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt build/wheel/tools/bin/python -m build --outdir build/wheel/dist .
	build/wheel/tools/bin/python -m twine check --strict build/wheel/dist/*
	$(PYTHON) -m venv build/wheel/clean
	build/wheel/clean/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		build/wheel/dist/*.whl
	cd build/wheel && PATH=$$PWD/clean/bin:$$PATH bash -eu $(CURDIR)/tests/first_run.sh

soak: .venv/test.stamp
	$(BIN)/python tests/soak.py $(or $(OUT),results/soak) $(if $(SHORT),--short)

test-ray: .venv/test.stamp .venv/ray.stamp
	$(BIN)/python -m pytest tests/test_ray.py -m scale

# In an environment of their own; not in CI, since what is known of a package changes from day to day.
security:
	$(PYTHON) -m venv build/security
	build/security/bin/python -m pip install --quiet --disable-pip-version-check pip-audit bandit
	build/security/bin/bandit --quiet --recursive --configfile pyproject.toml src
	build/security/bin/pip-audit --disable-pip --no-deps --strict --requirement constraints.txt

fingerprint: .venv/test.stamp
	@test -n "$(BASE)" || { echo "Name the commit to compare with: make fingerprint BASE=COMMIT"; exit 2; }
	rm -rf build/base
	git clone --quiet --no-checkout . build/base
	git -C build/base checkout --quiet $(BASE)
	PYTHONPATH=build/base/src $(BIN)/python tests/fingerprint.py measure build/base.json
	PYTHONPATH=src $(BIN)/python tests/fingerprint.py measure build/here.json --like build/base.json
	$(BIN)/python tests/fingerprint.py compare build/base.json build/here.json

# With the Python at hand: a machine with a GPU may have no network. DRY=1 goes through it without a GPU.
gpu:
	$(PYTHON) tests/gpu/suite.py $(or $(OUT),runs/gpu) $(if $(DRY),--dry)

triton-study: .venv/test.stamp
	PYTHONPATH=src $(BIN)/python tests/triton_study.py

fresh-clone:
	rm -rf build/fresh-clone
	git clone --quiet . build/fresh-clone
	$(MAKE) -C build/fresh-clone study test

clean:
	rm -rf .venv .venv-home .venv-hf4

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv

# PyPI's torchvision does not load beside a CPU build of torch, and then transformers does not either: a folder apart.
.venv/torchvision.stamp: constraints.txt .venv/test.stamp
	rm -rf .venv/torchvision
	$(BIN)/python -m pip uninstall --quiet --yes torchvision
	$(PIP) --no-deps --target .venv/torchvision torchvision
	@touch $@

.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (some minutes the first time)"
	$(PIP) --editable ".[$(EXTRAS_$*)]"
	@touch $@
