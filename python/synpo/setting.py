"""One setting: its default, what it does in a line, and which values it takes. Sections (config.py) are dataclasses of these.

    fps: float = setting(0.5, "frames a second that the model sees", above(0))

`synpo config` shows the line and the default; `check` refuses a value that is out of range when the section is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The values that `fits` holds for, and the `words` for them in an error message: "expected <words>"."""

    fits: Callable[[Any], bool]
    words: str


def at_least(least: float, note: str = "") -> Range:
    return Range(lambda value: least <= value < math.inf, _words(f"at least {least:g}", note))


def above(least: float, note: str = "") -> Range:
    return Range(lambda value: least < value < math.inf, _words(f"above {least:g}", note))


def one_of(*names: str) -> Range:
    return Range(lambda value: value in names, f"one of {', '.join(names)}")


def _words(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


def setting(default: Any, help: str, within: Range | None = None) -> Any:
    """A field of a dataclass. A default that is a function makes the value: `setting(dict, …)`. None is always in range."""
    how: dict[str, Any] = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**how, metadata={"help": help, "within": within})


def check(section: Any) -> None:
    """Raise ValueError naming the first field of a section whose value is out of its range."""
    for field in dataclasses.fields(section):
        within, value = field.metadata.get("within"), getattr(section, field.name)
        if within is not None and value is not None and not within.fits(value):
            raise ValueError(f"{field.name}: expected {within.words}, got {value!r}")
