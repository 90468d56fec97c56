"""The State that a command works on.

Today it is made from manifests (`--from`). Commands take a State and do not ask where it is from.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from agent.cli.flags import fail
from agent.config.settings import Settings
from agent.sources.manifests.follower import Content, ManifestError, read
from rules.events import Event, NodeAddresses, Upsert
from rules.state import State


def from_manifests(
    paths: Sequence[str],
    settings: Settings,
    *,
    addresses: NodeAddresses | None = None,
    whole: bool = False,
) -> State:
    """A stepped State of the objects in manifests and, if given, of this machine's addresses.

    Problems are reported on standard error. If `whole`, a manifest that cannot be read ends the
    command, because the objects in it would look deleted.
    """
    content = _content(paths)
    if whole and (unread := [p.path for p in content.problems if p.whole]):
        fail(
            f"cannot read all manifests ({', '.join(sorted(unread))}), so what is missing from"
            " them would look deleted; `run` programs nothing until it has read them all once"
        )
    state = State(settings.options())
    events: list[Event] = [Upsert(o) for o in content.objects]
    if addresses:
        events.append(addresses)
    state.apply(events)
    state.step()
    for problem in state.problems.open():
        click.echo(f"sliceproxy: {problem.code}: {problem.subject}: {problem.text}", err=True)
    return state


def _content(paths: Sequence[str]) -> Content:
    try:
        content = read(paths)
    except ManifestError as error:
        fail(error)
    for problem in content.problems:
        click.echo(f"sliceproxy: {problem}", err=True)
    return content
