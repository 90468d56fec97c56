"""`sliceproxy` with a Follower in a hurry: `python -m tests.cluster.agent_main run ...`."""

from __future__ import annotations

from functools import partial

from agent.cli import main as cli
from agent.sources.kubernetes import follower as kubernetes
from agent.sources.kubernetes.reflector import Timing

FAST = partial(
    Timing,
    connect=2.0,
    answer=2.0,
    silence=1.5,
    backoff=(0.05, 0.2),
    optional_retry=0.5,
    page=3,
)

if __name__ == "__main__":
    kubernetes.Timing = FAST  # type: ignore[misc,assignment]
    cli.main()
