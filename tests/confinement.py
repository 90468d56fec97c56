"""The rights that the DaemonSet gives the agent, in the container engine's terms.

tests/unit/test_daemonset.py holds daemonset.yaml against this, and tests/container runs the image
with it.
"""

from __future__ import annotations

from typing import Any

CONFINED: dict[str, Any] = {
    "user": "0:0",
    "cap_drop": ["ALL"],
    "cap_add": ["NET_ADMIN"],
    "read_only": True,
    "security_opt": ["no-new-privileges"],
}
