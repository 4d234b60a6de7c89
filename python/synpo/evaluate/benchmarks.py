"""Reference captions as benchmarks publish them → one table: video id → captions.

    VATEX      JSON   [{"videoID": "<youtube>_<start>_<end>", "enCap": [10 captions], "chCap": [...]}, ...]
    MSR-VTT    JSON   {"videos": [{"video_id", "split", ...}], "sentences": [{"video_id", "caption"}, ...]}
    DREAM-1k   JSONL  {"messages": [question, {"content": [{"reference": caption}]}], "idx": 1, "extra_info": {"events": [...]}}
    ours       JSONL  {"video": "a/b.mp4" or an id, "captions": [...]}

The format is told by the content, never by the name. Ids are the benchmark's; `match_videos` finds their files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from synpo.evaluate.ptb import tokenize
from synpo.evaluate.scores import count, some
from synpo.records import RecordError, read_jsonl
from synpo.text import cleaned, distinct

EXPECTED = (
    'expected VATEX (JSON list of {"videoID", "enCap"}), MSR-VTT (JSON object with "videos" and "sentences"), '
    'DREAM-1k (JSON Lines of {"messages", "idx", "extra_info"}) or JSON Lines of {"video", "captions"}'
)


@dataclass(frozen=True)
class References:
    """Reference captions of a benchmark.

    format    "VATEX", "MSR-VTT", "DREAM-1k" or "captions" (our own)
    captions  video id → at least one caption
    splits    video id → split, where the file says (MSR-VTT)
    events    video id → what happens, in order, where the file says (DREAM-1k)
    """

    format: str
    captions: dict[str, list[str]]
    splits: dict[str, str] = field(default_factory=dict)
    events: dict[str, list[str]] = field(default_factory=dict)


def read_references(path: str | os.PathLike[str], split: str | None = None) -> References:
    """Read a reference file of any of the formats above.

    Args:
        path: the file.
        split: keep only this split's videos (MSR-VTT files hold several).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a format that is none of the above, naming the keys that were found; a video without a word in its
            captions or listed twice; a split the file does not have.
    """
    references = _detect(Path(path))
    if not references.captions:
        raise ValueError(f"{path}: {references.format} file without a single video")
    for video, captions in references.captions.items():
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise ValueError(
                f"{path}: captions of {video!r} should be a list of at least one text, got {captions!r:.80}"
            )
        if not any(tokenize(c) for c in captions):
            raise ValueError(f"{path}: {video!r} has no caption with a word in it, got {captions!r:.80}")
    return references if split is None else _only(references, split, path)


def _only(references: References, split: str, path: str | os.PathLike[str]) -> References:
    kept = {video for video, name in references.splits.items() if name == split}
    if not kept:
        known = ", ".join(sorted(set(references.splits.values()))) or "none: the file does not name any"
        raise ValueError(f"{path}: no video of split {split!r}; splits in this {references.format} file: {known}")
    return References(
        references.format,
        {video: captions for video, captions in references.captions.items() if video in kept},
        {video: split for video in references.captions if video in kept},
        {video: events for video, events in references.events.items() if video in kept},
    )


def _detect(path: Path) -> References:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from error
    try:
        whole = cleaned(json.loads(text, object_pairs_hook=distinct))
    except (json.JSONDecodeError, RecursionError):
        return _from_lines(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {EXPECTED}") from error
    if isinstance(whole, dict) and {"videos", "sentences"} <= whole.keys():
        return _msrvtt(path, whole)
    if isinstance(whole, list) and whole and isinstance(whole[0], dict) and {"videoID", "enCap"} <= whole[0].keys():
        return References("VATEX", _collect(path, whole, lambda row: (row["videoID"], row["enCap"])))
    if isinstance(whole, dict):
        return _from_lines(path)  # JSON Lines of a single line
    raise ValueError(f"{path}: {EXPECTED}; got {_describe(whole)}")


def _from_lines(path: Path) -> References:
    try:
        rows = [row for _, row in read_jsonl(path)]
    except RecordError as error:
        raise ValueError(f"{error}; {EXPECTED}") from error
    first = rows[0] if rows else None
    if isinstance(first, dict) and {"video", "captions"} <= first.keys():
        return References("captions", _collect(path, rows, lambda row: (row["video"], row["captions"])))
    if isinstance(first, dict) and {"messages", "idx"} <= first.keys():
        captions = _collect(path, rows, lambda row: (_dream_id(row), [row["messages"][1]["content"][0]["reference"]]))
        return References("DREAM-1k", captions, events={_dream_id(row): _dream_events(row) for row in rows})
    raise ValueError(f"{path}: {EXPECTED}; got {_describe(first) if rows else 'a file without a complete line'}")


def _dream_id(row: dict[str, Any]) -> str:
    """The video's file where the row names one, else its number: the published file holds a placeholder."""
    file: str = row["messages"][0]["content"][0]["video"]["video_file"]
    return str(row["idx"]) if file == "<placeholder>" else file


