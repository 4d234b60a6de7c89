"""What a judge is given and what it says.

Every candidate caption of a video gets a factuality of 0–5 (against the captions of the video's clips), a fluency of 0–5 and a
consistency of 0–3 (with the other candidates), and total = 1.1 · factuality + fluency + consistency (arXiv 2506.00835).
A candidate that could not be judged has a Failure instead, and is never ranked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

SCALES = {"factuality": 5.0, "fluency": 5.0, "consistency": 3.0}
FACTUALITY_WEIGHT = 1.1


class JudgeError(ValueError):
    """A judge that cannot work at all (no key, no endpoint, refused): the run stops, what is scored is kept."""


@dataclass(frozen=True)
class Task:
    """The candidates of one video.

    Attributes:
        video: its path, for messages.
        evidence: captions of its clips, in order of time.
        candidates: texts to be scored.
        logps: mean log-probability a token of each candidate, as its model gave it.
    """

    video: str
    evidence: tuple[str, ...]
    candidates: tuple[str, ...]
    logps: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """The scores of one candidate. Raises ValueError for a figure that is no number or off its scale."""

    factuality: float
    fluency: float
    consistency: float

    def __post_init__(self) -> None:
        for name, top in SCALES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= top):
                raise ValueError(f"{name} should be between 0 and {top:g}, got {value}")

    @property
    def total(self) -> float:
        return FACTUALITY_WEIGHT * self.factuality + self.fluency + self.consistency


@dataclass(frozen=True)
class Failure:
    """No verdict, and why."""

    reason: str


class Judge(Protocol):
    """Scores candidates.

    Attributes:
        name: for people.
        identity: changes whenever the same task could get other scores; final after `prepare`.
        workers: how many threads may call `score` at once; with 1 it is called in the thread of the run itself.
        order_totals: for tasks judged in several orders, the totals of the candidates in each, (orders, N).
    """

    name: str
    identity: str
    workers: int
    order_totals: dict[Task, list[list[float]]]

    def check(self) -> None:
        """Find out, before there is anything to score, whether it can. Raises ConfigError or JudgeError."""

    def prepare(self, tasks: Sequence[Task]) -> None:
        """See the whole pool before the first verdict."""

    def score(self, task: Task) -> list[Verdict | Failure]:
        """One outcome for each candidate, in order. Raises JudgeError."""

    def stop(self) -> None:
        """Ask nothing more, from whatever thread, until the next `prepare`: the run has ended early."""
