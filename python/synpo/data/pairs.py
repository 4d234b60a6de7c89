"""Preference pairs from a JSON Lines file: our own records, rows in TRL's format, or the SynPO authors'.

    {"id": …, "video": "a.mp4", "prompt": "Describe…", "chosen": "…", "rejected": "…"}             records.Pair
    {"prompt": "…", "chosen": "…", "rejected": "…"}                                                plain
    {"prompt": [{"role": "user", …}], "chosen": [{"role": "assistant", …}], "rejected": […]}       conversational
    {"chosen": [{user}, {assistant}], "rejected": [{user}, {assistant}]}                           implicit prompt
    {"video_name": "a.mp4", "pos_pre": "…", "neg_pre": "…", "pos_score": 9.5, "neg_score": 4}      the authors' (video)

A row is one of ours when it has an `id`, a `video` (which may be null) and three texts, and else nothing but scores. Any other
row with chosen and rejected is TRL's: it may carry a `video`, and its other columns, an `id` among them, are left alone; columns
that a model would have to see are refused. The authors' rows name no question: all get `prompt`, and their video names are
paths below the videos folder, with their ending. Every prompt becomes one user turn of the model's chat template.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from synpo.config import ConfigError, PairsConfig
from synpo.records import Pair, RecordError, parse_record, read_jsonl, record_id

AUTHORS = {"video_name", "pos_pre", "neg_pre", "pos_score", "neg_score"}
RECORD = {field.name for field in fields(Pair)}
SEEN = {"image", "images", "videos"}


def load_pairs(path: str | os.PathLike[str], prompt: str = PairsConfig.prompt) -> list[Pair]:
    """All pairs of a file, in its order; `prompt` is the question of rows that have none (the authors').

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: a row is not a pair (the message names file, line and key), or the file holds none.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"pairs file {os.fspath(path)} does not exist; --pairs takes a JSON Lines file")
    pairs = [_parse(row, f"{path}:{number}", prompt) for number, row in read_jsonl(path)]
    if not pairs:
        raise RecordError(f"{path} holds no pair")
    return pairs


def hold_out(pairs: Sequence[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and at least `count` others, none of them about a video (or, without one, a prompt) trained on.

    The choice depends on the pairs alone, so that a resumed run makes the same one. Raises ConfigError when nothing is left.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(record_id(pair.video or pair.prompt), []).append(pair)
    held: list[Pair] = []
    for key in sorted(groups):
        if len(held) >= count:
            break
        held += groups[key]
    chosen = {pair.id for pair in held}
    taught = [pair for pair in pairs if pair.id not in chosen]
    if not taught:
        raise ConfigError(
            f"train.held_out: {count} of {len(pairs)} pairs, with all pairs of their videos or prompts, leave none to train on"
        )
    return taught, held


def _authors(row: Mapping[str, Any], prompt: str, where: str) -> Pair:
    unknown, missing = sorted(set(row) - AUTHORS), sorted(AUTHORS - set(row))
    if unknown or missing:
        named = f"no {', '.join(missing)}" if missing else f"unknown key {', '.join(unknown)}"
        raise RecordError(
            f"{where}: {named}; found {', '.join(row)}; a row with video_name has {', '.join(sorted(AUTHORS))}. Rows with "
            "prompt, chosen and rejected call their video `video`"
        )
    values = {"video": row["video_name"], "prompt": prompt, "chosen": row["pos_pre"], "rejected": row["neg_pre"]}
    scores = {"chosen_score": row["pos_score"], "rejected_score": row["neg_score"]}
    return parse_record(Pair, {"id": record_id(values), **values, **scores}, where)


def _parse(row: Any, where: str, default_prompt: str) -> Pair:
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "video_name" in row:
        return _authors(row, default_prompt, where)
    plain = all(isinstance(row.get(name), str) for name in ("id", "prompt", "chosen", "rejected"))
    if plain and "video" in row and row.keys() <= RECORD:
        return parse_record(Pair, row, where)
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
    if missing and not (missing == ["prompt"] and isinstance(row["chosen"], list)):
        raise RecordError(
            f"{where}: no {' and no '.join(missing)}; found {', '.join(row) or 'no key'}; a pair has prompt, chosen and rejected "
            f"and may have a video, or it has {', '.join(sorted(AUTHORS))}"
        )
    if seen := sorted(name for name in SEEN & row.keys() if row[name]):
        raise RecordError(
            f"{where}: the column {', '.join(seen)} would not be seen by the model; a pair is about one video, named by its path "
            "in the column video, or about none"
        )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is None and isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[:-1] != rejected[:-1]:
            raise RecordError(f"{where}: chosen and rejected answer different prompts")
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
    turns = {
        "prompt": _one_turn(prompt, "user", f"{where}: prompt"),
        "chosen": _one_turn(chosen, "assistant", f"{where}: chosen"),
        "rejected": _one_turn(rejected, "assistant", f"{where}: rejected"),
    }
    video = row.get("video")
    return parse_record(Pair, {"id": record_id(video, turns), "video": video, **turns}, where)


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
