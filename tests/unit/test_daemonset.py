"""daemonset.yaml: valid for Kubernetes, and neither more nor less than the agent needs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from agent.cli.client import SOCKET
from agent.config import file as config_file
from agent.config.settings import Settings
from agent.kernel.sysctl import ConntrackSettings
from agent.log import configure
from agent.sources.kubernetes.connection import connect
from agent.sources.kubernetes.follower import ClusterFollower
from rules.events import Event, Synced
from rules.options import DetectLocalMode
from tests.cluster.apiserver import ApiServer
from tests.confinement import CONFINED

ROOT = Path(__file__).parents[2]
DOCUMENTS: list[dict[str, Any]] = list(
    yaml.safe_load_all((ROOT / "daemonset.yaml").read_text(encoding="utf-8"))
)
OF_KIND: Mapping[str, dict[str, Any]] = {d["kind"]: d for d in DOCUMENTS}
POD = OF_KIND["DaemonSet"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
DATA: Mapping[str, str] = OF_KIND["ConfigMap"]["data"]


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.34", "1.35", "1.36"])
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d["kind"])
def test_valid_for_kubernetes(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_each_kind_once_and_named_alike() -> None:
    assert len(OF_KIND) == len(DOCUMENTS)
    assert {d["metadata"]["name"] for d in DOCUMENTS} == {"sliceproxy"}
    namespaces = {k: d["metadata"].get("namespace") for k, d in OF_KIND.items()}
    assert namespaces == {
        "ServiceAccount": "kube-system",
        "ClusterRole": None,
        "ClusterRoleBinding": None,
        "ConfigMap": "kube-system",
        "DaemonSet": "kube-system",
    }
    (subject,) = OF_KIND["ClusterRoleBinding"]["subjects"]
    assert (subject["kind"], subject["namespace"]) == ("ServiceAccount", "kube-system")
    assert POD["serviceAccountName"] == "sliceproxy"


def asked(*, streaming: bool) -> set[tuple[str, str, str]]:
    """What the agent asks an API server for: group, resource and verb.

    From its start until every resource has been listed and is watched.
    """
    complete = threading.Event()

    def put(events: list[Event]) -> None:
        if any(isinstance(event, Synced) for event in events):
            complete.set()

    with ApiServer(streaming=streaming) as server:
        follower = ClusterFollower(
            connect(server=server.url),
            "node-1",
            "",
            put,
            configure("error"),
            failed=lambda *_: None,
        )
        follower.start()
        try:
            assert complete.wait(20)
            server.wait_for(
                lambda: server.watching("services", "endpointslices", "nodes", "servicecidrs")
            )
            # after a watch that broke, it asks in other ways
            server.abort()
            server.wait_for(
                lambda: server.watching("services", "endpointslices", "nodes", "servicecidrs")
            )
        finally:
            follower.stop()
        return {(seen.group, seen.resource, seen.verb) for seen in server.seen}


def test_rbac_is_just_what_the_agent_asks_for() -> None:
    """Of new API servers, which stream lists, and of older ones."""
    allowed = {
        (group, resource, verb)
        for rule in OF_KIND["ClusterRole"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == asked(streaming=True) | asked(streaming=False)


def test_no_rule_says_more_than_its_verbs() -> None:
    for rule in OF_KIND["ClusterRole"]["rules"]:
        assert set(rule) == {"apiGroups", "resources", "verbs"}
        assert "*" not in (*rule["apiGroups"], *rule["resources"], *rule["verbs"])


def test_confinement_is_that_of_the_container_tests() -> None:
    context = CONTAINER["securityContext"]
    assert context["capabilities"] == {"drop": CONFINED["cap_drop"], "add": CONFINED["cap_add"]}
    assert context["readOnlyRootFilesystem"] is CONFINED["read_only"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert CONFINED["security_opt"] == ["no-new-privileges"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == CONFINED["user"]
    assert not context["privileged"]
    (init,) = POD["initContainers"]
    assert init["securityContext"]["privileged"], "the one container that writes /proc/sys"
    assert init["args"] == ["init", *CONTAINER["args"][1:3]]
    assert "hostPID" not in POD
    assert not any("hostPath" in volume for volume in POD["volumes"])


def test_configuration_is_one_that_the_agent_takes() -> None:
    """Without a warning, and listening where the probes ask."""
    read = config_file.parse(DATA["config.conf"], "config.conf")
    assert not read.without_meaning
    settings = Settings(**read.chosen)
    assert settings.options().detect_local is DetectLocalMode.NODE_CIDR
    # the init container sets what the agent, which cannot write /proc/sys, expects
    assert settings.conntrack() == ConntrackSettings()
    mount, run = CONTAINER["volumeMounts"]
    assert run["mountPath"] == "/run/sliceproxy"
    assert settings.kubeconfig == f"{mount['mountPath']}/kubeconfig.conf"
    config = f"{mount['mountPath']}/config.conf"
    assert CONTAINER["args"] == ["run", "--config", config, f"--api-socket={SOCKET}"]
    assert SOCKET.startswith(f"{run['mountPath']}/")
    (port,) = CONTAINER["ports"]
    healthz = settings.healthz()
    assert healthz
    assert healthz.port == port["containerPort"]
    asked = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for probe, path in asked.items():
        assert CONTAINER[probe]["httpGet"] == {"path": path, "port": port["name"]}


def test_kubeconfig_names_no_service(tmp_path: Path) -> None:
    """The way to the API server may not lead through what this agent provides."""
    (tmp_path / "ca.crt").write_text("")
    (tmp_path / "token").write_text("secret")
    account = "/var/run/secrets/kubernetes.io/serviceaccount"
    file = tmp_path / "kubeconfig.conf"
    file.write_text(DATA["kubeconfig.conf"].replace(account, str(tmp_path)))
    assert connect(kubeconfig=str(file)).server == "https://CONTROL-PLANE:6443"
