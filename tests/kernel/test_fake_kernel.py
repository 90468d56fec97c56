"""The real kernel behaves as the FakeKernel of the unit tests: the same cases, in a namespace."""

from __future__ import annotations

import pytest

from agent.kernel.tables import Kernel
from tests.kernel.namespaces import in_empty_namespace, is_root
from tests.unit.fakes.contract import CASES, Case

pytestmark = pytest.mark.skipif(not is_root(), reason="needs root to make namespaces")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_real_kernel(case: Case) -> None:
    in_empty_namespace(lambda: case(Kernel))
