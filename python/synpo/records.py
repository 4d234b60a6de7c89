"""The contracts between stages: what a clip, a caption, a score and a preference pair are, and how they are kept on disk.

    video → Clip → Caption (of a clip) ┐
          → Caption (candidate) ───────┴→ Score → Pair → training

Every record carries an id that is a hash of what it was made from (video, range, stage settings), so stages are joined by
id, never by position, and a stage that is run again skips what it has already done. Records live in append-only JSON Lines:
one record a line, flushed to the disk before the next one starts, so that a killed process loses the item in flight only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from synpo.text import clean, cleaned, distinct


def record_id(*parts: Any) -> str:
    """16 hexadecimal digits that identify `parts` (anything JSON can express, dataclasses included)."""
    plain = [asdict(p) if is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(clean(text).encode()).hexdigest()[:16]


class Kept:
    """What a record is: whoever made it, its texts are text (synpo/text.py), so that what is kept is what was given."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if (text := cleaned(value)) != value:
                object.__setattr__(self, field.name, text)


@dataclass(frozen=True)
class Clip(Kept):
    """A stretch of one video. `video` is a POSIX path relative to the videos folder; `start`, `end` are seconds."""

    id: str
    video: str
    index: int
    start: float
    end: float


@dataclass(frozen=True)
class Caption(Kept):
    """A text the model wrote about a video or a clip.

    `draft` is what it said before the self-retrospective pass (equal to `text` when there was none);
    `logp` is the mean log-probability the model gave to the tokens of `text` while it decoded them.
    """

    id: str
    video: str
    clip: str | None
    index: int
    text: str
    draft: str
    logp: float


@dataclass(frozen=True)
class Score(Kept):
    """A judge's verdict on one candidate: factuality 0–5, fluency 0–5, consistency 0–3; `total` is their weighted sum.

    A verdict that could not be had is `failed` with the reason in `note` and no figures: it is never ranked.
    """

    id: str
    caption: str
    video: str
    factuality: float | None
    fluency: float | None
    consistency: float | None
    total: float | None
    judge: str
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.total is None


Message = dict[str, str]
"""One turn of a conversation: {"role": "system" | "user" | "assistant", "content": text}."""


@dataclass(frozen=True)
class Pair(Kept):
    """One preference: for `prompt` (about `video`, or about nothing when it is None) `chosen` is better than `rejected`.

    A prompt is one user turn, or a conversation that ends with one.
    """

    id: str
    video: str | None
    prompt: str | list[Message]
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None

    @property
    def margin(self) -> float | None:
        if self.chosen_score is None or self.rejected_score is None:
            return None
        return self.chosen_score - self.rejected_score


Record = TypeVar("Record")


class RecordError(ValueError):
    """A line of a record file is not what it should be; the message names file, line, what was expected and what was got."""


def _accepts(annotation: Any, value: Any) -> bool:
    """Whether a JSON value fits a field's annotation: str, int, float, lists, mappings and unions of them with None."""
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if kind in (typing.Union, types.UnionType):
        return any(_accepts(a, value) for a in inner)
    if kind is list:
        return isinstance(value, list) and all(_accepts(inner[0], v) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(
            _accepts(inner[0], k) and _accepts(inner[1], v) for k, v in value.items()
        )
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def parse_record(kind: type[Record], row: Any, where: str) -> Record:
    """Build a `kind` from a JSON object. Raises RecordError on a missing or unknown key and on a value of the wrong type."""
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: expected a JSON object, got {type(row).__name__}")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise RecordError(f"{where}: unknown key {', '.join(unknown)}; a {kind.__name__} has {', '.join(known)}")
    values = dict(row)
    for name, value in values.items():
        if not _accepts(hints[name], value):
            raise RecordError(f"{where}: {name} should be {hints[name]}, got {value!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise RecordError(f"{where}: {error}; a {kind.__name__} has {', '.join(known)}") from error


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Yield (line number, JSON value). A last line without its newline, left by a killed writer, is skipped.

    Texts are made text, and a warning tells of the lines in which that changed something.
    """
    mended: list[int] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line, object_pairs_hook=distinct)
                text = cleaned(value)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a key twice, or nested without end
                if not line.endswith(b"\n"):
                    return
                raise RecordError(
                    f"{path}:{number}: not JSON ({error}), which every line has to be by itself"
                ) from error
            if text != value:
                mended.append(number)
            yield number, text
    if mended:
        others = f" and {len(mended) - 1} more" if len(mended) > 1 else ""
        print(
            f"warning: {path}:{mended[0]}{others}: half of a surrogate pair, or NUL, is no text and was read as U+FFFD",
            file=sys.stderr,
        )


def read_records(kind: type[Record], path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file. Raises FileNotFoundError, or RecordError naming the line."""
    return [parse_record(kind, row, f"{path}:{number}") for number, row in read_jsonl(path)]


class RecordStore(Generic[Record]):
    """Append-only record file that knows which ids it holds.

        store = RecordStore(Caption, folder / "candidates.jsonl")
        if key not in store:
            store.append(Caption(id=key, ...))     # on the disk when this returns

    Opening it drops a half-written last line left by a killed writer.
    """

    def __init__(self, kind: type[Record], path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._records: dict[str, Record] = {}
        if self.path.exists():
            self._drop_torn_line()
            self._records = {r.id: r for r in read_records(kind, self.path)}  # type: ignore[attr-defined]

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with open(self.path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def append(self, *records: Record) -> None:
        """Add records and force them to the disk. An id that is already held is refused with ValueError."""
        added: dict[str, Record] = {}
        for record in records:
            key = record.id  # type: ignore[attr-defined]
            if key in self._records or key in added:
                raise ValueError(f"{self.path} already holds a record with id {key}")
            added[key] = record
        with open(self.path, "a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")  # type: ignore[call-overload]
            file.flush()
            os.fsync(file.fileno())
        self._records |= added


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` that replaces it on success and vanishes on failure."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """Write a whole JSON Lines file at once: it is there complete, or not at all."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(cleaned(row), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_records(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Write a whole record file at once."""
    write_jsonl(path, (asdict(record) for record in records))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write one JSON document at once, indented."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(cleaned(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
