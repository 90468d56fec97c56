"""The dry run is honest: its text, loaded by nft, lists as what the agent programs by netlink."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import manifest
from tests.kernel.namespaces import (
    TRIXIE,
    in_empty_namespace,
    is_root,
    list_ruleset,
    nft_programs,
    nft_version,
    normal,
)

pytestmark = [
    pytest.mark.skipif(not is_root(), reason="needs root to make namespaces"),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs the nft program"),
]

RECORDINGS = Path(__file__).parents[1] / "recordings"
LISTS = [f"--from={RECORDINGS / f'list-{kind}.json'}" for kind in ("services", "endpointslices")]
EVERYTHING = [
    *LISTS,
    *(f"--from={RECORDINGS / f'list-{k}.json'}" for k in ("nodes", "servicecidrs")),
]
NODE = ["--node=node-1", "--zone=zone-a"]
OPTIONS = {
    "recorded lists": [*LISTS, *NODE],
    "with node and service CIDRs": [*EVERYTHING, *NODE],
    "pods by cluster CIDR": [*EVERYTHING, *NODE, "--cluster-cidr=10.244.0.0/16,fd00:10:244::/48"],
    "pods by node CIDR": [*EVERYTHING, *NODE, "--detect-local-mode=NodeCIDR"],
    "pods by bridge": [
        *EVERYTHING,
        *NODE,
        "--detect-local-mode=BridgeInterface",
        "--pod-bridge-interface=cni0",
    ],
    "pods by interface prefix": [
        *EVERYTHING,
        *NODE,
        "--detect-local-mode=InterfaceNamePrefix",
        "--pod-interface-name-prefix=veth",
    ],
    "another mark, all masqueraded": [*LISTS, *NODE, "--masquerade-bit=31", "--masquerade-all"],
}


def sliceproxy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "agent", *arguments], capture_output=True, text=True, check=False
    )


def programmed_by_the_agent(options: list[str]) -> dict[str, str]:
    """What each nft lists after the agent has programmed this namespace."""
    command = [sys.executable, "-m", "agent", "run", "--no-own", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr
        lines = iter(agent.stderr)
        assert any('"programmed"' in line for line in lines)
        agent.terminate()
        agent.stderr.read()
    assert agent.returncode == 0
    return {version: list_ruleset(nft) for version, nft in nft_programs().items()}


def loaded_as_text(ruleset: str, loader: str) -> dict[str, str]:
    """What each nft lists after the one of version `loader` has loaded the text.

    Older ones are not asked: 1.0.6 crashes on the user data that 1.1.3 writes for dynamic maps.
    """
    programs = nft_programs()
    done = subprocess.run(
        [*programs[loader], "-f", "-"], input=ruleset, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[:500]
    return {v: list_ruleset(nft) for v, nft in programs.items() if _number(v) >= _number(loader)}


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_text_lists_as_what_the_agent_programs(name: str) -> None:
    compare(OPTIONS[name])


def test_the_text_of_a_large_map_says_its_size_too(tmp_path: Path) -> None:
    (tmp_path / "many.json").write_text(json.dumps({"kind": "List", "items": list(_many())}))
    text = compare([f"--from={tmp_path}", *NODE])
    assert text.count("size 7500") == 2  # endpoints and hairpins


def _many() -> Iterator[dict[str, Any]]:
    """A Service with 5,000 endpoints."""
    yield manifest.service_document()
    for first in range(0, 5000, 1000):
        some = [f"10.200.{n >> 8}.{n & 255}" for n in range(first, first + 1000)]
        yield manifest.slice_document(
            endpoints=[manifest.endpoint(a) for a in some], name=f"web-{first}"
        )


def compare(options: list[str]) -> str:
    """Holds the listings of text and of netlink against each other; returns the text."""
    rendered = sliceproxy("render", *options)
    assert rendered.returncode == 0, rendered.stderr
    by_netlink = in_empty_namespace(lambda: programmed_by_the_agent(options))
    for loader in nft_programs():
        by_text = in_empty_namespace(lambda nft=loader: loaded_as_text(rendered.stdout, nft))
        for version, listing in by_text.items():
            assert normal(listing) == normal(by_netlink[version]), version
    return rendered.stdout


def test_both_nft_versions_are_tried() -> None:
    """This machine's nft and that of Debian 13 load the text and list what the agent programs.

    No skip: without the second one the tests above would pass and show half of what they say.
    """
    assert (TRIXIE / "usr/sbin/nft").exists(), "run tools/need-test-tools for the Debian 13 tree"
    here, trixie = (nft_version(nft) for nft in (["nft"], ["chroot", str(TRIXIE), "nft"]))
    assert set(nft_programs()) == {here, trixie}
    assert _number(trixie) >= (1, 1, 3)
    listed = in_empty_namespace(lambda: programmed_by_the_agent(OPTIONS["recorded lists"]))
    assert set(listed) == {here, trixie}
    assert all("table ip sliceproxy" in listing for listing in listed.values())


def test_every_nft_lists_session_affinity_in_both_families(tmp_path: Path) -> None:
    """nft 1.0.6 cannot load the text of the IPv6 map, but must not crash on listing it."""
    options = _dual_stack_affinity(tmp_path)
    by_netlink = in_empty_namespace(lambda: programmed_by_the_agent(options))
    for listing in by_netlink.values():
        assert listing.count("map affinity") == 2
    rendered = sliceproxy("render", *options).stdout
    for loader in nft_programs():
        if loader == "1.0.6":
            continue
        by_text = in_empty_namespace(lambda nft=loader: loaded_as_text(rendered, nft))
        for version, listing in by_text.items():
            assert normal(listing) == normal(by_netlink[version]), version


def test_every_nft_loads_and_lists_counters_by_endpoint_in_both_families(tmp_path: Path) -> None:
    service = manifest.service_document(
        annotations={"sliceproxy.io/endpoint-counters": "true"},
        ipFamilies=["IPv4", "IPv6"],
        cluster_ips=["10.96.0.10", "fd00:10:96::a"],
    )
    pieces = (
        manifest.slice_document(endpoints=[manifest.endpoint(address)], name=f"web-{number}")
        for number, address in enumerate(("10.0.0.1", "fd00::1"))
    )
    (tmp_path / "web.json").write_text(json.dumps({"kind": "List", "items": [service, *pieces]}))
    text = compare([f"--from={tmp_path}", *NODE])
    assert text.count("set endpoint-counters {") == 2
    assert text.count("update @endpoint-counters {") == 2 * 6


def _dual_stack_affinity(tmp_path: Path) -> list[str]:
    text = (RECORDINGS / "list-services.json").read_text()
    changed = text.replace('"sessionAffinity":"None"', '"sessionAffinity":"ClientIP"').replace(
        '"sessionAffinity": "None"', '"sessionAffinity": "ClientIP"'
    )
    assert changed != text
    path = tmp_path / "services.json"
    path.write_text(changed)
    return [f"--from={path}", LISTS[1], *NODE]


def test_check_accepts_what_render_prints_and_loads_nothing_here() -> None:
    def work() -> str:
        assert sliceproxy("render", "--check", *EVERYTHING, *NODE).returncode == 0
        return list_ruleset(["nft"])

    assert in_empty_namespace(work) == ""


def test_check_prints_what_render_prints() -> None:
    checked = sliceproxy("render", "--check", *EVERYTHING, *NODE)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == sliceproxy("render", *EVERYTHING, *NODE).stdout


def test_diff_of_an_empty_kernel_is_the_whole_ruleset_and_then_nothing() -> None:
    def work() -> tuple[int, int]:
        before = sliceproxy("diff", "--no-own", *EVERYTHING, *NODE)
        programmed_by_the_agent([*EVERYTHING, *NODE])
        after = sliceproxy("diff", "--no-own", *EVERYTHING, *NODE)
        assert after.stdout == ""
        return before.returncode, after.returncode

    assert in_empty_namespace(work) == (1, 0)


def test_rendering_needs_no_privilege() -> None:
    command = [sys.executable, "-m", "agent", "render", *EVERYTHING, *NODE]
    drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--reuid=65534", "--clear-groups"]
    if not shutil.which("setpriv"):
        pytest.skip("needs setpriv")
    if subprocess.run([*drop, sys.executable, "-c", ""], check=False).returncode:
        pytest.skip("an unprivileged user cannot start this Python")
    done = subprocess.run([*drop, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == sliceproxy("render", *EVERYTHING, *NODE).stdout
