"""What did not run, and what it would need: reasons of skipped tests with their numbers, the most frequent first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


def reason(report: Any) -> str:
    """Why a test was skipped, as it said."""
    where = report.longrepr
    said = where[2] if isinstance(where, tuple) else str(where)
    return said.removeprefix("Skipped: ")


def lines(reports: Iterable[Any]) -> list[str]:
    """One line a reason; a module that is skipped as a whole counts once."""
    return [f"{count:5}  {said}" for said, count in Counter(map(reason, reports)).most_common()]
