"""Progress bars: tqdm's on a terminal; in a file or a pipe plain lines, one now and then, and one at the end.

captions: 96 of 150 videos, 1:40 gone, 0:56 left, 1.0 videos/s
"""

from __future__ import annotations

import io
import sys
import time
from typing import Any

from tqdm import tqdm

SOONEST, LATEST = 30.0, 300.0  # seconds from one line to the next: a twentieth of the time gone, within these


def _plural(unit: str) -> str:
    return f"{unit}es" if unit.endswith(("ch", "s", "x")) else f"{unit}s"


class Bar(tqdm):
    """tqdm, which a file gets as lines. Arguments as tqdm's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        stream: Any = options.setdefault("file", sys.stderr)
        self.in_lines = not stream.isatty()
        self._said = time.monotonic()
        self._shown: float | None = None  # how far it was in the last line
        options.setdefault("dynamic_ncols", True)
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.in_lines:
            super().display(msg, pos)
            return
        facts = self.format_dict
        over = facts["total"] is None or facts["n"] >= facts["total"]
        rate = (None if over else facts["rate"]) or (facts["n"] - facts["initial"]) / max(facts["elapsed"], 1e-9)
        total, units = facts["total"], _plural(facts["unit"].strip())
        parts = [
            f"{facts['n']}{'' if total is None else f' of {total}'} {units}",
            f"{self.format_interval(facts['elapsed'])} gone",
        ]
        if total is not None and rate and facts["n"] < total:
            parts.append(f"{self.format_interval((total - facts['n']) / rate)} left")
        if rate:
            parts.append(f"{rate:.3g} {units}/s")
        if facts["postfix"]:
            parts.append(facts["postfix"])
        self.fp.write(f"{facts['prefix']}: {', '.join(parts)}\n" if facts["prefix"] else f"{', '.join(parts)}\n")
        self.fp.flush()
        self._shown = facts["n"]

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        if self.in_lines:
            due = min(max(SOONEST, self.format_dict["elapsed"] / 20), LATEST)
            if self.disable or time.monotonic() - self._said < due:
                return
            self._said = time.monotonic()
        super().refresh(nolock, lock_args)

    def clear(self, nolock: bool = False) -> None:
        """Before something else is written: a line is over already."""
        if not self.in_lines:
            super().clear(nolock)

    def close(self) -> None:
        if self.in_lines and not self.disable:
            if self.leave and self._shown != self.n:
                self.display()
            self.fp = io.StringIO()  # what tqdm ends a bar with
            self.leave = False
        super().close()
