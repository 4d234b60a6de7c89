"""Pictures of the report as SVG in the page's own colours: charts of intervals, and curves over training steps.

Text stays text and every colour is a class of the style sheet, so pictures follow the reader's light or dark and can be
printed and searched. A panel is drawn about as wide as a telephone; the page sets panels beside each other where there is room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from synpo.report.table import Chart

WIDTH = 340  # of a picture's own units, a pixel each where the card is as wide
LETTER = 7  # about how wide one is
POINTS = 240  # a line has no more
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curves:
    """One quantity over the steps of several runs, a panel a run.

    title, caption  above and below, in words; label: what the upright axis shows
    panels          run → line → (faint, bold): points (step, value) as measured, and smoothed
    shared          all panels have one scale; else each has its own, from 0

    Lines are told apart by their place: the first is of the chosen side, the second (dashed) of the rejected side.
    """

    title: str
    caption: str
    label: str
    panels: Mapping[str, Mapping[str, tuple[Points, Points]]]
    shared: bool


def tone(name: str, systems: Sequence[str]) -> str:
    """CSS class of a system's colour, the same all over a page; "" for what is no system."""
    return f"s{list(systems).index(name) % 6}" if name in systems else ""


def chart_html(chart: Chart, systems: Sequence[str] = ()) -> str:
    """Dots with whiskers on one scale that spans all of them."""
    names = [_short(name) for name, _, _ in chart.rows]
    said = [_number(value, "+.1f" if chart.zero else ".1f") for _, value, _ in chart.rows]
    left, right, step = 12 + LETTER * max(map(len, names)), 16 + LETTER * max(map(len, said)), 30
    ends = [end for _, value, i in chart.rows for end in ((value,) if i is None else (value, i.low, i.high))]
    low, high = _widened([*ends, 0.0] if chart.zero else ends)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - right)

    height = step * len(chart.rows) + 26
    parts = []
    for tick in _ticks(low, high):
        kind = "zero" if chart.zero and tick == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 22}"/>'
            f'<text class="soft" x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{_number(tick)}</text>'
        )
    for r, (name, (system, value, interval)) in enumerate(zip(names, chart.rows)):
        y = step * r + 4 + step / 2
        parts.append(f'<text x="0" y="{y + 4:.0f}">{escape(name)}</text>')
        parts.append(f'<g class="mark {tone(system, systems)}">')
        if interval is not None:
            parts.append(f'<line x1="{x(interval.low):.1f}" x2="{x(interval.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="5"/></g>')
        parts.append(f'<text x="{WIDTH}" y="{y + 4:.0f}" text-anchor="end">{said[r]}</text>')
    return f'<figure class="card"><h3>{escape(chart.title)}</h3>{_svg(height, chart.title, parts)}</figure>'


def curves_html(curves: Curves, systems: Sequence[str] = ()) -> str:
    """A card with a panel a run, and one key for all of them."""
    values = {
        name: [v for pair in lines.values() for points in pair for _, v in points if math.isfinite(v)]
        for name, lines in curves.panels.items()
    }
    together = [value for one in values.values() for value in one]
    panels, keys = [], list(dict.fromkeys(line for lines in curves.panels.values() for line in lines))
    for name, lines in curves.panels.items():
        own = [0.0, *values[name]]
        bounds = _widened(together) if curves.shared else (min(own), _widened(own)[1])
        title = f'<h4 class="{tone(name, systems)}">{escape(name)}</h4>' if len(curves.panels) > 1 else ""
        panels.append(f"<div>{title}{_panel(lines, bounds, f'{curves.title}, {name}')}</div>")
    key = "".join(f'<span class="side{n}">{escape(name)}</span>' for n, name in enumerate(keys))
    return (
        f'<figure class="card curves"><h3>{escape(curves.title)}</h3><p class="note">{escape(curves.label)}</p>'
        f'<p class="sides">{key}</p><div class="triple">{"".join(panels)}</div>'
        f"<figcaption>{escape(curves.caption)}</figcaption></figure>"
    )


def _panel(lines: Mapping[str, tuple[Points, Points]], bounds: tuple[float, float], title: str) -> str:
    low, high = bounds
    right, top, bottom, height = 8, 6, 38, 210
    left = 16 + LETTER * max((len(_number(tick)) for tick in _ticks(low, high)), default=0)
    steps = [step for pair in lines.values() for points in pair for step, _ in points] or [0.0]
    first, last = min(steps), max(steps)
    span = (last - first) or 1.0

    def x(step: float) -> float:
        return left + (step - first) / span * (WIDTH - left - right)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    parts = []
    for tick in _ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text class="soft" x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in _ticks(first, last, whole=True):
        parts.append(f'<text class="soft" x="{x(tick):.1f}" y="{height - 21}" text-anchor="middle">{tick:.0f}</text>')
    parts.append(f'<text class="soft" x="{(left + WIDTH) / 2:.0f}" y="{height - 4}" text-anchor="middle">step</text>')
    for n, (faint, bold) in enumerate(lines.values()):
        for kind, points in (("faint", faint), ("bold", bold)):
            drawn = [(x(step), y(value)) for step, value in _thinned(points)]
            if len(drawn) == 1:
                parts.append(f'<circle class="side{n}" cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="3"/>')
            elif drawn:
                path = " ".join(f"{a:.1f},{b:.1f}" for a, b in drawn)
                parts.append(f'<polyline class="{kind} side{n}" points="{path}"/>')
    return _svg(height, title, parts)


def _svg(height: float, title: str, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most POINTS of them, each the mean of its neighbours; what is not finite is left out."""
    there = [(step, value) for step, value in points if math.isfinite(value)]
    size = -(-len(there) // POINTS)
    groups = [there[i : i + size] for i in range(0, len(there), size)] if there else []
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _widened(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest of the values with a little air around them."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to six round numbers between low and high; `whole`: integers, fewer if there are not as many."""
    span = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(span)) if span > 0 else 1.0
    unit = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= span)
    if whole:
        unit = float(math.ceil(unit))
    return [round(k * unit, 10) for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def _number(value: float, form: str = "g") -> str:
    return format(value, form).replace("-", "−")


def _short(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"
