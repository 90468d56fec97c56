"""deploy/monitoring: the agent serves every metric named there, and every alert has a runbook.

The rules themselves are run by Prometheus' own promtool, with series that must and must not fire.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.serve.metrics import Metrics
from rules.counts import FrontendCounts
from rules.tables import SETS, Layout, build
from tests.unit.test_metrics import WATCHES, step

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in RULES} | {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
OTHERS = {
    "kube-state-metrics": {
        "kube_daemonset_status_desired_number_scheduled",
        "kube_daemonset_status_number_available",
    },
    "node_exporter": {"node_nf_conntrack_entries", "node_nf_conntrack_entries_limit"},
    "Prometheus": {"up"},
}
METRIC = re.compile(
    r"\b(?:(?:sliceproxy|kubeproxy|rest_client|process|kube|node)_[a-z0-9_]+|up)\b(?=[ {\[)])"
)
MIXIN = {
    "Up": ("up", {}),
    "Rules Sync Rate": ("kubeproxy_sync_proxy_rules_duration_seconds_count", {}),
    "Rule Sync Latency": ("kubeproxy_sync_proxy_rules_duration_seconds_bucket", {}),
    "Network Programming Rate": ("kubeproxy_network_programming_duration_seconds_count", {}),
    "Network Programming Latency": ("kubeproxy_network_programming_duration_seconds_bucket", {}),
    "Kube API Request Rate": ("rest_client_requests_total", {"code": "2.."}),
    "Post Request Latency": ("rest_client_request_duration_seconds_bucket", {"verb": "POST"}),
    "Get Request Latency": ("rest_client_request_duration_seconds_bucket", {"verb": "GET"}),
    "Memory": ("process_resident_memory_bytes", {}),
    "CPU usage": ("process_cpu_seconds_total", {}),
    "Goroutines": ("go_goroutines", {}),
}
"""The panels of kubernetes-mixin's dashboard for kube-proxy (dashboards/proxy.libsonnet), each with
the metric and the labels that it selects besides `job`, `cluster` and `instance`."""
PROMTOOL = shutil.which("promtool") or str(ROOT / "build/prometheus/usr/bin/promtool")


def scrape() -> str:
    """What an agent that has done a bit of everything answers at /metrics."""
    metrics = Metrics("0.2.0")
    counts = FrontendCounts("shop", "web", "http", "cluster-ip", 1, {"no_endpoints": 1}, {"x": 1})
    metrics.frontends_from(lambda: [counts], 10)
    metrics.watches_from(lambda: WATCHES)
    metrics.requested("GET", 200, "192.0.2.1:6443", 0.1)
    metrics.programmed(step({SETS[4].endpoints: 1}), 0.1, 0.1, elements={SETS[4].endpoints: 1})
    metrics.requested("POST", 201, "192.0.2.1:6443", 0.1)
    metrics.tables_changed([build(Layout(4))], {4: True})
    metrics.local_endpoints_missing({(4, "internal"): 1})
    metrics.flows_deleted(4, 1, 0.1)
    metrics.failed()
    return metrics.text().decode()


def served() -> set[str]:
    """The names in what the agent answers at /metrics."""
    return set(re.findall(r"^([a-z_]+)(?:\{| )", scrape(), re.MULTILINE))


@pytest.mark.parametrize("subject", EXPRESSIONS)
def test_every_metric_is_served(subject: str) -> None:
    named = set(METRIC.findall(EXPRESSIONS[subject] + " "))
    assert named
    assert named - set().union(*OTHERS.values()) <= served()


@pytest.mark.parametrize("panel", MIXIN)
def test_the_dashboard_for_kube_proxy_has_data_in_every_panel_it_can(panel: str) -> None:
    """All but Go's goroutines; `up` is Prometheus' own. POST needs --post-events."""
    metric, wanted = MIXIN[panel]
    samples = re.findall(rf"^{metric}(?:\{{(.*)\}})? [^ ]+$", scrape(), re.MULTILINE)
    labels = [dict(re.findall(r'(\w+)="([^"]*)"', sample)) for sample in samples]
    found = [
        one for one in labels if all(re.fullmatch(v, one.get(k, "")) for k, v in wanted.items())
    ]
    assert bool(found) == (panel not in ("Up", "Goroutines"))


def test_every_metric_of_ours_is_on_the_dashboard_or_in_an_alert() -> None:
    ours = {re.sub(r"_(bucket|count|sum)$", "", n) for n in served() if n.startswith("sliceproxy_")}
    named = set(METRIC.findall(" ".join([*EXPRESSIONS.values(), ""])))
    assert ours - {re.sub(r"_bucket$", "", n) for n in named} == set()


def test_the_prometheus_operators_resource_has_the_same_rules() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "render-alerts", "--check"], check=False
    )
    assert done.returncode == 0, "run tools/render-alerts"
    place = ROOT / "deploy" / "components" / "alerts" / "prometheusrule.yaml"
    resource = yaml.safe_load(place.read_text())
    assert (resource["apiVersion"], resource["kind"]) == (
        *("monitoring.coreos.com/v1", "PrometheusRule"),
    )
    assert resource["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())


def test_every_map_that_an_alert_names_exists() -> None:
    (expression,) = [e for e in EXPRESSIONS.values() if 'map=~"' in e]
    match = re.search(r'map=~"([^"]+)"', expression)
    assert match
    maps = {owner.name for owner in vars(SETS[4]).values() if hasattr(owner, "is_map")}
    assert set(match[1].split("|")) <= maps


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_severity_a_summary_and_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert f"\n## {rule['alert']}\n" in (ROOT / page).read_text()
    assert anchor == rule["alert"].lower()


def test_every_runbook_and_every_alert_in_the_documents_exists() -> None:
    alerts = {rule["alert"] for rule in RULES}
    pages = [ROOT / "docs" / name for name in ("runbooks.md", "migrate.md")]
    named = {
        name for page in pages for name in re.findall(r"\bSliceproxy[A-Z]\w+", page.read_text())
    }
    assert named - {"SliceproxyConfiguration"} <= alerts
    sections = re.findall(r"^## (\w+)$", pages[0].read_text(), re.MULTILINE)
    assert set(sections) == alerts


def test_the_dashboard_is_laid_out_without_overlap() -> None:
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.mark.skipif(not shutil.which(PROMTOOL), reason="needs promtool (tools/need-test-tools)")
@pytest.mark.parametrize(
    "command", [("check", "rules", "rules.yaml"), ("test", "rules", "rules.test.yaml")]
)
def test_promtool(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [PROMTOOL, *command], cwd=MONITORING, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire_and_not_to_fire() -> None:
    cases = [
        case
        for test in yaml.safe_load((MONITORING / "rules.test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    for expected in (True, False):
        assert {c["alertname"] for c in cases if bool(c["exp_alerts"]) is expected} == {
            rule["alert"] for rule in RULES
        }
