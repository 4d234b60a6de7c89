"""Text from outside, and what of it is no text.

A `str` may hold what nothing else takes: half of a surrogate pair (an emoji that a UTF-16 program cut in two, a byte of a file
name that is not UTF-8) and NUL. Files, databases, tokenizers, pipes and sockets refuse the first; paths and pages the second.

One rule holds wherever text enters or leaves (files, settings, judges, models; records, reports): such a character becomes
U+FFFD, the replacement character, and two halves that stand beside each other the character that they are. What bears a name
that is no text, a video file say, is then found under no name, and is left out with that reason.

JSON from outside is taken where it has one meaning (no key twice) and a depth that whoever walks through it can stand.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import IO, Any

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
DEPTH = 100  # lists and mappings in one another; Python gives up at some hundreds
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair and every NUL."""
    if _NO_TEXT.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "\ufffd")


def cleaned(value: Any, room: int = DEPTH) -> Any:
    """A JSON value (mappings, lists, tuples and plain values) with all its texts, keys too, as `clean` makes them.

    Raises ValueError where it is nested deeper than `room`.
    """
    if isinstance(value, str):
        return clean(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if room == 0:
        raise ValueError(f"nested more than {DEPTH} deep")
    if isinstance(value, Mapping):
        return {clean(key) if isinstance(key, str) else key: cleaned(item, room - 1) for key, item in value.items()}
    return [cleaned(item, room - 1) for item in value]


def distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For json's `object_pairs_hook`: an object, or ValueError where a key is there twice, of which json takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
    return found


def printable(text: str) -> str:
    """`text` with U+FFFD for control codes, which a terminal would obey; lines and tabs stay."""
    return _CONTROL.sub("\ufffd", text)


def tolerant(stream: IO[str]) -> IO[str]:
    """The stream, which from now on prints "?" for what its encoding does not know; by itself it would raise an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")
    return stream
