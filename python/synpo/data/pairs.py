"""Preference pairs from a JSON Lines file: our own records, or rows in TRL's format.

    {"id": …, "video": "a.mp4", "prompt": "Describe…", "chosen": "…", "rejected": "…"}             records.Pair
    {"prompt": "…", "chosen": "…", "rejected": "…"}                                                plain
    {"prompt": [{"role": "user", …}], "chosen": [{"role": "assistant", …}], "rejected": […]}       conversational
    {"chosen": [{user}, {assistant}], "rejected": [{user}, {assistant}]}                           implicit prompt

TRL rows may carry a `video`. Every prompt becomes one user turn of the model's chat template.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from synpo.records import Pair, RecordError, parse_record, read_jsonl, record_id


def load_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """All pairs of a file, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: a row is not a pair (the message names file, line and key), or the file holds none.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"pairs file {os.fspath(path)} does not exist; --pairs takes a JSON Lines file")
    pairs = [_parse(row, f"{path}:{number}") for number, row in read_jsonl(path)]
    if not pairs:
        raise RecordError(f"{path} holds no pair")
    return pairs


def _parse(row: Any, where: str) -> Pair:
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "id" in row:
        return parse_record(Pair, row, where)
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise RecordError(
            f"{where}: no {' and no '.join(missing)}; a pair has prompt, chosen, rejected and may have a video"
        )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[:-1] != rejected[:-1]:
            raise RecordError(f"{where}: chosen and rejected answer different prompts")
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    texts = {
        "prompt": _one_turn(prompt, "user", f"{where}: prompt"),
        "chosen": _one_turn(chosen, "assistant", f"{where}: chosen"),
        "rejected": _one_turn(rejected, "assistant", f"{where}: rejected"),
    }
    video = row.get("video")
    return parse_record(Pair, {"id": record_id(video, texts), "video": video, **texts}, where)


def _one_turn(value: Any, role: str, where: str) -> str:
    """The text of a plain string, or of a conversation of exactly one turn by `role`."""
    if isinstance(value, str):
        return value
    turns = value if isinstance(value, list) else []
    if len(turns) == 1 and isinstance(turns[0], Mapping) and turns[0].get("role") == role:
        content = turns[0].get("content")
        if isinstance(content, str):
            return content
    raise RecordError(f"{where} should be a text or one {role} turn with text, got {str(value)[:80]!r}")
