"""Panels of a Grafana dashboard, the queries that they make, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

AT = 'instance=~"$instance"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
ENGINES = "(vllm|sglang):"
"""Before the name of a series that each engine has under its own."""
TRANSFERS = ENGINES + "flowkv_"
COLUMNS, WIDTH, HEIGHT = 3, 8, 8


@dataclass(frozen=True)
class Panel:
    """One graph. ``queries`` are pairs of an expression and the legend of its lines."""

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]
    text: str = ""


@dataclass(frozen=True)
class Dashboard:
    """One file. The values of its variable ``instance`` are those of ``anchor``, a series of the feature."""

    name: str
    title: str
    anchor: str
    panels: Sequence[Panel]


def selected(series: str, *matchers: str) -> str:
    """A series, of all engines where its name begins with ``ENGINES``."""
    if series.startswith(ENGINES):
        matchers, series = (f'__name__=~"{series}"', *matchers), ""
    return f"{series}{{{','.join(matchers)}}}" if matchers else series


def grows(series: str) -> str:
    """What a series of the chosen servers grows by in a second."""
    return f"rate({selected(series, AT)}[$__rate_interval])"


def gauge(series: str, by: str = "engine") -> str:
    """The sum of a gauge by a label."""
    return f"sum by ({by}) ({series}{{{AT}}})"


def growth(series: str, by: str = "engine") -> str:
    """What a total grows by in a second, by a label."""
    return f"sum by ({by}) ({grows(series)})"


def quantile(series: str, share: float) -> str:
    """A quantile of a histogram."""
    buckets = f"sum by (le) ({grows(series + '_bucket')})"
    return f"histogram_quantile({share:g}, {buckets})"


def quantiles(title: str, unit: str, series: str, text: str = "") -> Panel:
    """The median and the 99th percentile of a histogram."""
    return Panel(title, unit, [(quantile(series, 0.5), "P50"), (quantile(series, 0.99), "P99")], text)


def per_second(title: str, unit: str, *series: str, by: str = "instance") -> Panel:
    """What counters grow by."""
    return Panel(title, unit, [(growth(name + "_total", by), _legend(name, by)) for name in series])


def _legend(series: str, by: str) -> str:
    short = series.removeprefix(TRANSFERS + "num_").removeprefix("penstock_proxy_").replace("_", " ")
    return " ".join([short, *(f"{{{{{label.strip()}}}}}" for label in by.split(","))])


def of_clients(title: str, unit: str, series: str, text: str = "") -> Panel:
    """A gauge by client."""
    return Panel(title, unit, [(gauge(series, "client"), "{{client}}")], text)


def share(part: str, whole: str, by: str) -> str:
    """What part of a total's growth another one's is."""
    return f"{growth(part, by)} / {growth(whole, by)}"


def totals(title: str, unit: str, *names: str, of: str = "penstock_slo_", text: str = "") -> Panel:
    """The growth of totals that have the first part of their names in common."""
    return Panel(title, unit, [(growth(of + name), name.replace("_", " ")) for name in names], text)


def as_json(board: Dashboard) -> str:
    """The text of a dashboard's file."""
    variables = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance",
            "label": "Server",
            "type": "query",
            "datasource": SOURCE,
            "query": f"label_values({selected(board.anchor)}, instance)",
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        },
    ]
    model = {
        "uid": f"penstock-{board.name}",
        "title": board.title,
        "tags": ["penstock"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": [_panel(number, panel) for number, panel in enumerate(board.panels)],
    }
    return json.dumps(model, indent=1) + "\n"


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {
            "x": number % COLUMNS * WIDTH,
            "y": number // COLUMNS * HEIGHT,
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }
