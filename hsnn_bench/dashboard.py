"""The Grafana dashboard of docker/grafana: its queries, and a picture of them drawn by matplotlib.

Grafana itself comes from none of the registries that this project installs from, so the picture is ours: the same
panels, titles and queries over a real Prometheus, without Grafana's looks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .prometheus import Series

FILE = Path(__file__).parents[1] / "docker" / "grafana" / "dashboards" / "hsnn.json"
_COLUMNS = 24  # of Grafana's grid
_LEGEND = re.compile(r"{{\s*(\w+)\s*}}")
_COLOURS = ["#2a78b5", "#d1622b", "#3d9950", "#8c5fa8", "#c23b52", "#7a7a7a", "#b8962e", "#2b9fa3"]


@dataclass(frozen=True)
class Query:
    """A PromQL expression of a panel, and how its series are named: "layer {{layer}}"."""

    expression: str
    legend: str

    def name(self, labels: Mapping[str, str]) -> str:
        """What a series with these labels is called."""
        return _LEGEND.sub(lambda match: labels.get(match.group(1), ""), self.legend)


@dataclass(frozen=True)
class Panel:
    """``kind``: "stat" (one number) or "timeseries"; ``place``: x, y, w, h in a grid of 24 columns; ``bounds``: of the
    values, None where open."""

    title: str
    kind: str
    unit: str
    place: tuple[int, int, int, int]
    bounds: tuple[float | None, float | None]
    queries: tuple[Query, ...]


def panels(rate_interval: str, file: Path = FILE) -> list[Panel]:
    """The dashboard's panels for all servers; ``rate_interval``: what Grafana would put for $__rate_interval, "10s"."""
    found = []
    for panel in json.loads(file.read_text())["panels"]:
        defaults, grid = panel["fieldConfig"]["defaults"], panel["gridPos"]
        queries = [
            Query(_filled(target["expr"], rate_interval), target["legendFormat"])
            for target in panel["targets"]
        ]
        found.append(
            Panel(
                panel["title"], panel["type"], defaults["unit"],
                (grid["x"], grid["y"], grid["w"], grid["h"]),
                (defaults.get("min"), defaults.get("max")), tuple(queries),
            )
        )  # fmt: skip
    return found


def draw(ask: Callable[[str], Sequence[Series]], shown: Sequence[Panel], path: Path, caption: str) -> None:
    """Draw the panels as they stand in the dashboard. ``ask``: gives an expression's series over the time to show."""
    from matplotlib.figure import Figure

    height = max(y + h for _, y, _, h in (panel.place for panel in shown))
    figure = Figure(figsize=(16, 0.36 * height + 0.5), dpi=100, facecolor="white")
    margin = 0.5 / (0.36 * height + 0.5)
    for panel in shown:
        x, y, w, h = panel.place
        space = (x / _COLUMNS, (1 - margin) * (1 - (y + h) / height), w / _COLUMNS, (1 - margin) * h / height)
        series = [(query.name(one.labels), one) for query in panel.queries for one in ask(query.expression)]
        if panel.kind == "stat":
            _draw_number(figure, space, panel, series[0][1].values[-1] if series else math.nan)
        else:
            _draw_series(figure, space, panel, series)
    figure.text(0.01, 1 - 0.6 * margin, caption, fontsize=10, color="#444444", va="center")
    figure.savefig(path)


def _filled(expression: str, rate_interval: str) -> str:
    filled = expression.replace("$__rate_interval", rate_interval).replace("$instance", ".*")
    assert "$" not in filled, f"{expression}: a variable of Grafana's that is not known here"
    return filled


def _draw_number(figure: Any, space: tuple[float, ...], panel: Panel, value: float) -> None:
    x, y, w, h = space
    figure.text(x + w / 2, y + 0.75 * h, panel.title, ha="center", fontsize=10, color="#444444")
    figure.text(x + w / 2, y + 0.3 * h, _text(value, panel.unit), ha="center", fontsize=20, color="#1f5f8b")


def _draw_series(
    figure: Any, space: tuple[float, ...], panel: Panel, series: Sequence[tuple[str, Series]]
) -> None:
    from matplotlib.dates import DateFormatter
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    x, y, w, h = space
    axes = figure.add_axes((x + 0.045, y + 0.22 * h, w - 0.06, 0.62 * h))
    for number, (name, one) in enumerate(series):
        times = [datetime.fromtimestamp(at, UTC) for at in one.times]
        axes.plot(times, list(one.values), label=name, linewidth=1.2, color=_COLOURS[number % len(_COLOURS)])
    axes.set_title(panel.title, fontsize=10, color="#222222", loc="left")
    if not any(value for _, one in series for value in one.values):
        axes.set_ylim(0, 1)  # nothing happened, which must not look like a scale of thousandths
    low, high = panel.bounds
    if low is not None:
        axes.set_ylim(bottom=low)
    if high is not None:
        axes.set_ylim(top=high)
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value, panel.unit)))
    axes.tick_params(labelsize=7, colors="#555555")
    axes.grid(color="#e5e5e5", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(series) > 1 or (series and series[0][0]):
        columns = 2 if max(len(name) for name, _ in series) > 14 else 4
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, frameon=False)


def _text(value: float, unit: str) -> str:
    """A value as a person reads it, in the panel's unit."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if unit == "s":
        if abs(value) >= 120:
            return f"{value / 3600:.1f} h" if value >= 7200 else f"{value / 60:.1f} min"
        return f"{value:.3g} s" if abs(value) >= 1 else f"{1000 * value:.3g} ms"
    suffix = {"reqps": "/s", "ops": "/s"}.get(unit, "")
    return f"{value:,.0f}{suffix}" if abs(value) >= 100 else f"{value:.3g}{suffix}"
