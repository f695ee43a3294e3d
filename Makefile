# make sweep · make test : each does all set-up by itself
SHELL   := /bin/bash
PYTHON  ?= python3
BIN     := .venv/bin
UV      := $(BIN)/uv
RUNS    := data/runs
README  := README.md

.PHONY: help install sweep test notebooks pytest export clean readme report figures bench peers lock docs docs-test findings

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/'

install: .venv/.installed  ## set up .venv with the versions that were tested together

.venv/.installed: settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "the venv module is missing; on Debian: apt install python3-venv"; exit 1; }
	@test -x $(UV) || $(BIN)/pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@mkdir -p $(RUNS)
	@touch $@

sweep: install   ## train a UNet on the embedded radiographs and put it through all severities (minutes)
	@mkdir -p $(RUNS)
	$(BIN)/papermill nbs/04_sweep.ipynb $(RUNS)/sweep.ipynb -f nbs/params/quick.yaml

test: install notebooks pytest  ## run every notebook's tests, then tests/

notebooks: install   ## run the tests in every notebook, each in a process of its own
	@ls -S nbs/*.ipynb | OMP_NUM_THREADS=1 xargs -n 1 -P 2 $(BIN)/nbdev_test --timing --path

pytest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 3 --dist worksteal tests

report: install  ## all finished runs, or data/findings where there are none, on one HTML page, $(RUNS)/report.html, with its figures and numbers
	@mkdir -p $(RUNS)
	$(BIN)/papermill --cwd nbs nbs/05_results.ipynb $(RUNS)/results.ipynb $(if $(filter command,$(origin RUNS)),-p runs_dir "$(abspath $(RUNS))")
	@$(BIN)/python -c 'from cxr_noise_study.report import report_page; print(report_page("$(RUNS)/results.ipynb", "$(RUNS)/report.html"))'

findings: install ## 05_results, 30_findings, their figures and the front page anew from data/findings
	@for name in 05_results 30_findings index; do \
	  CXR_NOISE_HOME="$$(mktemp -d)" $(BIN)/jupyter execute --inplace nbs/$$name.ipynb && $(BIN)/nbdev_clean --fname nbs/$$name.ipynb || exit 1; done
	@$(MAKE) --no-print-directory readme

figures: install ## draw the tracked figures in figures/ anew, each from the numbers beside it
	$(BIN)/python -c 'from cxr_noise_study.results import draw_figures; print(*draw_figures("figures"), sep="\n")'

export: install  ## notebooks → package
	$(BIN)/nbdev_export

clean: install  ## strip what a notebook should not carry into git
	$(BIN)/nbdev_clean

readme: install  ## nbs/index.ipynb → README.md
	@{ echo '<!-- written by make readme from nbs/index.ipynb -->'; \
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_input_tags remove-input --stdout nbs/index.ipynb | sed 's#(\.\./#(#g' | cat -s; } > $(README)

docs: install    ## the site, _docs/index.html: findings, explorer, notebooks, API; opens without a server
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,docs]'
	@test site/node_modules/.package-lock.json -nt site/package-lock.json \
	  || { npm ci --prefix site --ignore-scripts --no-audit --no-fund --silent && touch site/node_modules/.package-lock.json; } 2>/dev/null \
	  || echo "npm is missing or cannot reach its registry: the explorer's live networks are left out"
	$(BIN)/python site/docs.py _docs

docs-test: docs  ## load every page of the site in headless Chromium without a network
	CXR_DOCS="$(abspath _docs)" $(BIN)/python -m pytest -q tests/test_site.py

peers: install
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev,peers]'

bench: peers     ## speed against the peers, written to benchmarks/results; each script ends with its ratio
	@for script in benchmarks/*.py; do echo "== $$script"; \
	  $(BIN)/python $$script --output benchmarks/results/$$(basename $$script .py).csv || exit 1; done

lock:            ## resolve settings.ini's ranges anew into constraints.txt
	@test -x $(UV) || { $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet uv; }
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url --no-emit-find-links --extra dev --extra peers --extra dicom --extra onnx --extra openvino --extra cluster --extra s3 --extra denoising --extra explanations --extra explore --extra docs setup.py -o constraints.txt
