"""deploy/: all ways to install give the same resources, and all of them are valid.

The base as text needs nothing but this repository; its renderings need kubectl or kustomize
(tools/need-test-tools has Debian 13's), the chart's the package helm-python-sdk
(`pip install -e '.[helm]'`). Both are there in CI.
"""

from __future__ import annotations

import copy
import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import SchemaNotFoundError

from agent import __version__
from agent.config import file as config_file
from tests.confinement import CONFINED

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
OVERLAYS = ("kubeadm", "kubeadm-opt-in", "kind", "k3s")
KUSTOMIZE = [
    [program, verb]
    for program, verb in (
        ("kubectl", "kustomize"),
        ("kustomize", "build"),
        (str(ROOT / "build/trixie/usr/bin/kustomize"), "build"),
    )
    if shutil.which(program)
]
"""The first of these renders."""
needs_kustomize = pytest.mark.skipif(
    not KUSTOMIZE, reason="needs kubectl or kustomize (tools/need-test-tools)"
)
render_daemonset = runpy.run_path(str(ROOT / "tools" / "render-daemonset"))

Document = dict[str, Any]
Resources = dict[tuple[str, str], Document]
"""By kind and name."""


def by_name(documents: list[Document]) -> Resources:
    found = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert len(found) == len(documents)
    return found


def load(text: str) -> Resources:
    return by_name([d for d in yaml.safe_load_all(text) if d])


def one_file() -> Resources:
    return load((ROOT / "daemonset.yaml").read_text(encoding="utf-8"))


