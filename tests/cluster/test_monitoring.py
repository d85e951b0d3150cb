"""Dashboard, alerts and scrape configurations: what they ask for is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.ray.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
# Of Ray's C++ side, which has no list of its own; seen on a node's metrics port (Ray 2.60).
OF_RAY = {"ray_object_store_memory": {"Location"}}
EVERYWHERE = {"run", "le", "instance"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((MONITORING / "dashboard.json").read_text())


@pytest.fixture(scope="module")
def alerts() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]


def exported() -> dict[str, set[str]]:
    """Names that Prometheus sees, with their tags."""
    import ray

    # As text: importing it needs all of ray[default].
    agent = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    nodes = re.findall(r'"(node_\w+)": Gauge\(', agent.read_text())
    assert len(nodes) > 10
    ours = {name: {*metric.tags} for metric in METRICS for name in metric.exported}
    return {**ours, **{f"ray_{name}": {"GpuIndex"} for name in nodes}, **OF_RAY}


def queries(dashboard: dict[str, Any], alerts: list[dict[str, Any]]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query")
    yield from (rule["expr"] for rule in alerts)


def test_every_query_names_metrics_and_tags_that_exist(dashboard: dict[str, Any], alerts: list[dict[str, Any]]) -> None:
    known, seen = exported(), set()
    for query in queries(dashboard, alerts):
        names = re.findall(r"\bray_\w+", query)
        assert names, query
        for name in names:
            assert name in known, (name, query)
        tags = set().union(*(known[name] for name in names)) | EVERYWHERE
        asked = {tag for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for tag in re.split(r",\s*", group)}
        asked |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
        assert asked <= tags, (asked - tags, query)
        for stage in re.findall(r'stage=~?"([^"]*)"', query):
            assert set(stage.split("|")) <= {"index", "sample", "judge", "write", "commit"}
        seen.update(names)
    ours = {metric.name for metric in METRICS if not set(metric.exported) & seen}
    assert not ours, f"nobody looks at {ours}"


def test_queries_are_promql(dashboard: dict[str, Any], alerts: list[dict[str, Any]]) -> None:
    parser = pytest.importorskip("promql_parser")
    for query in queries(dashboard, alerts):
        if not query.startswith("label_values("):
            parser.parse(query.replace("$__rate_interval", "5m").replace("$run", ".*"))


def test_the_dashboard_can_be_imported_anywhere(dashboard: dict[str, Any]) -> None:
    """Its data source is a variable; panels have their own ids and places."""
    kinds = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert kinds == {"datasource": "datasource", "run": "query"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            for one in (panel, *panel["targets"]):
                assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_alert_stands_in_the_runbook(alerts: list[dict[str, Any]]) -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text()
    assert len(alerts) >= 5
    for rule in alerts:
        assert f"`{rule['alert']}`" in runbook
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= {"run", "worker", "instance"}


def test_every_metric_stands_in_the_runbook() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text()
    for metric in METRICS:
        assert f"`{metric.name}`" in runbook, metric.name


def test_pods_have_the_port_that_is_monitored() -> None:
    monitor = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    cluster = yaml.safe_load((ROOT / "cluster" / "kuberay" / "scan.yaml").read_text())["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
        assert ports[endpoint["port"]] == group["rayStartParams"]["metrics-export-port"]


def test_prometheus_finds_the_nodes_where_ray_lists_them() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
    for file in config["rule_files"]:
        assert (MONITORING / file).is_file()
