# make demo: the main job on the bundled model. make test: the tests. Both install into .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DATA ?=
OUT ?=

.PHONY: demo test fast bench check-main check-samplers check-unets check-cpu check-gpu check-export check-engine check-calibrate lint report clean

demo: $(STAMP)
	$(BIN)/python -m fastdiff.benchmarks.demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

fast: $(STAMP)
	$(BIN)/python -m pytest -m fast

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' -o addopts='' --benchmark-only

# QUICK=1: fewer images and rounds. DATA=mnist.npz: also check that samples are not copies of training images.
check-main: $(STAMP)
	@$(BIN)/python -m fastdiff.benchmarks.check_main $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA))

# QUICK=1: one path, fewer images and rounds. OUT=samplers.json: also write the details.
check-samplers: $(STAMP)
	@$(BIN)/python -m fastdiff.benchmarks.check_samplers $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT))

check-unets: $(STAMP)
	@$(BIN)/python -m fastdiff.benchmarks.check_unets $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT)) \
		$(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(CIFAR),--cifar $(CIFAR))

# QUICK=1: fewer rounds, no torch.compile. Needs 20 GB of memory: every runtime holds Stable Diffusion 1.5 at once.
check-cpu: $(STAMP)
	@$(BIN)/python -m fastdiff.benchmarks.check_cpu $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT))

# QUICK=1: only what is quick. SUITE=folder: keep the suite's files there, and go on with an interrupted run.
check-gpu: $(STAMP)
	@$(BIN)/python -m fastdiff.benchmarks.check_gpu $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT)) $(if $(SUITE),--suite $(SUITE))

# QUICK=1: half the width. In full it needs 16 GB of memory: two runtimes hold Stable Diffusion 1.5 at once.
check-export: $(STAMP)
	@$(BIN)/python -m fastdiff.benchmarks.check_export $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT))

# QUICK=1: fewer requests, under ten minutes.
check-engine: $(STAMP)
	@$(BIN)/python -m fastdiff.benchmarks.check_engine $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT))

# QUICK=1: five network calls alone. DATA=fashion_mnist.npz: also a mixture fitted to it.
check-calibrate: $(STAMP)
	@$(BIN)/python -m fastdiff.benchmarks.check_calibrate $(if $(QUICK),--quick) $(if $(OUT),--out $(OUT)) $(if $(DATA),--data $(DATA))

lint: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt ruff mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# regenerate the README's table and plot from benchmarks/results/
report: $(STAMP)
	$(BIN)/python -m fastdiff.benchmarks.report

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("fastdiff needs Python 3.11 or 3.12; this is " + sys.version.split()[0] + \
	  ": run make PYTHON=python3.12" if not (3, 11) <= sys.version_info[:2] <= (3, 12) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(STAMP)

clean:
	rm -rf .venv build out *.egg-info