@cache
def _kustomized(directory: Path) -> str:
    command = [*KUSTOMIZE[0], str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kustomized(name: str) -> Resources:
    return load(_kustomized(DEPLOY / name))


def with_component(tmp_path: Path, *names: str) -> Resources:
    """The base with these components, as an overlay of the reader's own."""
    place = DEPLOY / "overlays" / f".test-{tmp_path.name}"
    place.mkdir()
    try:
        (place / "kustomization.yaml").write_text(
            json.dumps(
                {
                    "resources": ["../../base"],
                    "components": [f"../../components/{name}" for name in names],
                }
            )
        )
        return load(_kustomized(place))
    finally:
        shutil.rmtree(place)


@pytest.fixture(scope="session")
def chart_texts() -> Iterator[Callable[..., dict[str, str]]]:
    """Renders the chart's files with values; by the file's name."""
    helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk, the extra `helm`")

    with helm.Chart.load(DEPLOY / "chart") as loaded:

        def render(namespace: str = "kube-system", **values: Any) -> dict[str, str]:
            loaded.validate_schema(values)
            texts = loaded.render(values, name="sliceproxy", namespace=namespace)
            return {Path(name).name: text for name, text in texts.items()}

        yield render


@pytest.fixture(scope="session")
def chart(chart_texts: Callable[..., dict[str, str]]) -> Callable[..., Resources]:
    """Renders the chart's resources with values."""

    def render(namespace: str = "kube-system", **values: Any) -> Resources:
        texts = chart_texts(namespace, **values)
        del texts["NOTES.txt"]
        return by_name([d for t in texts.values() for d in yaml.safe_load_all(t) if d])

    return render


def daemon_set(resources: Resources) -> Document:
    ((_, found),) = [item for item in resources.items() if item[0][0] == "DaemonSet"]
    return found


def container(resources: Resources) -> Document:
    (found,) = daemon_set(resources)["spec"]["template"]["spec"]["containers"]
    return dict(found)


def config_of(resources: Resources) -> dict[str, str]:
    ((_, found),) = [item for item in resources.items() if item[0][0] == "ConfigMap"]
    return dict(found["data"])


def without_checksum(resources: Resources) -> Resources:
    resources = copy.deepcopy(resources)
    annotations = daemon_set(resources)["spec"]["template"]["metadata"]["annotations"]
    assert re.fullmatch("[0-9a-f]{64}", annotations.pop("checksum/config"))
    return resources


def placement(resources: Resources) -> list[Document]:
    affinity = daemon_set(resources)["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    return list(term["matchExpressions"])


def valid(resources: Resources) -> None:
    """By the schemas of all versions; kinds that Kubernetes does not have are left out."""
    for version in VERSIONS:
        for (kind, _), document in resources.items():
            if kind in ("PodMonitor", "PrometheusRule"):
                with pytest.raises(SchemaNotFoundError):
                    kubernetes_validate.validate(document, version, strict=True)
            else:
                used = kubernetes_validate.validate(document, version, strict=True)
                assert used == version, "it takes an older schema where it has none"


# --- one source -----------------------------------------------------------------------------------


def test_the_one_file_manifest_is_what_the_tool_writes() -> None:
    text = (ROOT / "daemonset.yaml").read_text(encoding="utf-8")
    assert text == render_daemonset["render"](), "run tools/render-daemonset"


@needs_kustomize
def test_the_one_file_manifest_is_the_rendering_of_the_base() -> None:
    """But for the ConfigMap's name, which ends in a hash there, and the checksum, which does the
    same here."""
    text, hashes = re.subn(
        r"\bsliceproxy-[a-z0-9]{10}\b", "sliceproxy", _kustomized(DEPLOY / "base")
    )
    assert hashes == 2
    assert load(text) == without_checksum(one_file())


def test_the_charts_default_rendering_is_the_one_file_manifest(
    chart: Callable[..., Resources],
) -> None:
    """Checksum included."""
    assert chart() == one_file()


def test_every_place_has_the_version() -> None:
    about = yaml.safe_load((DEPLOY / "chart" / "Chart.yaml").read_text())
    assert about["version"] == about["appVersion"] == __version__
    for name in ("base", "cleanup", "prepull"):
        text = (DEPLOY / name / "daemonset.yaml").read_text()
        assert set(re.findall(r"image: (\S+)", text)) == {f"sliceproxy:{__version__}"}
    for name in ("README.md", "Dockerfile"):
        text = (ROOT / name).read_text()
        assert set(re.findall(r"sliceproxy:(\d\S+)", text)) == {__version__}


def test_the_one_file_manifest_is_valid_for_kubernetes() -> None:
    valid(one_file())


@pytest.mark.parametrize("version", VERSIONS)
def test_every_versions_schema_refuses_a_field_that_does_not_exist(version: str) -> None:
    wrong = daemon_set(one_file())
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe") as refused:
        kubernetes_validate.validate(wrong, version, strict=True)
    assert refused.value.version == version


# --- kustomize ------------------------------------------------------------------------------------


@needs_kustomize
@pytest.mark.parametrize(
    "name", ["base", "cleanup", "prepull", *(f"overlays/{o}" for o in OVERLAYS)]
)
def test_valid_for_kubernetes(name: str) -> None:
    valid(kustomized(name))


@needs_kustomize
@pytest.mark.parametrize("name", ["base", "overlays/kind", "overlays/k3s"])
def test_a_changed_configuration_rolls_out(name: str) -> None:
    """Its name is made of its content, and the DaemonSet names it."""
    resources = kustomized(name)
    ((_, config_map),) = [key for key in resources if key[0] == "ConfigMap"]
    assert re.fullmatch("sliceproxy-[a-z0-9]{10}", config_map)
    volume = daemon_set(resources)["spec"]["template"]["spec"]["volumes"][0]
    assert volume["configMap"]["name"] == config_map


@needs_kustomize
@pytest.mark.parametrize(
    ("name", "server"),
    [("kind", "https://kind-control-plane:6443"), ("k3s", "https://127.0.0.1:6444")],
)
def test_overlays_change_the_server_and_nothing_else(name: str, server: str) -> None:
    def without_server(resources: Resources) -> list[object]:
        text = json.dumps(list(resources.values()))
        return list(json.loads(re.sub(r"sliceproxy-[a-z0-9]{10}", "sliceproxy", text)))

    changed, base = kustomized(f"overlays/{name}"), kustomized("base")
    kubeconfigs = [yaml.safe_load(config_of(r)["kubeconfig.conf"]) for r in (changed, base)]
    assert kubeconfigs[0]["clusters"][0]["cluster"].pop("server") == server
    kubeconfigs[1]["clusters"][0]["cluster"].pop("server")
    assert kubeconfigs[0] == kubeconfigs[1]
    for resources in (changed, base):
        ((_, config_map),) = [i for i in resources.items() if i[0][0] == "ConfigMap"]
        del config_map["data"]["kubeconfig.conf"]
    assert without_server(changed) == without_server(base)


@needs_kustomize
def test_kubeadms_configuration_is_read_where_it_says() -> None:
    """With the ConfigMap as kubeadm writes it."""
    resources = kustomized("overlays/kubeadm")
    assert not [key for key in resources if key[0] == "ConfigMap"]
    pod = daemon_set(resources)["spec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == "kube-proxy"
    place = container(resources)["volumeMounts"][0]["mountPath"]
    for one in (container(resources), *pod["initContainers"]):
        assert f"{place}/config.conf" in one["args"]
        assert one["volumeMounts"][0]["mountPath"] == place
    recorded = yaml.safe_load((ROOT / "tests/recordings/kubeadm-kube-proxy.yaml").read_text())
    read = config_file.parse(recorded["data"]["config.conf"], "config.conf")
    assert config_file.Settings(**read.chosen).kubeconfig == f"{place}/kubeconfig.conf"
    assert "kubeconfig.conf" in recorded["data"]


@needs_kustomize
def test_podmonitor_names_a_port_that_is_open(tmp_path: Path) -> None:
    resources = with_component(tmp_path, "podmonitor")
    valid(resources)
    monitor = resources["PodMonitor", "sliceproxy"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    ports = {p["name"]: p["containerPort"] for p in container(resources)["ports"]}
    assert container(resources)["args"][-1] == f"--metrics-bind-address=0.0.0.0:{ports['metrics']}"
    assert endpoint["port"] == "metrics"
    labels = daemon_set(resources)["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


@needs_kustomize
def test_alerts_are_a_component(tmp_path: Path) -> None:
    """With the metrics that they need."""
    resources = with_component(tmp_path, "podmonitor", "alerts")
    valid(resources)
    rule = resources["PrometheusRule", "sliceproxy"]
    assert rule["metadata"]["namespace"] == "kube-system"
    alerts = [one["alert"] for group in rule["spec"]["groups"] for one in group["rules"]]
    assert "SliceproxyNotReady" in alerts


@needs_kustomize
def test_events_are_the_only_right_to_write(tmp_path: Path) -> None:
    before = kustomized("base")["ClusterRole", "sliceproxy"]["rules"]
    resources = with_component(tmp_path, "events")
    valid(resources)
    *same, added = resources["ClusterRole", "sliceproxy"]["rules"]
    assert same == before
    assert added == {
        "apiGroups": ["events.k8s.io"],
        "resources": ["events"],
        "verbs": ["create"],
    }
    assert container(resources)["args"][-1] == "--post-events"


# --- which node gets which proxy ------------------------------------------------------------------

LABELS = (None, "sliceproxy", "kube-proxy")
NODE = {"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}


def matches(expressions: list[Document], label: str | None) -> bool:
    """As the scheduler sees it."""
    labels = {**NODE, **({"service-proxy": label} if label else {})}
    results = {
        "In": lambda e: labels.get(e["key"]) in e["values"],
        "NotIn": lambda e: labels.get(e["key"]) not in e["values"],
    }
    return all(results[e["operator"]](e) for e in expressions)


def kube_proxy_placement(name: str) -> list[Document]:
    patch = yaml.safe_load((DEPLOY / "kube-proxy" / f"{name}.yaml").read_text())
    return placement({("DaemonSet", "kube-proxy"): patch})


@needs_kustomize
@pytest.mark.parametrize(
    ("sliceproxy", "kube_proxy", "new_node_has"),
    [
        ("overlays/kubeadm-opt-in", "opt-in", "kube-proxy"),
        ("base", "opt-out", "sliceproxy"),
    ],
)
def test_every_node_has_exactly_one_proxy(
    sliceproxy: str, kube_proxy: str, new_node_has: str
) -> None:
    """Whatever its label, before the flip and after it; a new node has none."""
    for label in LABELS:
        has = {
            "sliceproxy": matches(placement(kustomized(sliceproxy)), label),
            "kube-proxy": matches(kube_proxy_placement(kube_proxy), label),
        }
        assert sorted(has.values()) == [False, True], label
        assert has[label or new_node_has]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
def test_the_patches_change_kube_proxys_affinity_alone(tmp_path: Path) -> None:
    """As kubectl applies them, one after the other; the list of terms is replaced."""
    document = daemon_set(one_file())
    spec = document["spec"]["template"]["spec"]
    spec["nodeSelector"] = {"kubernetes.io/os": "linux"}  # kubeadm's
    document["metadata"]["name"] = "kube-proxy"
    for name in ("opt-in", "opt-out"):
        place = tmp_path / "kube-proxy.json"
        place.write_text(json.dumps(document))
        command = ["kubectl", "patch", "--local", "-o", "json", "-f", str(place), "--patch-file"]
        patch = DEPLOY / "kube-proxy" / f"{name}.yaml"
        done = subprocess.run([*command, str(patch)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        patched = json.loads(done.stdout)
        assert placement({("DaemonSet", "kube-proxy"): patched}) == kube_proxy_placement(name)
        for one in (patched, document):
            del one["spec"]["template"]["spec"]["affinity"]
        assert patched == document
        document = json.loads(done.stdout)


@needs_kustomize
def test_between_the_two_steps_of_the_flip_no_node_has_no_proxy() -> None:
    """sliceproxy's placement changes first."""
    for label in LABELS:
        assert matches(placement(kustomized("base")), label) or matches(
            kube_proxy_placement("opt-in"), label
        )


@needs_kustomize
@pytest.mark.parametrize("sliceproxy", ["base", "overlays/kubeadm-opt-in"])
@pytest.mark.parametrize("kube_proxy", ["opt-in", "opt-out"])
def test_cleanup_runs_only_where_kube_proxy_is_and_sliceproxy_is_not(
    sliceproxy: str, kube_proxy: str
) -> None:
    cleaned = [label for label in LABELS if matches(placement(kustomized("cleanup")), label)]
    assert cleaned == ["kube-proxy"]
    assert not matches(placement(kustomized(sliceproxy)), "kube-proxy")
    assert matches(kube_proxy_placement(kube_proxy), "kube-proxy")


def test_cleanup_has_the_agents_rights_and_no_token() -> None:
    (document,) = load((DEPLOY / "cleanup/daemonset.yaml").read_text()).values()
    pod = document["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    (cleanup,) = pod["initContainers"]
    assert cleanup["args"] == ["cleanup"]
    assert cleanup["securityContext"] == container(one_file())["securityContext"]
    (waiting,) = pod["containers"]
    assert waiting["securityContext"]["capabilities"] == {"drop": CONFINED["cap_drop"]}


def test_prepull_has_no_rights() -> None:
    (document,) = load((DEPLOY / "prepull/daemonset.yaml").read_text()).values()
    pod = document["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert "hostNetwork" not in pod
    (pulled,) = pod["containers"]
    assert pulled["securityContext"]["runAsUser"] == 65534
    assert pulled["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_configurations_in_the_document_are_ones_that_the_agent_takes() -> None:
    """docs/networks.md."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/networks.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        read = config_file.parse(block, "config.conf")
        assert not read.without_meaning
        config_file.Settings(**read.chosen).options()


# --- Helm -----------------------------------------------------------------------------------------


def test_what_helm_prints_names_the_value_that_must_be_set(
    chart_texts: Callable[..., dict[str, str]],
) -> None:
    assert "apiServer is still a placeholder" in chart_texts()["NOTES.txt"]
    notes = chart_texts("net", apiServer="https://192.0.2.1:6443", placement="opt-in")["NOTES.txt"]
    assert "placeholder" not in notes
    assert "kubectl label node NODE service-proxy=sliceproxy" in notes
    assert "kubectl -n net exec ds/sliceproxy -- sliceproxy status" in notes


def test_chart_passes_helms_own_check() -> None:
    helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk, the extra `helm`")
    result = helm.lint(DEPLOY / "chart", strict=True)
    worse = [m for m in result["messages"] if m["severity"] not in ("info", "INFO", 1)]
    assert not worse, worse


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"placement": "opt-in", "architectures": ["amd64", "arm64"]},
        {"existingConfigMap": "kube-proxy", "configDirectory": "/var/lib/kube-proxy"},
        {"podMonitor": {"enabled": True, "interval": "30s"}, "events": {"enabled": True}},
        {"image": {"repository": "registry.example/sliceproxy", "digest": "sha256:" + "0" * 64}},
        {"imagePullSecrets": [{"name": "registry"}], "extraArgs": ["--log-level=debug"]},
        {"init": {"enabled": False}},
        {"updateStrategy": {"maxUnavailable": 1}, "namespace": "networking"},
    ],
    ids=lambda v: ", ".join(v) or "none",
)
def test_every_value_renders_to_something_valid(
    chart: Callable[..., Resources], values: dict[str, Any]
) -> None:
    values = dict(values)
    valid(chart(values.pop("namespace", "kube-system"), **values))


@needs_kustomize
def test_the_charts_options_are_kustomizes(chart: Callable[..., Resources], tmp_path: Path) -> None:
    """opt-in, podmonitor, alerts and events are the same change in both."""
    on = {"enabled": True}
    ours = chart(placement="opt-in", podMonitor=on, alerts=on, events=on)
    theirs = with_component(tmp_path, "opt-in", "podmonitor", "alerts", "events")
    text = re.sub(r"sliceproxy-[a-z0-9]{10}", "sliceproxy", json.dumps(list(theirs.values())))
    assert without_checksum(ours) == by_name(json.loads(text))


def test_the_charts_configuration_reaches_the_agent(chart: Callable[..., Resources]) -> None:
    values = {
        "apiServer": "https://192.0.2.1:6443",
        "config": {
            "detectLocalMode": "InterfaceNamePrefix",
            "detectLocal": {"interfaceNamePrefix": "cali"},
        },
    }
    rendered = chart(**values)
    assert "server: https://192.0.2.1:6443\n" in config_of(rendered)["kubeconfig.conf"]
    read = config_file.parse(config_of(rendered)["config.conf"], "config.conf")
    settings = config_file.Settings(**read.chosen)
    assert settings.options().interface == "cali"
    assert settings.kubeconfig == "/etc/sliceproxy/kubeconfig.conf"

    def checksum(resources: Resources) -> str:
        metadata = daemon_set(resources)["spec"]["template"]["metadata"]
        return str(metadata["annotations"]["checksum/config"])

    assert checksum(rendered) == render_daemonset["checksum"](config_of(rendered))
    assert checksum(rendered) != checksum(chart())


@pytest.mark.parametrize(
    "values",
    [
        {"imagee": {}},
        {"image": {"repository": "x", "digest": "latest"}},
        {"apiServer": "10.0.0.1:6443"},
        {"placement": "canary"},
        {"architectures": []},
        {"podMonitor": {"interval": "often"}},
    ],
    ids=", ".join,
)
def test_a_wrong_value_is_refused(chart: Callable[..., Resources], values: dict[str, Any]) -> None:
    helm = pytest.importorskip("helm_python")
    with pytest.raises(helm.HelmValuesError):
        chart(**values)
