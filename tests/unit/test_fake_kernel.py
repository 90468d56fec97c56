"""The FakeKernel keeps the contract; tests/kernel/test_fake_kernel.py has the real one."""

from __future__ import annotations

import pytest

from tests.unit.fakes.contract import CASES, Case
from tests.unit.fakes.kernel import FakeNetfilter


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_fake_kernel(case: Case) -> None:
    case(FakeNetfilter().connect)
