"""What a training log says about the objective, in words: negatives that dominate, a sigmoid that saturates, a collapse.

Each check compares the beginning of a run with its end (a fifth of the logged steps each) and names the setting to change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from synpo.records import read_jsonl

ENOUGH = 10  # logged steps below which a run says nothing
SHARE = 0.2  # of the logged steps taken as beginning and as end
SATURATED = 0.9  # mean of 1 − 4σ(1 − σ): σ is within 0.026 of 0 or 1
COLLAPSED = 0.7  # geometric-mean probability of the chosen tokens, end over beginning


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The training steps of a `train_log.jsonl`, in order; evaluations and the summary are left out.

    Raises FileNotFoundError, or RecordError naming a line that is not JSON.
    """
    return [row for _, row in read_jsonl(path) if "synpo/chosen_logp" in row]


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


def warnings_of(rows: Sequence[Mapping[str, Any]], loss_type: str) -> list[str]:
    """What went wrong in a run of `loss_type`, one sentence each; empty when nothing did or it was too short to tell."""
    if len(rows) < ENOUGH:
        return []
    last = rows[-round(SHARE * len(rows)) :]
    found = []
    rejected, chosen = (mean_of(last, f"synpo/grad_balance/{side}") for side in ("rejected", "chosen"))
    if rejected is not None and chosen is not None and rejected > chosen:
        found.append(
            f"negatives dominate: at the end the gradient through the rejected side is {rejected / max(chosen, 1e-12):.2f} "
            "times that through the chosen side. " + _remedy(loss_type)
        )
    saturation = mean_of(last, "synpo/saturation")
    if saturation is not None and saturation > SATURATED:
        found.append(
            f"the sigmoid saturates: {saturation:.0%} of its slope is gone at the end, pairs no longer teach. Lower "
            "train.alpha, or stop earlier (train.num_train_epochs)."
        )
    before, after = ends(rows, "synpo/chosen_prob")
    if after < COLLAPSED * before:
        found.append(
            f"the chosen answers became unlikely: token probability {before:.3g} at the start, {after:.3g} at the end. "
            "Lower train.learning_rate"
            + (", or raise train.beta." if loss_type == "synpo" else ", or use loss_type synpo.")
        )
    before, after = ends(rows, "synpo/margin")
    if after < before:
        found.append(
            f"the margin fell from {before:.3g} to {after:.3g}: chosen and rejected are not being told apart. Raise "
            "train.learning_rate or train.num_train_epochs, or look at the pairs."
        )
    return found


def _remedy(loss_type: str) -> str:
    if loss_type == "synpo":
        return "Lower train.learning_rate or train.alpha, or raise train.beta."
    return f"Lower train.learning_rate, or use loss_type synpo in place of {loss_type}."
