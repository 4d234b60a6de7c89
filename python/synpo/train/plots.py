"""The two pictures of a preference run, for one run or several side by side, from their logs.

rewards            mean log-likelihood of a chosen and of a rejected token over the steps
gradient balance   norm of the loss gradient that flows through the chosen side and through the rejected side
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from synpo.records import atomic_path

CHOSEN, REJECTED = "#1b7f4d", "#c0392b"
Rows = Sequence[Mapping[str, Any]]


def plot_rewards(runs: Mapping[str, Rows], path: str | os.PathLike[str]) -> Path:
    """Write the log-likelihood curves of named runs (rows of `diagnostics.read_log`) as a PNG; returns its path.

    Raises ValueError when there is no run or a run has no step.
    """
    return _plot(
        runs,
        {"chosen": "synpo/chosen_logp", "rejected": "synpo/rejected_logp"},
        "mean log-likelihood of a token (nats)",
        "Likelihood of chosen and rejected answers",
        path,
        shared=True,
    )


def plot_gradient_balance(runs: Mapping[str, Rows], path: str | os.PathLike[str]) -> Path:
    """Write the gradient norms through either side of named runs as a PNG; arguments as `plot_rewards`.

    The norms are ‖∂l/∂logp‖₂ over the tokens of a completion, mean over pairs; each objective has a scale of its own.
    """
    return _plot(
        runs,
        {"chosen side": "synpo/grad_balance/chosen", "rejected side": "synpo/grad_balance/rejected"},
        "‖∂loss/∂log-probability‖ of a pair",
        "Gradient through the chosen and the rejected side",
        path,
        shared=False,
    )


def _plot(
    runs: Mapping[str, Rows],
    lines: Mapping[str, str],
    label: str,
    title: str,
    path: str | os.PathLike[str],
    *,
    shared: bool,
) -> Path:
    """One panel a run, two lines a panel: the mean of neighbouring steps over the steps themselves, drawn faintly."""
    empty = [name for name, rows in runs.items() if not rows]
    if not runs or empty:
        raise ValueError(f"nothing to plot: {'no run' if not runs else 'no training step in ' + ', '.join(empty)}")
    figure = Figure(figsize=(4.2 * len(runs) + 0.8, 3.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=shared, squeeze=False)[0]
    for panel, (name, rows) in zip(panels, runs.items()):
        steps = [row["step"] for row in rows]
        for (side, key), colour in zip(lines.items(), (CHOSEN, REJECTED)):
            values = [row[key] for row in rows]
            panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            panel.plot(steps, _smooth(values), color=colour, label=side, marker="o" if len(rows) == 1 else None)
        panel.set_title(name)
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.2)
        if not shared:
            panel.set_ylim(bottom=0)
    panels[0].set_ylabel(label)
    panels[-1].legend(frameon=False)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return Path(path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twelfth of the run."""
    half, count = len(values) // 24, len(values)
    sums = [0.0, *accumulate(values)]
    bounds = ((max(0, i - half), min(count, i + half + 1)) for i in range(count))
    return [(sums[end] - sums[start]) / (end - start) for start, end in bounds]
