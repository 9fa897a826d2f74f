# make demo | test | test-zero | test-oldest | check | style | clean    ARGS="..." is passed on to demo and tests
PYTHON ?= python3
ARGS ?=

# A test marked `slow` or `trl` is outside the core: see the markers in pyproject.toml.
CORE := not slow and not trl

# One process per core, up to four (each holds torch and Transformers), of one thread each: the models are tiny. Tests of
# a file share what it builds, so files are not split.
PYTEST := -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile
test test-zero test-oldest: export OMP_NUM_THREADS = 1

.PHONY: demo test test-zero test-oldest check style clean

demo: .venv/.installed
	.venv/bin/python recipes/demo.py $(ARGS)

test: .venv/.installed
	.venv/bin/python $(PYTEST) $(ARGS)

# What `make test` skips as long as DeepSpeed is not there.
test-zero: .venv/.installed
	.venv/bin/python -m pip install --quiet "torch==2.13.0" -e ".[deepspeed]"
	.venv/bin/python $(PYTEST) $$(grep -rl deepspeed tests/training/test_*.py) $(ARGS)

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python $(PYTEST) -m "$(CORE)" $(ARGS)

check: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

style: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv .venv-oldest build dist outputs .pytest_cache .ruff_cache .hypothesis *.egg-info
	find recipes sparse_hf tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: PINS := "torch==2.13.0"
.venv/.installed: EXTRAS := demo,test,dev
.venv-oldest/.installed: PINS := "torch==2.13.0" "transformers==5.17.0"
.venv-oldest/.installed: EXTRAS := test

# The stamp goes first and comes back last, so an interrupted install never counts; without it the environment is
# built anew. PINS are repeated in the second install so that no dependency can bring another torch.
.venv/.installed .venv-oldest/.installed: %/.installed: pyproject.toml Makefile
	test -f $@ || $(PYTHON) -m venv --clear $*
	rm -f $@
	$*/bin/python -m pip install --quiet $(PINS)
	$*/bin/python -m pip install --quiet $(PINS) -e ".[$(EXTRAS)]"
	touch $@
