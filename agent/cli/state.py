"""The State that a command works on: of manifests (`--from`), or of a cluster's lists.

Commands take a State and do not ask where it is from.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from agent.cli.flags import fail
from agent.config.settings import Settings
from agent.sources.manifests.follower import Content, ManifestError, read
from rules.events import Event, NodeAddresses, Upsert
from rules.objects import InvalidObject
from rules.state import State


def chosen_state(
    paths: Sequence[str],
    settings: Settings,
    *,
    addresses: NodeAddresses | None = None,
    whole: bool = False,
) -> State | None:
    """The State of what the flags name: manifests, or a cluster (--kubeconfig, --context or
    --server). None if they name neither, so that the agent on this node is meant.

    `addresses` and `whole` are as for `from_manifests`.
    """
    cluster = settings.kubeconfig or settings.context or settings.server
    if paths and cluster:
        fail("give either --from or --kubeconfig, --context or --server, not both")
    if paths:
        return from_manifests(paths, settings, addresses=addresses, whole=whole)
    return from_cluster(settings, addresses=addresses) if cluster else None


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
    return _stepped(settings, [Upsert(o) for o in content.objects], addresses)


def from_cluster(settings: Settings, *, addresses: NodeAddresses | None = None) -> State:
    """A stepped State of what an API server has now, as the agent on the node --node sees it.

    The command ends if anything that the agent needs cannot be listed.
    """
    from agent.sources.kubernetes.connection import ConnectError, connect
    from agent.sources.kubernetes.listing import listed

    chosen = settings.options()

    def unusable(found: InvalidObject) -> None:
        click.echo(f"sliceproxy: {found.subject}: {found.reason}", err=True)

    try:
        connection = connect(settings.kubeconfig, settings.context, settings.server)
        events = list(listed(connection, chosen.node, chosen.proxy_name, unusable))
    except ConnectError as error:
        fail(error)
    return _stepped(settings, events, addresses)


def _stepped(settings: Settings, events: Sequence[Event], addresses: NodeAddresses | None) -> State:
    state = State(settings.options())
    state.apply(events)
    if addresses:
        state.apply([addresses])
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
