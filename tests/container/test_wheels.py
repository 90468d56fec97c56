"""Other architectures, as far as one machine shows: every package of the lock has a wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.container.conftest import ROOT

# The interpreter of Debian 13, and the C libraries that it has: manylinux_2_N is glibc 2.N.
PYTHON = "3.13"
GLIBC = (17, 24, 26, 28, 31, 34)


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_every_package_of_the_lock_has_a_wheel(architecture: str, tmp_path: Path) -> None:
    """With the hashes that the lock pins, without a compiler."""
    platforms = [f"--platform=manylinux_2_{minor}_{architecture}" for minor in GLIBC]
    lock = ROOT / "requirements.lock"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"),
            *("--require-hashes", "--only-binary=:all:", f"--python-version={PYTHON}"),
            *(f"--platform=manylinux2014_{architecture}", *platforms),
            *("--dest", str(tmp_path), "-r", str(lock)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    binary = sorted(f.name for f in tmp_path.glob("*.whl") if not f.name.endswith("-none-any.whl"))
    print(f"\nbinary wheels for {architecture}:", *binary, sep="\n  ")
    pinned = [line for line in lock.read_text().splitlines() if line[:1].isalnum()]
    assert len(list(tmp_path.iterdir())) == len(pinned)
    assert all(architecture in name for name in binary)
