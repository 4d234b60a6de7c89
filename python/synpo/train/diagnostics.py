"""What a training log says about the objective, in words: negatives that dominate, a sigmoid that saturates, a collapse.

Each check looks at the end of a run, or compares it with the beginning (a fifth of the logged steps each), and names the
setting to change. What unequal lengths or the luck of the batches explain is no finding.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synpo.records import read_jsonl

ENOUGH = 10  # logged steps below which a run says nothing
SHARE = 0.2  # of the logged steps taken as beginning and as end
DOMINANT = 1.2  # rejected over chosen gradient; answers of unequal length alone make √(length ratio)
CERTAIN = 3.0  # standard errors by which a mean must have fallen
SATURATED = 0.9  # mean of 1 − 4σ(1 − σ): σ is within 0.026 of 0 or 1
COLLAPSED = 0.7  # geometric or arithmetic mean probability of the chosen tokens, end over beginning
WATCHED = (
    "synpo/grad_balance/rejected",
    "synpo/grad_balance/chosen",
    "synpo/saturation",
    "synpo/chosen_prob",
    "synpo/language_reward",
    "synpo/margin",
)
REPETITION = "eval_synpo/repetition"
REPEATS = 0.2  # rise of the share of repeated 4-grams in greedy answers since the first evaluation


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The training steps of a `train_log.jsonl`, in order; evaluations and the summary are left out.

    Raises FileNotFoundError, or RecordError naming a line that is not JSON.
    """
    return [dict(row) for row in steps_of(row for _, row in read_jsonl(path))]


class Course:
    """How logged values went, step by step, in running sums: a look costs the same however long the run is.

    A step holds 16 bytes a value. Values that are missing or not finite count nowhere.
    """

    def __init__(self, names: Iterable[str], rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.steps = 0
        self._sums = {name: array("d", [0.0]) for name in names}  # of the first i steps
        self._counts = {name: array("q", [0]) for name in self._sums}
        self._last: dict[str, float] = {}
        self._jumps = dict.fromkeys(self._sums, 0.0)  # squares of the differences of neighbours
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """The next step."""
        self.steps += 1
        for name, sums in self._sums.items():
            value, counts = float(row.get(name, math.nan)), self._counts[name]
            there = math.isfinite(value)
            sums.append(sums[-1] + (value if there else 0.0))
            counts.append(counts[-1] + there)
            if there:
                self._jumps[name] += (value - self._last.get(name, value)) ** 2
                self._last[name] = value

    def ends(self, name: str) -> tuple[float, float] | None:
        """Mean over the beginning and over the end of the run, a fifth of its steps each (at least one); None without any."""
        count = max(1, round(SHARE * self.steps))
        first, last = self._mean(name, 0, count), self._mean(name, self.steps - count, self.steps)
        return None if first is None or last is None else (first, last)

    def noise(self, name: str) -> float:
        """Standard error of end minus beginning: steps differ from their neighbours by chance, whatever the trend."""
        values = self._counts[name][-1]
        variance = self._jumps[name] / (2 * max(1, values - 1))
        return math.sqrt(2 * variance / max(1, round(SHARE * values)))

    def _mean(self, name: str, start: int, end: int) -> float | None:
        sums, counts = self._sums[name], self._counts[name]
        count = counts[end] - counts[start] if self.steps else 0
        return (sums[end] - sums[start]) / count if count else None


def ends(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean of one logged value over the beginning and over the end of a run, as `Course.ends`.

    Raises KeyError where no row has it.
    """
    if (found := Course([name], rows).ends(name)) is None:
        raise KeyError(name)
    return found


def steps_of(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The training steps among the rows of a log."""
    return [row for row in rows if "synpo/chosen_logp" in row]


@dataclass(frozen=True)
class Finding:
    """One thing that goes wrong: its kind, a sentence with the settings to change, and whether it ruins the model."""

    kind: str
    text: str
    serious: bool


class Watched:
    """What `findings` needs to know of a run, row by row of its log."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.course = Course(WATCHED)
        self.repetition: tuple[float, float] | None = None  # at the first and at the last evaluation
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """The next row of the log, whatever it is about."""
        for _ in steps_of([row]):
            self.course.add(row)
        if REPETITION in row:
            now = float(row[REPETITION])
            self.repetition = (self.repetition[0] if self.repetition else now, now)


def findings(run: Watched, loss_type: str) -> list[Finding]:
    """What goes wrong in a run of `loss_type`, one entry a kind.

    Empty when nothing does, or when there are too few steps to tell.
    """
    found, course = _of_language(run.repetition, loss_type), run.course
    if course.steps < ENOUGH:
        return found
    sides = [course.ends(f"synpo/grad_balance/{side}") for side in ("rejected", "chosen")]
    rejected, chosen = (side[1] if side else 0.0 for side in sides)
    if rejected > DOMINANT * chosen:
        ratio = rejected / max(chosen, 1e-12)
        found.append(
            Finding(
                "negatives",
                f"negatives dominate: at the end the gradient through the rejected side is {ratio:.2f} times that through "
                f"the chosen side. {_remedy(loss_type)}",
                True,
            )
        )
    saturation = course.ends("synpo/saturation")
    if saturation is not None and saturation[1] > SATURATED:
        found.append(
            Finding(
                "saturation",
                f"the sigmoid saturates: {saturation[1]:.0%} of its slope is gone at the end, pairs no longer teach. Lower "
                "train.alpha, or stop earlier (train.num_train_epochs).",
                False,
            )
        )
    for kind, name, words in (
        ("chosen", "synpo/chosen_prob", "the chosen answers became unlikely: token probability"),
        ("language", "synpo/language_reward", "language collapses: the language reward was"),
    ):
        values = course.ends(name)
        if values is not None and values[1] < COLLAPSED * values[0]:
            text = f"{words} {values[0]:.3g} at the start, {values[1]:.3g} at the end. {_gentler(loss_type)}"
            found.append(Finding(kind, text, True))
    margin = course.ends("synpo/margin")
    if margin is not None and margin[0] - margin[1] > CERTAIN * course.noise("synpo/margin"):
        found.append(
            Finding(
                "margin",
                f"the margin fell from {margin[0]:.3g} to {margin[1]:.3g}: chosen and rejected are not being told apart. Raise "
                "train.learning_rate or train.num_train_epochs, or look at the pairs.",
                False,
            )
        )
    return found


def _of_language(shares: tuple[float, float] | None, loss_type: str) -> list[Finding]:
    if shares is None or shares[1] - shares[0] < REPEATS:
        return []
    text = (
        f"greedy answers repeat themselves: {shares[0]:.0%} of their 4-grams at the first evaluation, {shares[1]:.0%} "
        f"now. {_gentler(loss_type)}"
    )
    return [Finding("repetition", text, True)]


def warnings_of(rows: Iterable[Mapping[str, Any]], loss_type: str) -> list[str]:
    """The sentences of `findings` for the rows of a log."""
    return [finding.text for finding in findings(Watched(rows), loss_type)]


def _gentler(loss_type: str) -> str:
    other = "or raise train.beta." if loss_type == "synpo" else "or use loss_type synpo."
    return f"Lower train.learning_rate, {other}"


def _remedy(loss_type: str) -> str:
    if loss_type == "synpo":
        return "Lower train.learning_rate or train.alpha, or raise train.beta."
    return f"Lower train.learning_rate, or use loss_type synpo in place of {loss_type}."
