"""deploy/monitoring: the agent serves every metric named there, and every alert has a runbook.

The rules themselves are run by Prometheus' own promtool, with series that must and must not fire.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
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
    panel["title"]: target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
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
    r"\b(?:(?:sliceproxy|kubeproxy|rest_client|kube|node)_[a-z0-9_]+|up)\b(?=[ {\[)])"
)
PROMTOOL = shutil.which("promtool") or str(ROOT / "build/prometheus/usr/bin/promtool")


def served() -> set[str]:
    """The names in what the agent answers at /metrics."""
    metrics = Metrics("0.2.0")
    counts = FrontendCounts("shop", "web", "http", "cluster-ip", 1, {"no_endpoints": 1}, {"x": 1})
    metrics.frontends_from(lambda: [counts], 10)
    metrics.watches_from(lambda: WATCHES)
    metrics.requested("GET", 200, "192.0.2.1:6443", 0.1)
    metrics.programmed(step({SETS[4].endpoints: 1}), 0.1, 0.1, elements={SETS[4].endpoints: 1})
    metrics.tables_changed([build(Layout(4))])
    text = metrics.text().decode()
    return set(re.findall(r"^([a-z_]+)(?:\{| )", text, re.MULTILINE))


@pytest.mark.parametrize("subject", EXPRESSIONS)
def test_every_metric_is_served(subject: str) -> None:
    named = set(METRIC.findall(EXPRESSIONS[subject] + " "))
    assert named
    assert named - set().union(*OTHERS.values()) <= served()


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