def _dream_events(row: dict[str, Any]) -> list[Any]:
    """What happens in the video, where the row says so."""
    more = row.get("extra_info")
    events = more.get("events") if isinstance(more, dict) else None
    return events if isinstance(events, list) else []


def _collect(path: Path, rows: list[Any], read: Callable[[Any], tuple[Any, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        try:
            video, captions = read(row)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}: entry {number} is not like the first: {EXPECTED}; got {_describe(row)}"
            ) from error
        if not isinstance(video, str) or not video:
            raise ValueError(f"{path}: entry {number}: the video should be a text, got {video!r}")
        if video in found:
            raise ValueError(f"{path}: entry {number}: {video!r} is listed twice; put all its captions in one entry")
        found[video] = captions
    return found


def _msrvtt(path: Path, whole: dict[str, Any]) -> References:
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    try:
        for video in whole["videos"]:
            captions[video["video_id"]] = []
            if video.get("split") is not None:
                splits[video["video_id"]] = str(video["split"])
        for sentence in whole["sentences"]:
            captions[sentence["video_id"]].append(sentence["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: MSR-VTT videos need video_id, sentences need caption and the video_id of a listed video; missing {error}"
        ) from error
    return References("MSR-VTT", captions, splits)


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with keys {', '.join(map(str, list(value)[:8]))}"
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f", the first being {_describe(value[0])}" if value else "")
    return f"{type(value).__name__} {value!r:.60}"


@dataclass(frozen=True)
class Matched:
    """Which file holds which referenced video: id → path as given; ids without a file; files nobody refers to."""

    files: dict[str, str]
    missing: list[str]
    unused: list[str]


def match_videos(ids: Iterable[str], files: Iterable[str | os.PathLike[str]]) -> Matched:
    """Find the file of each reference id among `files` (paths relative to the videos folder).

    An id is the relative path itself, that path without its suffix, or the bare file stem ("video7010" → "test/video7010.mp4").
    Only listed files are ever returned, so an id cannot point outside the folder.

    Raises:
        ValueError: an id fits several files, none exactly, or two ids fit one file.
    """
    paths = [PurePosixPath(Path(file).as_posix()) for file in files]
    names: dict[str, list[PurePosixPath]] = {}
    for path in paths:
        for name in {str(path), str(path.with_suffix("")), path.stem}:
            names.setdefault(name, []).append(path)
    exact = {str(path): path for path in paths}
    found: dict[str, str] = {}
    owner: dict[str, str] = {}
    missing = []
    for video in ids:
        fitting = [exact[video]] if video in exact else names.get(video, [])
        if not fitting:
            missing.append(video)
            continue
        if len(fitting) > 1:
            raise ValueError(
                f"{video!r} fits {count(len(fitting), 'file')} ({some(map(str, fitting))}): "
                "name the video by its path in the references"
            )
        file = str(fitting[0])
        if file in owner:
            raise ValueError(
                f"{owner[file]!r} and {video!r} both fit {file}: name videos by their path in the references"
            )
        found[video], owner[file] = file, video
    return Matched(found, missing, [str(path) for path in paths if str(path) not in owner])
