# make demo   balance real connections in a small world of network namespaces (root)
# make test   everything that is tested (root, else what needs no root)
# make lint   ruff and mypy
# make bench  measure everything, and write docs/performance.md (root, some 10 minutes)
# make .venv  only the virtual environment, with `sliceproxy` in its bin

BIN := .venv/bin

.PHONY: demo test lint bench clean

demo: .venv
	$(BIN)/python -m lab

test: .venv/tests-ready
	tools/need-test-tools
	$(BIN)/python -m pytest $(PYTEST)

lint: .venv/tests-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/tests-ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m bench

.venv: pyproject.toml
	python=$$(tools/need-python) && $$python -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch .venv

.venv/tests-ready: .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
