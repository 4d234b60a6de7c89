"""The two pictures of a preference run, for one run or several side by side, from their logs: as PNG files and for pages.

rewards            mean log-likelihood of a chosen and of a rejected token over the steps
gradient balance   norm of the loss gradient that flows through the chosen side and through the rejected side
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from synpo.records import atomic_path
from synpo.report.draw import Curves

CHOSEN, REJECTED = "#1b7f4d", "#c0392b"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Picture:
    """What is drawn: `lines` names a value of the log for either side; `shared`: panels have one scale, else each from 0."""

    name: str
    title: str
    label: str
    caption: str
    lines: Mapping[str, str]
    shared: bool


REWARDS = Picture(
    "rewards",
    "Likelihood of chosen and rejected answers",
    "mean log-likelihood of a token (nats)",
    "An objective that lowers the rejected answer without bound pulls the chosen one down with it.",
    {"chosen": "synpo/chosen_logp", "rejected": "synpo/rejected_logp"},
    True,
)
GRADIENT_BALANCE = Picture(
    "gradient_balance",
    "Gradient through the chosen and the rejected side",
    "‖∂loss/∂log-probability‖ of a pair",  # ₂ over the tokens of a completion, mean over pairs
    "Which side the update comes from. Each objective has a scale of its own: compare the two lines, not the panels.",
    {"chosen side": "synpo/grad_balance/chosen", "rejected side": "synpo/grad_balance/rejected"},
    False,
)
PICTURES = (REWARDS, GRADIENT_BALANCE)


def plot(picture: Picture, runs: Mapping[str, Rows], folder: str | os.PathLike[str]) -> Path:
    """Write a picture of named runs (rows of `diagnostics.read_log`) as <folder>/<name>.png; returns its path.

    One panel a run, two lines a panel: the mean of neighbouring steps over the steps themselves, drawn faintly.
    Raises ValueError when there is no run or a run has no step.
    """
    _check(runs)
    figure = Figure(figsize=(4.2 * len(runs) + 0.8, 3.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=picture.shared, squeeze=False)[0]
    for panel, (name, rows) in zip(panels, runs.items()):
        steps = [row["step"] for row in rows]
        for (side, key), colour in zip(picture.lines.items(), (CHOSEN, REJECTED)):
            values = [row[key] for row in rows]
            panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            panel.plot(steps, _smooth(values), color=colour, label=side, marker="o" if len(rows) == 1 else None)
        panel.set_title(name)
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        panel.grid(alpha=0.2)
        if not picture.shared:
            panel.set_ylim(bottom=0)
    panels[0].set_ylabel(picture.label)
    panels[-1].legend(frameon=False)
    figure.suptitle(picture.title)
    path = Path(folder) / f"{picture.name}.png"
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return path


def curves(picture: Picture, runs: Mapping[str, Rows]) -> Curves:
    """The same for a page, which draws it in its own colours. Raises ValueError as `plot`."""
    _check(runs)
    panels = {}
    for name, rows in runs.items():
        steps = [float(row["step"]) for row in rows]
        lines = {side: [float(row[key]) for row in rows] for side, key in picture.lines.items()}
        panels[name] = {side: ([*zip(steps, v)], [*zip(steps, _smooth(v))]) for side, v in lines.items()}
    return Curves(picture.title, picture.caption, picture.label, panels, picture.shared)


def _check(runs: Mapping[str, Rows]) -> None:
    empty = [name for name, rows in runs.items() if not rows]
    if not runs or empty:
        raise ValueError(f"nothing to plot: {'no run' if not runs else 'no training step in ' + ', '.join(empty)}")


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twelfth of the run."""
    half, count = len(values) // 24, len(values)
    sums = [0.0, *accumulate(values)]
    bounds = ((max(0, i - half), min(count, i + half + 1)) for i in range(count))
    return [(sums[end] - sums[start]) / (end - start) for start, end in bounds]
