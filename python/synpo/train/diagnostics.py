"""What a training log says about the objective, in words: negatives that dominate, a sigmoid that saturates, a collapse.

Each check looks at the end of a run, or compares it with the beginning (a fifth of the logged steps each), and names the
setting to change. What unequal lengths or the luck of the batches explain is no finding.
"""

from __future__ import annotations

import math
import os
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
REPEATS = 0.2  # rise of the share of repeated 4-grams in greedy answers since the first evaluation


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The training steps of a `train_log.jsonl`, in order; evaluations and the summary are left out.

    Raises FileNotFoundError, or RecordError naming a line that is not JSON.
    """
    return [dict(row) for row in steps_of(row for _, row in read_jsonl(path))]


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of one logged value; None where no row has it."""
    values = [float(row[name]) for row in rows if name in row]
    return sum(values) / len(values) if values else None


def ends(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean of one logged value over the beginning and over the end of a run, a fifth of its steps each (at least one).

    Raises KeyError where no row has it.
    """
    count = max(1, round(SHARE * len(rows)))
    before, after = mean_of(rows[:count], name), mean_of(rows[-count:], name)
    if before is None or after is None:
        raise KeyError(name)
    return before, after


def steps_of(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The training steps among the rows of a log."""
    return [row for row in rows if "synpo/chosen_logp" in row]


def evaluations_of(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations among the rows of a log."""
    return [row for row in rows if "eval_loss" in row]


@dataclass(frozen=True)
class Finding:
    """One thing that goes wrong: its kind, a sentence with the settings to change, and whether it ruins the model."""

    kind: str
    text: str
    serious: bool


def findings(
    rows: Sequence[Mapping[str, Any]], loss_type: str, evaluations: Sequence[Mapping[str, Any]] = ()
) -> list[Finding]:
    """What goes wrong in a run of `loss_type`, from its training steps and its evaluations, one entry a kind.

    Empty when nothing does, or when there are too few steps to tell.
    """
    found = _of_language(evaluations, loss_type)
    if len(rows) < ENOUGH:
        return found
    last = rows[-round(SHARE * len(rows)) :]
    rejected, chosen = (mean_of(last, f"synpo/grad_balance/{side}") for side in ("rejected", "chosen"))
    if rejected is not None and chosen is not None and rejected > DOMINANT * chosen:
        ratio = rejected / max(chosen, 1e-12)
        found.append(
            Finding(
                "negatives",
                f"negatives dominate: at the end the gradient through the rejected side is {ratio:.2f} times that through "
                f"the chosen side. {_remedy(loss_type)}",
                True,
            )
        )
    saturation = mean_of(last, "synpo/saturation")
    if saturation is not None and saturation > SATURATED:
        found.append(
            Finding(
                "saturation",
                f"the sigmoid saturates: {saturation:.0%} of its slope is gone at the end, pairs no longer teach. Lower "
                "train.alpha, or stop earlier (train.num_train_epochs).",
                False,
            )
        )
    for kind, name, words in (
        ("chosen", "synpo/chosen_prob", "the chosen answers became unlikely: token probability"),
        ("language", "synpo/language_reward", "language collapses: the language reward was"),
    ):
        if mean_of(rows, name) is None:
            continue
        before, after = ends(rows, name)
        if after < COLLAPSED * before:
            text = f"{words} {before:.3g} at the start, {after:.3g} at the end. {_gentler(loss_type)}"
            found.append(Finding(kind, text, True))
    before, after = ends(rows, "synpo/margin")
    if before - after > CERTAIN * _noise(rows, "synpo/margin"):
        found.append(
            Finding(
                "margin",
                f"the margin fell from {before:.3g} to {after:.3g}: chosen and rejected are not being told apart. Raise "
                "train.learning_rate or train.num_train_epochs, or look at the pairs.",
                False,
            )
        )
    return found


def _noise(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Standard error of end minus beginning: steps differ from their neighbours by chance, whatever the trend."""
    values = [float(row[name]) for row in rows]
    variance = sum((b - a) ** 2 for a, b in zip(values, values[1:])) / (2 * (len(values) - 1))
    return math.sqrt(2 * variance / max(1, round(SHARE * len(values))))


def _of_language(evaluations: Sequence[Mapping[str, Any]], loss_type: str) -> list[Finding]:
    shares = [float(row["eval_synpo/repetition"]) for row in evaluations if "eval_synpo/repetition" in row]
    if len(shares) < 2 or shares[-1] - shares[0] < REPEATS:
        return []
    text = (
        f"greedy answers repeat themselves: {shares[0]:.0%} of their 4-grams at the first evaluation, {shares[-1]:.0%} "
        f"now. {_gentler(loss_type)}"
    )
    return [Finding("repetition", text, True)]


def warnings_of(
    rows: Sequence[Mapping[str, Any]], loss_type: str, evaluations: Sequence[Mapping[str, Any]] = ()
) -> list[str]:
    """The sentences of `findings`."""
    return [finding.text for finding in findings(rows, loss_type, evaluations)]


def _gentler(loss_type: str) -> str:
    other = "or raise train.beta." if loss_type == "synpo" else "or use loss_type synpo."
    return f"Lower train.learning_rate, {other}"


def _remedy(loss_type: str) -> str:
    if loss_type == "synpo":
        return "Lower train.learning_rate or train.alpha, or raise train.beta."
    return f"Lower train.learning_rate, or use loss_type synpo in place of {loss_type}."
