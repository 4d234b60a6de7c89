"""Rows of the loss benchmark as a table in the terminal, as JSON and CSV, and as bars.

python -m bench.report FILE.json ...        draw the bars of a run that was cut off
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One provider on one case; times in milliseconds, memory in MiB, errors relative in norm."""

    case: str
    head: str
    provider: str
    objective: str
    status: str  # ok, wrong, absent, failed, left out; floor: the products alone
    reason: str = ""
    turns: str = ""  # ours, peers: who was timed in turn with it
    loss_error: float | None = None  # on the small problem, with the next two
    dx_error: float | None = None
    dw_error: float | None = None
    pair_dx_error: float | None = None  # on the problem that is timed, of its first pair
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    runs: int = 0
    over_floor: float | None = None  # p50 / the best time of the products alone in the same turns
    peak_mib: float | None = None  # above the inputs, gradients included
    extra_mib: float | None = None  # the same less the gradients
    load: float | None = None  # of the machine when the case was begun: processes running or waiting, over a minute

    @property
    def ours(self) -> bool:
        return self.provider.startswith("synpo ")


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def print_table(rows: Sequence[Row], title: str) -> None:
    """Rows of one case and head that took turns; a provider that failed the gate shows why, and no speed."""
    print(f"\n{title}, forward + backward")
    print(
        f"{'provider':<18} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'/floor':>7} {'extra MiB':>10} {'dX error':>9} "
        f"{'dW error':>9} {'loss err':>9} {'runs':>5}"
    )
    for row in rows:
        if row.status == "absent":
            continue
        if row.p50_ms is None:
            print(f"{row.provider:<18} {row.status}: {row.reason}")
            continue
        print(
            f"{row.provider:<18} {row.p50_ms:9.2f} {row.p20_ms:9.2f} {row.p80_ms:9.2f} {row.over_floor:7.2f} "
            f"{_or_dash(row.extra_mib, '10.1f')} {_or_dash(row.dx_error, '9.1e')} {_or_dash(row.dw_error, '9.1e')} "
            f"{_or_dash(row.loss_error, '9.1e')} {row.runs:5d}"
        )
    if any(row.status == "floor" and (row.p80_ms or 0.0) > 1.5 * (row.p20_ms or 0.0) for row in rows):
        print("the machine was too busy for these times: the products alone spread by more than half (p80 / p20)")
    print(end="", flush=True)


def _or_dash(value: float | None, form: str) -> str:
    return format("-", f">{int(form.split('.')[0])}") if value is None else format(value, form)


def write(out: Path, facts: dict[str, str], rows: list[dict[str, Any]], left_out: list[str]) -> None:
    """OUT.json (all) and OUT.csv (the rows), each replaced at once."""
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {name: None if value == math.inf else value for name, value in row.items()} for row in rows
    ]  # no inf in JSON
    _replace(out, ".json", json.dumps({"machine": facts, "rows": rows, "left_out": left_out}, indent=1) + "\n")
    if rows:
        path = out.with_name(out.name + ".csv.part")
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(path, out.with_name(out.name + ".csv"))


def _replace(out: Path, suffix: str, text: str) -> None:
    path = out.with_name(out.name + suffix + ".part")
    path.write_text(text)
    os.replace(path, out.with_name(out.name + suffix))


def plot(out: Path, facts: dict[str, str], rows: Sequence[Row]) -> None:
    """OUT.png: time and extra memory of every provider, one row of panels a case and head."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if row.p50_ms is not None]
    first = {(row.case, row.head): row.turns for row in reversed(timed)}
    timed = [
        row for row in timed if row.status != "floor" or row.turns == first[row.case, row.head]
    ]  # the products once
    panels = list(dict.fromkeys((row.case, row.head) for row in timed))
    if not panels:
        return
    most = max(sum((row.case, row.head) == panel for row in timed) for panel in panels)
    size = (12, len(panels) * (1.0 + 0.28 * most))
    figure, grid = plt.subplots(len(panels), 2, figsize=size, squeeze=False, layout="constrained")
    for (case, head), (left, right) in zip(panels, grid):
        here = sorted((row for row in timed if (row.case, row.head) == (case, head)), key=lambda row: row.p50_ms or 0)
        names = [row.provider for row in here]
        middle = [row.p50_ms or 0.0 for row in here]
        spread = [
            [m - (row.p20_ms or 0.0) for m, row in zip(middle, here)],
            [(row.p80_ms or 0.0) - m for m, row in zip(middle, here)],
        ]
        bars = left.barh(names, middle, xerr=spread, color=[_colour(row) for row in here], error_kw={"lw": 0.8})
        left.bar_label(bars, [f" {m:.3g}" for m in middle], fontsize=7, padding=2)
        left.axvline(min(m for m, row in zip(middle, here) if row.status == "floor"), color="black", lw=0.8, ls=":")
        left.set_title(f"{case}, {head} head", fontsize=9, loc="left")
        left.set_xlabel("ms, forward + backward (median; 20th to 80th percentile)", fontsize=8)
        weighed = [row for row in here if row.extra_mib is not None]
        bars = right.barh([row.provider for row in weighed], [row.extra_mib or 0.0 for row in weighed])
        for bar, row in zip(bars, weighed):
            bar.set_color(_colour(row))
        right.bar_label(bars, [f" {row.extra_mib:.4g}" for row in weighed], fontsize=7, padding=2)
        right.set_xlabel("MiB beyond inputs and gradients, at the peak", fontsize=8)
        for axes in (left, right):
            axes.invert_yaxis()
            axes.margins(x=0.12)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    chip = facts.get("gpu", facts["cpu"])
    figure.suptitle(f"{chip}; torch {facts['torch']}; {facts['date']}; {facts['commit']}", fontsize=9)
    path = out.with_name(out.name + ".part.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    os.replace(path, out.with_name(out.name + ".png"))


def _colour(row: Row) -> str:
    if row.status == "floor":
        return "#bbbbbb"
    return "#c0392b" if row.ours else "#5b7fa6"


if __name__ == "__main__":
    for given in map(Path, sys.argv[1:]):
        held = json.loads(given.read_text())
        plot(given.with_suffix(""), held["machine"], [Row(**row) for row in held["rows"]])
