# make demo       balance real connections in a small world of network namespaces (root)
# make test       all tests (root; without it, the tests that need no root)
# make test-unit  tests/unit alone: no root, under a minute
# make coverage   lines of rules and agent that tests/unit runs, with a floor
# make lint       ruff and mypy over product, lab, bench and tests
# make bench      measure everything, and write docs/performance.md (root, about 15 minutes)
# make hooks      run the linters before each commit
# make .venv      the virtual environment alone, with `sliceproxy` in .venv/bin
#
# What is installed outside this directory, and only as root on a Debian, and only if it is missing:
#   make .venv    python3, python3-venv, ca-certificates (tools/need-python)
#   make test     nftables, iptables, iproute2, procps, libnftables1, debootstrap, firewalld, ufw,
#                 for the page chromium and chromium-driver (290 MB), and shellcheck
#                 (tools/need-test-tools)
# Everything else is in .venv and build (a Debian 13 tree, whose newer nft the tests use).
# tools/need-engine, which starts a container engine for tests/container, runs only in CI.

BIN := .venv/bin

.PHONY: demo test test-unit coverage lint bench hooks clean

demo: .venv
	$(BIN)/python -m lab

test: .venv/tests-ready
	tools/need-test-tools
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[browser]'
	$(BIN)/python -m pytest $(PYTEST)

test-unit: .venv/tests-ready
	$(BIN)/python -m pytest -m unit $(PYTEST)

FLOOR := 80

coverage: .venv/tests-ready
	rm -f .coverage .coverage.*
	COVERAGE_FILE=$(CURDIR)/.coverage $(BIN)/coverage run -m pytest -m unit $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=$(FLOOR)

lint: .venv/tests-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/tests-ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m bench

hooks: .venv/tests-ready
	$(BIN)/pre-commit install

.venv: pyproject.toml
	python=$$(tools/need-python) && $$python -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch .venv

.venv/tests-ready: .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
