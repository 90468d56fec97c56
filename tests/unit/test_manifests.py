"""Manifests through real files and a real inotify.

Nothing here sleeps to see whether something happens: where silence is the claim, a second change,
to a file of its own, follows the first, and the claim is that its list is next and alone.
"""

from __future__ import annotations

import errno
import io
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import inotify_simple
import msgspec
import pytest
import structlog
import yaml
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import LogCapture

from agent.sources.manifests import documents, watching
from agent.sources.manifests import follower as manifests
from agent.sources.manifests.follower import Content, ManifestError, ManifestFollower, read
from agent.sources.manifests.paths import resolve
from rules.events import Delete, Event, Synced, Upsert
from rules.objects import EndpointSlice, Name, Node, Object, Service, ServiceCIDR
from tests.fuzzing import fuzzed

RECORDINGS = Path(__file__).parent.parent / "recordings"
TIMEOUT = 30


def service(name: str, ip: str = "10.96.0.1", **metadata: object) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "web", **metadata},
        "spec": {"clusterIP": ip, "ports": [{"port": 80}]},
    }


def endpoint_slice(name: str, endpoints: int) -> dict[str, object]:
    return {
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "web",
            "labels": {"kubernetes.io/service-name": "shop"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [
            {"addresses": [f"10.1.{i // 250}.{i % 250 + 1}"], "nodeName": f"node-{i % 50}"}
            for i in range(endpoints)
        ],
    }


BAD = {"kind": "Service", "metadata": {"name": "a", "namespace": "web"}, "spec": {"ports": "none"}}
NAMELESS = {"kind": "Service", "metadata": {}, "spec": {}}


def as_yaml(*documents: object) -> str:
    return yaml.safe_dump_all(documents)


def write(path: Path, *documents: object) -> Path:
    """Write as a careful writer does: beside it, then moved over it."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(as_yaml(*documents))
    draft.rename(path)
    return path


def names(content: Content) -> list[str]:
    return [str(object.name) for object in content.objects]


def only_problem(content: Content) -> manifests.Problem:
    (problem,) = content.problems
    return problem


# --- reading once -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("list-services.json", Service),
        ("final-list-services.json", Service),
        ("list-endpointslices.json", EndpointSlice),
        ("final-list-endpointslices.json", EndpointSlice),
        ("list-nodes.json", Node),
        ("list-servicecidrs.json", ServiceCIDR),
    ],
)
def test_the_answers_of_an_api_server_are_read_as_json_and_as_yaml(
    tmp_path: Path, file: str, kind: type[Object]
) -> None:
    text = (RECORDINGS / file).read_text()
    content = read([str(RECORDINGS / file)])
    assert len(content.objects) == len(json.loads(text)["items"]) > 0
    assert {type(object) for object in content.objects} == {kind}
    assert content.problems == []
    (tmp_path / "same.yaml").write_text(as_yaml(json.loads(text)))
    assert read([str(tmp_path)]) == content


@pytest.mark.parametrize(
    "text",
    [
        as_yaml(service("a"), service("b")),
        "# by hand\n---\n---\n" + as_yaml(service("a")) + "---\n" + as_yaml(service("b")),
        as_yaml({"kind": "List", "items": [service("a"), service("b")]}),
        json.dumps({"kind": "List", "items": [service("a"), service("b")]}, indent=2),
        json.dumps(service("a")) + "\n" + json.dumps(service("b")) + "\n",
        json.dumps(service("a"), indent=1) + json.dumps(service("b"), indent=1),
        "\ufeff\r\n  " + json.dumps(service("a")) + " " + json.dumps(service("b")),
        "\ufeff" + as_yaml(service("a"), service("b")),
        as_yaml(service("a"), service("b")).replace("\n", "\r\n"),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_content_and_not_the_name_determines_the_format(
    tmp_path: Path, text: str, suffix: str
) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(text.encode())
    content = read([str(path)])
    assert names(content) == ["web/a", "web/b"]
    assert content.problems == []


def test_kinds_that_no_proxy_needs_are_skipped(tmp_path: Path) -> None:
    deployment = {"kind": "Deployment", "metadata": {"name": "d"}, "spec": {}}
    write(tmp_path / "a.yaml", deployment, service("a"), {"kind": "List", "items": [deployment]})
    assert read([str(tmp_path)]) == Content(read([str(tmp_path)]).objects, [])
    assert names(read([str(tmp_path)])) == ["web/a"]


def test_a_directory_gives_its_own_manifests_in_order(tmp_path: Path) -> None:
    for name in ("2.yaml", "1.yml", "3.json", ".hidden.yaml", "notes.txt", "4.yaml~"):
        write(tmp_path / name, service(f"in-{name}"))
    (tmp_path / "below.yaml").mkdir()
    write(tmp_path / "below.yaml" / "5.yaml", service("below"))
    (tmp_path / "6.yaml").symlink_to("notes.txt")
    content = read([str(tmp_path)])
    assert names(content) == ["web/in-1.yml", "web/in-2.yaml", "web/in-3.json", "web/in-notes.txt"]
    assert content.problems == []


def test_a_large_json_list_is_complete(tmp_path: Path) -> None:
    items = [endpoint_slice(f"s-{i}", endpoints=1000) for i in range(100)]
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"kind": "List", "items": items}))
    assert path.stat().st_size > 5e6
    content = read([str(path)])
    assert content.problems == []
    assert names(content) == [f"web/s-{i}" for i in range(100)]
    assert all(len(object.endpoints) == 1000 for object in content.objects)  # type: ignore[union-attr]


@pytest.mark.parametrize("place", ["nothing-here", "nothing-here/a.yaml", "nul\0byte"])
def test_a_place_that_is_not_there_is_an_error_of_its_own(tmp_path: Path, place: str) -> None:
    path = str(tmp_path / place)
    for use in (
        read,
        partial(ManifestFollower, put=print, log=None, failed=print),
    ):
        with pytest.raises(ManifestError) as raised:
            use([str(tmp_path), path])  # type: ignore[operator]
        assert path in str(raised.value)
        assert "give a manifest file" in str(raised.value)


def test_a_place_that_may_not_be_read_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", service("a"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ManifestError, match="let this user read it"):
        read([str(path)])
    assert "Permission denied" in only_problem(read([str(tmp_path)])).reason


def test_a_pipe_is_read_once_and_not_followed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_text(as_yaml(service("a"))))
    writer.start()
    assert names(read([str(fifo)])) == ["web/a"]
    writer.join()
    with pytest.raises(ManifestError, match="cannot be followed"):
        ManifestFollower([str(fifo)], print, structlog.get_logger(), print)
    # among the files of a directory it must not block
    assert only_problem(read([str(tmp_path)])) == (str(fifo), "", "is not a regular file", False)


def test_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "in", service("a"))
    with (tmp_path / "in").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert names(read(["-"])) == ["web/a"]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert only_problem(read(["-"])).path == "-"
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ManifestError, match="standard input is closed"):
        read(["-"])


# --- files out of order -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 text (byte 0xff at offset 0)"),
        (b"kind: Service\nname: caf\xe9\n", "byte 0xe9 at offset 23"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "is not YAML"),
        (json.dumps(service("a")).encode()[:-9], "Input data was truncated"),
        (json.dumps(service("a")).encode() + b"\n\n{'a': 1}", "document of line 3"),
        (b'{"kind": NaN}', "is not JSON"),
        (b'{"kind": "Service"}}', "is not JSON"),
        (b'{"a":' * 100_000, "is nested too deep"),
        (b"kind: Service\nmetadata: {name: a\n", "is not YAML: line 3"),
        (b"a: b\n\tc: d\n", "line 2"),
        (b"a: b\nc: *nothing\n", "line 2: alias *nothing"),
        (b"a: &a [b, *a]\n", "alias *a has no complete value"),
        (b"- \n<<: 3\n", "is not YAML"),
        (b"<<: 3\n", "something that is no mapping"),
        (b"? [a, b]\n: c\n", "line 1: a key is not a string"),
        (b"x: &x 1\n*x : 2\n", "line 2: a key is not a string"),
        (b"- " * 100_000, "nested deeper than"),
        (b"[" * 100_000, "nested too deep"),
        (b"a: " + b"{a: " * 100_000, "nested deeper than"),
        (b"just a sentence", "Expected `object`"),
        (b"- kind: Service\n", "Expected `object`"),
        (b"[1, 2]", "Expected `object`"),
    ],
)
def test_a_file_without_use_is_one_problem_that_says_why(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    write(tmp_path / "good.yaml", service("good"))
    content = read([str(tmp_path)])
    problem = only_problem(content)
    assert problem.path == str(path)
    assert reason in problem.reason
    assert "\n" not in str(problem)
    assert names(content) == ["web/good"]


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", *[service(f"s-{i}") for i in range(50)])
    monkeypatch.setattr(documents, "MAX_YAML_BYTES", 1000)
    assert "use JSON" in only_problem(read([str(tmp_path)])).reason
    monkeypatch.setattr(manifests, "MAX_FILE_BYTES", 1000)
    assert "is larger than" in only_problem(read([str(tmp_path)])).reason


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for i in range(1, 30):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    assert "aliases stand for more than" in only_problem(read([str(path)])).reason
    merges = ["a0: &a0 {" + ", ".join(f"k{i}: v" for i in range(9)) + "}"]
    for i in range(1, 30):
        merges.append(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}")
    path.write_text("\n".join(merges))
    assert "aliases stand for more than" in only_problem(read([str(path)])).reason


def test_honest_anchors_merges_and_odd_keys(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        """
kind: ConfigMap
data: {1: a, yes: b, null: c, 1.5: d, 2024-01-01: e, same: 1, same: 2, !!odd x: !!binary eA==}
---
kind: List
items:
- kind: Service
  metadata: &meta {name: a, namespace: web, creationTimestamp: 2024-05-01T10:00:00Z}
  spec: &spec
    clusterIP: 10.96.0.1
    sessionAffinity: ClientIP
    ports: &ports [{port: 0x50}]
- kind: Service
  metadata: {<<: *meta, name: b}
  spec:
    <<: [{sessionAffinity: None}, *spec]
    clusterIPs: [2001:0:0:0:0:0:0:1]
    ports: *ports
"""
    )
    content = read([str(tmp_path)])
    assert content.problems == []
    a, b = content.objects
    assert isinstance(a, Service)
    assert isinstance(b, Service)
    assert a.created == b.created == "2024-05-01T10:00:00Z"
    assert a.ports == b.ports
    assert a.ports[0].port == 80
    assert (a.affinity_seconds, b.affinity_seconds) == (10800, 0)
    assert b.cluster_ips == (bytes.fromhex("20010000000000000000000000000001"),)


texts = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | texts
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@fuzzed(100)
@given(json_values, st.booleans())
def test_yaml_means_what_was_dumped(value: object, flow: bool) -> None:
    text = yaml.safe_dump(value, default_flow_style=flow)
    (document,) = documents._Composer(text).documents()
    assert document == value
    assert type(document) is type(value)


@fuzzed(100)
@given(
    st.binary(max_size=200)
    | st.text("{}[]:,&*!<>-?|'\"#% \n\tab019._~", max_size=80).map(str.encode)
    | st.builds(
        lambda data, cut, byte: data[:cut] + bytes([byte]) + data[cut + 1 :],
        st.sampled_from([json.dumps(service("a")).encode(), as_yaml(service("a")).encode()]),
        st.integers(0, 150),
        st.integers(0, 255),
    )
)
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    file = manifests._load("x", lambda: data, {})
    assert isinstance(file.objects, dict)


def test_one_bad_object_does_not_hide_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", service("b"), BAD, NAMELESS, {"metadata": {}}, service("c"))
    content = read([str(path)])
    assert names(content) == ["web/b", "web/c"]
    subjects = [problem.subject for problem in content.problems]
    assert subjects == ["Service web/a", "Service without a name", "object without a name"]
    assert str(content.problems[0]).startswith(f"{path}: Service web/a: Expected `array")


def test_the_later_of_two_files_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "z", tmp_path / "a"
    first.mkdir()
    second.mkdir()
    write(first / "1.yaml", service("a", "10.0.0.1"), service("b"))
    write(first / "2.yaml", service("a", "10.0.0.2"))
    write(second / "1.yaml", service("a", "10.0.0.3"), service("a", "10.0.0.4"))
    content = read([str(first), str(second), str(first)])
    assert names(content) == ["web/a", "web/b"]
    winner = content.objects[0]
    assert isinstance(winner, Service)
    assert winner.cluster_ips == (bytes([10, 0, 0, 4]),)
    assert [(p.path, p.reason, p.warning) for p in content.problems] == [
        (str(first / "1.yaml"), f"is also defined in {first / '2.yaml'}, which is used", True),
        (str(second / "1.yaml"), "is defined more than once; the last definition is used", True),
        (str(first / "2.yaml"), f"is also defined in {second / '1.yaml'}, which is used", True),
    ]


# --- following ----------------------------------------------------------------------------------


class Following:
    """A Follower, the lists it gave, and what it logged."""

    def __init__(self, *places: Path | str) -> None:
        self.lists: queue.Queue[list[Event]] = queue.Queue()
        self.capture = LogCapture()
        log = structlog.wrap_logger(None, processors=[self.capture])
        self.failures: list[tuple[str, Exception]] = []
        self.follower = ManifestFollower(
            [str(place) for place in places],
            self.lists.put,
            log,
            lambda *failure: self.failures.append(failure),
        )

    def next(self) -> list[Event]:
        return self.lists.get(timeout=TIMEOUT)

    def said(self, level: str) -> list[str]:
        return [
            " ".join(str(entry.get(field, "")) for field in ("path", "object", "reason")).strip()
            for entry in self.capture.entries
            if entry["log_level"] == level
        ]


@pytest.fixture
def follow() -> Iterator[Callable[..., Following]]:
    started: list[Following] = []

    def start(*places: Path | str) -> Following:
        started.append(Following(*places))
        started[-1].follower.start()
        return started[-1]

    yield start
    for following in started:
        following.follower.stop()
        assert not following.follower.alive
        assert following.failures == []


def changes(events: list[Event]) -> list[str]:
    """Events in short: +name=ip for an Upsert, -name for a Delete."""
    short = []
    for event in events:
        match event:
            case Upsert(Service() as found):
                short.append(f"+{found.name.name}={found.cluster_ips[0][-1]}")
            case Upsert(found):
                short.append(f"+{found.name}")
            case Delete(_, name):
                short.append(f"-{name.name if isinstance(name, Name) else name}")
            case _:
                short.append(type(event).__name__)
    return short


def test_everything_is_reported_at_once_and_then_each_change(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    write(tmp_path / "a.yaml", service("a"), service("b"))
    shutil.copy(RECORDINGS / "list-nodes.json", tmp_path)
    following = follow(tmp_path)
    first = following.next()
    assert first[-1] == Synced()
    assert changes(first[:-1])[:2] == ["+a=1", "+b=1"]
    assert sum(isinstance(e, Upsert) and isinstance(e.object, Node) for e in first) == 3
    write(tmp_path / "a.yaml", service("b", "10.96.0.2"), service("c"), service("d"))
    assert changes(following.next()) == ["+b=2", "+c=1", "+d=1", "-a"]
    write(tmp_path / "b.yaml", service("e"))
    assert changes(following.next()) == ["+e=1"]
    (tmp_path / "a.yaml").unlink()
    events = following.next()
    assert Delete(Service, Name("web", "c")) in events
    assert changes(events) == ["-b", "-c", "-d"]
    (tmp_path / "list-nodes.json").rename(tmp_path / "list-nodes.json.off")
    assert {type(event) for event in following.next()} == {Delete}
    assert following.capture.entries == []


def test_no_places_are_synced_too(tmp_path: Path, follow: Callable[..., Following]) -> None:
    assert follow().next() == [Synced()]


def test_a_directory_without_manifests_holds_back_synced(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    """An agent that restarts beside a volume that is not mounted must not delete every Service."""
    place, other = tmp_path / "place", tmp_path / "other.yaml"
    place.mkdir()
    (place / "notes.txt").write_text("not a manifest")
    write(other, service("o"))
    assert only_problem(read([str(place)])).whole
    following = follow(place, other)
    assert changes(following.next()) == ["+o=1"]
    write(place / "a.yaml", service("a"))
    assert changes(following.next()) == ["+a=1", "Synced"]
    assert following.said("error") == [
        f"{place}  contains no manifest (.yaml, .yml or .json); where no objects are meant, add"
        ' a file with "kind: List"'
    ]


def test_an_emptied_directory_keeps_its_objects_and_says_so(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    """As an emptied ConfigMap and an unmounted volume look; a `List` without items empties it."""
    place, marker = tmp_path / "place", tmp_path / "marker.yaml"
    (place / "..1").mkdir(parents=True)
    (place / "..2").mkdir()
    (place / "..3").mkdir()
    write(place / "..1" / "a.yaml", service("a"), service("b"))
    (place / "..data").symlink_to("..1")
    write(marker, service("m"))
    following = follow(place, marker)
    assert changes(following.next()) == ["+a=1", "+b=1", "+m=1", "Synced"]
    (place / "..new").symlink_to("..2")
    (place / "..new").rename(place / "..data")
    write(marker, service("m", "10.96.0.2"))
    assert changes(following.next()) == ["+m=2"]
    (error,) = following.said("error")
    assert error.startswith(f"{place}  contains no manifest")
    assert error.endswith("; its last valid content stays in use")
    write(place / "..3" / "none.yaml", {"kind": "List", "items": []})
    (place / "..new").symlink_to("..3")
    (place / "..new").rename(place / "..data")
    assert changes(following.next()) == ["-a", "-b"]


@pytest.mark.parametrize("kind", ["Servce", "service", "Endpointslice", "EndpointSlices"])
def test_a_misspelt_kind_is_a_problem(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a.yaml", {"kind": kind, "metadata": {"name": "a"}}, service("b"))
    content = read([str(tmp_path)])
    assert names(content) == ["web/b"]
    problem = only_problem(content)
    assert problem.subject == f"{kind} default/a"
    assert problem.reason.startswith("unknown kind; did you mean ")


def test_other_kinds_are_no_problem(tmp_path: Path) -> None:
    """Directories of manifests hold more than Services, also kinds with names like ours."""
    kinds = ("ServiceAccount", "Deployment", "ConfigMap", "Pod", "Endpoints", "ServiceMonitor")
    cilium = {"kind": "CiliumEndpointSlice", "apiVersion": "cilium.io/v2alpha1"}
    knative = {"kind": "Service", "apiVersion": "serving.knative.dev/v1"}
    others = [*({"kind": kind} for kind in kinds), cilium, knative]
    write(tmp_path / "a.yaml", *({**other, "metadata": {"name": "x"}} for other in others))
    assert read([str(tmp_path)]) == Content([], [])


def test_a_change_without_a_difference_is_silent(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    write(tmp_path / "a.yaml", service("a"), service("b"))
    following = follow(tmp_path)
    following.next()
    write(tmp_path / "a.yaml", service("b", annotations={"of-no": "use"}), service("a"))
    write(tmp_path / "marker.yaml", service("m"))
    assert changes(following.next()) == ["+m=1"]
    (tmp_path / "a.yaml").rename(tmp_path / "a.off")
    assert sorted(changes(following.next())) == ["-a", "-b"]


def test_a_file_in_the_writing_is_left_alone(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    write(tmp_path / "old.yaml", service("a"), service("b"))
    following = follow(tmp_path)
    following.next()
    half, rest = as_yaml(service("a")), "---\n" + as_yaml(service("c"))
    with (tmp_path / "old.yaml").open("w") as old, (tmp_path / "new.yaml").open("w") as new:
        for file in (old, new):
            file.write(half)
            file.flush()
        write(tmp_path / "other.yaml", service("other"))
        assert changes(following.next()) == ["+other=1"]
        old.write(rest)
    assert changes(following.next()) == ["+c=1", "-b"]


def test_a_file_as_a_place(tmp_path: Path, follow: Callable[..., Following]) -> None:
    path = write(tmp_path / "a.conf", service("a"))
    following = follow(path)
    assert changes(following.next()) == ["+a=1", "Synced"]
    write(tmp_path / "b.conf", service("b"))
    path.write_text(as_yaml(service("a", "10.96.0.2")))
    assert changes(following.next()) == ["+a=2"]
    path.unlink()
    assert changes(following.next()) == ["-a"]
    os.link(tmp_path / "b.conf", path)
    assert changes(following.next()) == ["+b=1"]


def test_a_config_map_volume(tmp_path: Path, follow: Callable[..., Following]) -> None:
    """The steps of the kubelet's AtomicWriter; one list for one update."""
    volume = tmp_path / "volume"
    volume.mkdir()

    def update(time: str, payload: dict[str, list[dict[str, object]]]) -> None:
        (volume / f"..{time}").mkdir()
        for name, objects in payload.items():
            (volume / f"..{time}" / name).write_text(as_yaml(*objects))
        before = os.readlink(volume / "..data") if (volume / "..data").exists() else None
        (volume / "..data_tmp").symlink_to(f"..{time}")
        (volume / "..data_tmp").rename(volume / "..data")
        for name in payload:
            if not (volume / name).is_symlink():
                (volume / name).symlink_to(f"..data/{name}")
        for entry in volume.iterdir():
            if not entry.name.startswith("..") and entry.name not in payload:
                entry.unlink()
        if before:
            shutil.rmtree(volume / before)

    update("2024_1", {"a.yaml": [service("a"), service("b")], "b.yaml": [service("c")]})
    directory, file = follow(volume), follow(volume / "a.yaml")
    assert changes(directory.next()) == ["+a=1", "+b=1", "+c=1", "Synced"]
    assert changes(file.next()) == ["+a=1", "+b=1", "Synced"]
    update("2024_2", {"a.yaml": [service("a", "10.96.0.2")], "c.yaml": [service("b")]})
    assert changes(directory.next()) == ["+a=2", "-c"]
    assert changes(file.next()) == ["+a=2", "-b"]
    update("2024_3", {"a.yaml": [service("a", "10.96.0.3")], "c.yaml": [service("b")]})
    assert changes(directory.next()) == ["+a=3"]
    assert changes(file.next()) == ["+a=3"]
    assert directory.capture.entries == file.capture.entries == []


def test_a_change_is_seen_at_a_link_and_at_its_target(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    for name in ("place", "one", "two"):
        (tmp_path / name).mkdir()
    write(tmp_path / "one" / "x", service("a", "10.96.0.1"))
    write(tmp_path / "two" / "x", service("a", "10.96.0.2"))
    (tmp_path / "current").symlink_to("one")
    (tmp_path / "place" / "x.yaml").symlink_to("../current/x")
    (tmp_path / "linked").symlink_to(tmp_path / "place")
    following = follow(tmp_path / "linked")
    assert changes(following.next()) == ["+a=1", "Synced"]
    (tmp_path / "one" / "x").write_text(as_yaml(service("a", "10.96.0.3")))
    assert changes(following.next()) == ["+a=3"]
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(tmp_path / "current")
    assert changes(following.next()) == ["+a=2"]
    write(tmp_path / "two" / "x", service("a", "10.96.0.4"))
    assert changes(following.next()) == ["+a=4"]
    # another directory behind the place itself
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "y.yaml", service("b"))
    (tmp_path / "next").symlink_to("other")
    (tmp_path / "next").rename(tmp_path / "linked")
    assert changes(following.next()) == ["+b=1", "-a"]
    write(tmp_path / "other" / "z.yaml", service("c"))
    assert changes(following.next()) == ["+c=1"]


def test_links_to_nothing_and_in_circles_keep_what_was_known(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    target = write(tmp_path / "target", service("a"))
    (tmp_path / "a.yaml").symlink_to("target")
    (tmp_path / "b.yaml").symlink_to("b.yaml")
    following = follow(tmp_path)
    assert changes(following.next()) == ["+a=1"]
    target.unlink()
    write(tmp_path / "c.yaml", service("c"))
    assert changes(following.next()) == ["+c=1"]
    write(target, service("a", "10.96.0.2"))
    assert changes(following.next()) == ["+a=2"]
    circle = f"{tmp_path / 'b.yaml'}  cannot be read: Too many levels of symbolic links"
    assert circle in following.said("error")


def test_a_file_that_cannot_be_parsed_at_the_start_holds_back_synced(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    write(tmp_path / "a.yaml", service("a"))
    (tmp_path / "b.yaml").write_text("{ not: [in order")
    following = follow(tmp_path)
    assert changes(following.next()) == ["+a=1"]
    write(tmp_path / "b.yaml", service("b"))
    assert changes(following.next()) == ["+b=1", "Synced"]


def test_a_removed_directory_keeps_its_objects_until_it_is_back(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    place, marker = tmp_path / "place", tmp_path / "marker.yaml"
    place.mkdir()
    write(place / "a.yaml", service("a"), service("b"))
    write(marker, service("m", "10.96.0.1"))
    following = follow(place, place / "a.yaml", marker)
    following.next()
    place.rename(tmp_path / "gone")
    write(tmp_path / "gone" / "a.yaml", service("not-ours"))
    write(marker, service("m", "10.96.0.2"))
    assert changes(following.next()) == ["+m=2"]
    reason = "No such file or directory; its last valid content stays in use"
    assert following.said("error") == [f"{place}  {reason}", f"{place / 'a.yaml'}  {reason}"]
    (tmp_path / "gone").rename(place)
    assert changes(following.next()) == ["+not-ours=1", "-a", "-b"]
    write(place / "a.yaml", service("c"))
    assert changes(following.next()) == ["+c=1", "-not-ours"]
    shutil.rmtree(place)
    place.mkdir()
    write(place / "d.yaml", service("d"))
    while "+d=1" not in changes(following.next()):
        pass  # the removal of the file may be seen in between, and then is an event of its own


def test_a_file_that_cannot_be_parsed_keeps_what_it_held(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    path, marker = tmp_path / "a.yaml", tmp_path / "m.yaml"
    write(path, service("a"), service("b"))
    following = follow(tmp_path)
    following.next()
    for ip, text in enumerate(["kind: {", "kind: {", json.dumps(service("a"))[:-5], ""]):
        path.write_text(text)
        write(marker, service("m", f"10.96.0.{ip + 1}"))
        assert changes(following.next()) == [f"+m={ip + 1}"]
    errors = following.said("error")
    # opening a file truncates it, but only closing it makes it read: each complaint is logged once
    assert [line.split("  ")[1].split(";")[0] for line in errors] == [
        "is not YAML: line 2: did not find expected node content",
        "is not JSON: Input data was truncated, document of line 1",
        "is empty",
    ]
    assert all("its last valid content stays in use" in line for line in errors)
    write(path, service("b"))
    assert changes(following.next()) == ["-a"]
    path.write_text("kind: {")
    write(path, service("b", "10.96.0.2"))
    assert changes(following.next()) == ["+b=2"]


def test_an_object_that_cannot_be_used_keeps_its_last_good_form(
    tmp_path: Path, follow: Callable[..., Following]
) -> None:
    path = write(tmp_path / "a.yaml", service("a"), service("b"), service("c"))
    following = follow(tmp_path)
    following.next()
    write(path, BAD, service("b", "10.96.0.2"))
    assert changes(following.next()) == ["+b=2", "-c"]
    write(path, BAD, service("b", "10.96.0.3"))
    assert changes(following.next()) == ["+b=3"]
    (error,) = following.said("error")
    assert error.startswith(f"{path} Service web/a Expected `array | null`, got `str`")
    assert error.endswith("its last valid form stays in use")
    write(path, service("b", "10.96.0.3"))
    assert changes(following.next()) == ["-a"]
    write(path, BAD, service("b", "10.96.0.4"))
    assert changes(following.next()) == ["+b=4"]
    assert len(following.said("error")) == 2  # it had been in order in between


@pytest.mark.parametrize(
    ("broken", "stay"),
    [
        (NAMELESS, ["a"]),  # a Service, so the slice is removed
        ({"kind": "Service", "metadata": {"name": ""}}, ["a"]),
        ({"kind": "Node", "metadata": 3}, []),
        ({"metadata": {"name": "a", "namespace": "web"}}, ["a"]),  # of no kind
        ({"metadata": {"name": "x", "namespace": "web"}}, []),
        ({"kind": "List", "items": [3]}, ["a", "s"]),
        ({"kind": "List", "items": 3}, ["a", "s"]),
        ("text", ["a", "s"]),
    ],
)
def test_what_a_broken_object_may_be_stays(
    tmp_path: Path, follow: Callable[..., Following], broken: object, stay: list[str]
) -> None:
    path = write(tmp_path / "a.yaml", service("a"), endpoint_slice("s", 1), service("b"))
    following = follow(tmp_path)
    following.next()
    write(path, broken, service("b", "10.96.0.2"))
    gone = [f"-{name}" for name in ("a", "s") if name not in stay]
    assert changes(following.next()) == ["+b=2", *gone]


def test_an_object_in_two_files(tmp_path: Path, follow: Callable[..., Following]) -> None:
    first = write(tmp_path / "1.yaml", service("a", "10.96.0.1"))
    second = write(tmp_path / "2.yaml", service("a", "10.96.0.2"))
    following = follow(tmp_path)
    assert changes(following.next()) == ["+a=2", "Synced"]
    write(first, service("a", "10.96.0.3"))
    second.unlink()
    assert changes(following.next())[-1] == "+a=3"
    write(second, service("a", "10.96.0.4"))
    assert changes(following.next()) == ["+a=4"]
    warning = f"{first} Service web/a is also defined in {second}, which is used"
    assert following.said("warning") == [warning, warning]
    assert following.said("error") == []


def test_standard_input_is_reported_with_the_rest(
    tmp_path: Path, follow: Callable[..., Following], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.yaml", service("a"))
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stdin, os.fdopen(write_end, "w") as pipe:
        monkeypatch.setattr("sys.stdin", stdin)
        following = follow("-", tmp_path)
        pipe.write(as_yaml(service("from-stdin")))
        pipe.close()
        assert changes(following.next()) == ["+from-stdin=1", "+a=1", "Synced"]
        write(tmp_path / "a.yaml", service("b"))
        assert changes(following.next()) == ["+b=1", "-a"]


def test_stop_does_not_wait_for_standard_input(
    follow: Callable[..., Following], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stdin, os.fdopen(write_end, "w"):
        monkeypatch.setattr("sys.stdin", stdin)
        following = follow("-")
        following.follower.stop()
        assert not following.follower.alive
        assert following.lists.empty()


def test_stop_before_start_and_twice(tmp_path: Path) -> None:
    following = Following(tmp_path)
    following.follower.stop()
    following.follower.stop()


def test_a_queue_of_inotify_that_overflows_makes_everything_be_read(tmp_path: Path) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 200_000:
        pytest.skip("the queue is too long to fill")
    write(tmp_path / "a.yaml", service("a"))
    told_first, go_on = threading.Event(), threading.Event()
    lists: queue.Queue[list[Event]] = queue.Queue()

    def put(events: list[Event]) -> None:
        lists.put(events)
        told_first.set()
        go_on.wait(TIMEOUT)

    log = structlog.wrap_logger(None, processors=[LogCapture()])
    follower = ManifestFollower([str(tmp_path)], put, log, print)
    follower.start()
    try:
        assert told_first.wait(TIMEOUT)
        (tmp_path / "x").touch()
        for _ in range(limit // 4 + 1):
            (tmp_path / "x").rename(tmp_path / "y")
            (tmp_path / "y").rename(tmp_path / "x")
        write(tmp_path / "a.yaml", service("b"))
        go_on.set()
        lists.get(timeout=TIMEOUT)
        assert changes(lists.get(timeout=TIMEOUT)) == ["+b=1", "-a"]
    finally:
        go_on.set()
        follower.stop()


@pytest.mark.parametrize("where", ["__init__", "add_watch"])
def test_files_are_looked_at_where_inotify_cannot_be_had(
    tmp_path: Path,
    follow: Callable[..., Following],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(inotify_simple.INotify, where, refuse)
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.05)
    place = tmp_path / "place"
    place.mkdir()
    path = write(place / "a.yaml", service("a"))
    following = follow(place)
    assert changes(following.next()) == ["+a=1", "Synced"]
    write(path, service("b"))
    assert changes(following.next()) == ["+b=1", "-a"]
    write(place / "c.yaml", service("c"))
    assert changes(following.next()) == ["+c=1"]
    path.unlink()
    assert changes(following.next()) == ["-b"]
    place.rename(tmp_path / "gone")
    write(tmp_path / "gone" / "a.yaml", service("d"))
    (tmp_path / "gone").rename(place)
    assert changes(following.next()) == ["+d=1"]
    assert len(following.said("warning")) == 1


def test_a_change_between_two_looks_is_not_lost(tmp_path: Path) -> None:
    """A file that changes while another one, found changed before, is about to be read."""
    (given,) = resolve([str(tmp_path)])
    first = write(tmp_path / "a.yaml", service("a"))
    second = write(tmp_path / "b.yaml", service("b"))
    wake = os.eventfd(0, os.EFD_CLOEXEC)
    watch = watching.PollingWatch(wake)
    watch.follow([given])
    write(first, service("a", "10.96.0.2"))
    assert str(first) in (watch.wait() or ())
    write(second, service("b", "10.96.0.2"))
    watch.follow([given])
    assert str(second) in (watch.wait() or ())
    os.close(wake)


def test_a_file_written_twice_within_a_tick_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second write leaves size, times and inode as they were when the file was read."""
    (given,) = resolve([str(tmp_path)])
    path = write(tmp_path / "a.yaml", service("a"))
    clock = [path.stat().st_ctime + 0.001]
    monkeypatch.setattr(watching.time, "time", lambda: clock[0])
    wake = os.eventfd(0, os.EFD_CLOEXEC)
    watch = watching.PollingWatch(wake)
    watch.follow([given])
    clock[0] += watching.RACY_SECONDS
    assert watch.wait() == {str(path)}
    os.eventfd_write(wake, 1)
    assert watch.wait() == set()
    os.close(wake)


def test_a_thread_that_fails_is_reported(tmp_path: Path) -> None:
    def put(events: list[Event]) -> None:
        raise RuntimeError("no loop")

    write(tmp_path / "a.yaml", service("a"))
    failures: queue.Queue[tuple[str, Exception]] = queue.Queue()
    log = structlog.wrap_logger(None, processors=[LogCapture()])
    follower = ManifestFollower([str(tmp_path)], put, log, lambda *why: failures.put(why))
    follower.start()
    name, error = failures.get(timeout=TIMEOUT)
    assert (name, str(error)) == ("manifests", "no loop")
    assert follower.stop()


def test_encoding_of_yaml_values_is_what_the_decoder_reads() -> None:
    (encoded,) = documents._yaml_documents("a: [1, 0o7, 010, 1.5, ~, yes, '1', 2024-01-01]")
    expected = {"a": [1, "0o7", 8, 1.5, None, True, "1", "2024-01-01"]}
    assert msgspec.json.decode(encoded) == expected
