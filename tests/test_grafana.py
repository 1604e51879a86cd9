import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aurora import grafana, metrics_page
from aurora.alarms import KINDS, UNSAVED
from aurora.metrics import METRICS
from serve.exporter import PrometheusExporter
from serve.merged_metrics import LABEL, OPEN, REQUESTS, ROUTER, UP
from serve.vitals import LATENCIES

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "aurora" / "deploy"
EVERYWHERE = {"instance", "job", LABEL}  # Prometheus adds two, a Router its own
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = [pytest.param(p, id=f"{row.title}: {p.title}") for row in grafana.ROWS for p in row.panels]
SUFFIXES = {"_gauge_cls": ("",), "_counter_cls": ("_total",), "_histogram_cls": ("_bucket", "_sum", "_count")}


def exported():
    """Name -> labels of the samples that Aurora's exporter gives, as Prometheus reads them."""
    registry = CollectorRegistry()
    exporter = PrometheusExporter(registry)
    for name, metric in METRICS.items():
        if metric.kind == "gauge":
            exporter.set(name, 0, **dict.fromkeys(metric.labels, "0"))
        else:
            exporter.inc(name, dict.fromkeys(metric.labels, "0"))
    REQUESTS.labels("0", "answered")
    UP.labels("0"), OPEN.labels("0")
    page = generate_latest(registry) + generate_latest(ROUTER)
    families = text_string_to_metric_families(page.decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def vllm_names():
    """The same of vLLM, read from its sources: importing and starting it takes minutes."""
    directory = Path(find_spec("vllm").origin).parent / "v1"
    names = {}
    for file in ("metrics/loggers.py", "spec_decode/metrics.py"):
        tree = ast.parse((directory / file).read_text())
        constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        kinds = {
            keyword.value.value: node.func.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SUFFIXES
            for keyword in node.keywords
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
        }
        for name in constants:
            if re.fullmatch(r"vllm:\w+", name):
                for suffix in SUFFIXES[kinds.get(name, "_counter_cls")]:  # some counters are made in a loop
                    labels = {"model_name", "engine"} | ({"le"} if suffix == "_bucket" else set())
                    names[name.removesuffix("_total") + suffix if suffix == "_total" else name + suffix] = labels
    return names


@pytest.fixture(scope="module")
def known():
    prometheus = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}
    return exported() | vllm_names() | prometheus


def walk(node):
    """An expression and all that it is made of."""
    yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        child = getattr(node, name, None)
        if child is not None:
            yield from walk(child)
    for child in getattr(node, "args", None) or []:
        yield from walk(child)


def check(expression, known):
    """Raise when an expression is not PromQL, or asks for what no server exposes."""
    tree = promql_parser.parse(expression.replace("$__rate_interval", "5m"))
    selectors = [node for node in walk(tree) if isinstance(node, promql_parser.VectorSelector)]
    assert selectors, expression
    found = set()
    for selector in selectors:
        assert selector.name in known, f"{selector.name} in {expression}"
        labels = known[selector.name] | EVERYWHERE
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels, expression
        found |= labels
    for grouped in re.findall(r"\b(?:by|on|ignoring) \(([\w, ]+)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= found, expression
    return found


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_asks_for_what_a_server_exposes(panel, known):
    for legend, expression in panel.targets.items():
        labels = check(expression, known)
        assert set(re.findall(r"{{(\w+)}}", legend)) <= labels


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_asks_for_what_a_server_exposes_and_names_its_remedy(rule, known):
    check(rule["expr"], known)
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    assert re.fullmatch(r"\d+[smh]", rule["for"])
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{anchor(rule)}"
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    asked = re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"]))
    assert set(asked) <= {"instance"}, "all that is left after every rule's aggregation"


def test_wrong_names_and_labels_are_noticed(known):
    for wrong in ("aurora_nothing_total", 'aurora_steps_total{version="1"}', "sum by (k) (aurora_drift)"):
        with pytest.raises(AssertionError):
            check(wrong, known)
    with pytest.raises(ValueError, match="unclosed"):
        check("rate(aurora_steps_total[5m]", known)


def test_every_alarm_has_a_rule():
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    told = {kind for rule in RULES for kind in re.findall(r'aurora_alarm{kind="(\w+)"}', rule["expr"])}
    assert told == {*KINDS, UNSAVED}


def test_the_runbook_knows_every_alert():
    headings = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE))
    assert set(map(anchor, RULES)) - headings == set()


def anchor(rule):
    """The section of the runbook: of the same name, but for errors of a server, which is one that is going down."""
    return "endpoint_down" if rule["alert"] == "server_errors" else rule["alert"]


def test_the_documentation_lists_the_alerts():
    text = (ROOT / "docs" / "dashboards.md").read_text()
    for rule in RULES:
        severity, description = rule["labels"]["severity"], rule["annotations"]["description"]
        assert f"| `{rule['alert']}` | {severity} | {rule['for']} | {description} |" in text


def test_the_documentation_lists_the_panels():
    text = (ROOT / "docs" / "dashboards.md").read_text()
    for row in grafana.ROWS:
        assert all(panel.text.endswith(".") for panel in row.panels)
        assert f"| {row.title} | {'; '.join(panel.title for panel in row.panels)} |" in text


def test_the_dashboard_and_the_page_of_metrics_are_current():
    assert (DEPLOY / "grafana" / "aurora.json").read_text() == grafana.as_json(), "aurora dashboard grafana"
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page.page(), "aurora dashboard metrics"


def test_vllms_metrics_that_are_documented_or_read_exist(known):
    histograms = {f"{name}_bucket" for name in (*metrics_page.VLLM, *LATENCIES.values()) if name.endswith("_seconds")}
    plain = {name for name in metrics_page.VLLM if not name.endswith("_seconds")}
    assert (histograms | plain) - known.keys() == set()


def test_every_metric_of_the_table_is_exported():
    assert set(METRICS) - exported().keys() == set()


def test_panels_lie_side_by_side():
    taken = set()
    for panel in grafana.dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        taken |= cells
    assert max(x for x, _ in taken) == 23


def test_compose_mounts_what_is_there_and_pins_what_it_runs():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), volume
    key = compose["secrets"]["aurora_scrape_key"]["file"]
    assert (DEPLOY / re.search(r":-(.*)}", key)[1]).read_text() == ""
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = prometheus["scrape_configs"]
    assert scrape["job_name"] == "aurora"
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/aurora_scrape_key"
    for file in (*prometheus["rule_files"], *scrape["file_sd_configs"][0]["files"]):
        assert (DEPLOY / "prometheus" / file).exists()
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"].endswith(":9090")
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/aurora.yml").read_text())["providers"]
    mounted = [v.split(":")[1] for v in compose["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/aurora.json" in mounted
