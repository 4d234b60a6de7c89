"""Text from outside, and what of it is no text.

A `str` may hold what nothing else takes: half of a surrogate pair (an emoji that a UTF-16 program cut in two, a byte of a file
name that is not UTF-8) and NUL. Files, databases, tokenizers, pipes and sockets refuse the first; paths and pages the second.

One rule holds wherever text enters or leaves (files, settings, judges, models; records, reports): such a character becomes
U+FFFD, the replacement character, and two halves that stand beside each other the character that they are. What bears a name
that is no text, a video file say, is then found under no name, and is left out with that reason.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import IO, Any

_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair and every NUL."""
    if _NO_TEXT.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "\ufffd")


def cleaned(value: Any) -> Any:
    """A JSON value (mappings, lists, tuples and plain values) with all its texts, keys too, as `clean` makes them."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(key) if isinstance(key, str) else key: cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(item) for item in value]
    return value


def printable(text: str) -> str:
    """`text` with U+FFFD for control codes, which a terminal would obey; lines and tabs stay."""
    return _CONTROL.sub("\ufffd", text)


def tolerant(stream: IO[str]) -> IO[str]:
    """The stream, which from now on prints "?" for what its encoding does not know; by itself it would raise an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")
    return stream
