"""Preference pairs from a JSON Lines file: our own records, rows in TRL's format, or the SynPO authors'.

    {"id": …, "video": "a.mp4", "prompt": "Describe…", "chosen": "…", "rejected": "…"}             records.Pair
    {"prompt": "…", "chosen": "…", "rejected": "…"}                                                plain
    {"prompt": [{"role": "user", …}], "chosen": [{"role": "assistant", …}], "rejected": […]}       conversational
    {"chosen": [{user}, {assistant}], "rejected": [{user}, {assistant}]}                           implicit prompt
    {"prompt": "…", "chosen": [{user}, {assistant}], "rejected": [{user}, {assistant}]}            said twice
    {"video_name": "a.mp4", "pos_pre": "…", "neg_pre": "…", "pos_score": 9.5, "neg_score": 4}      the authors' (video)

A row is one of ours when it has an `id`, a `video` (which may be null), a prompt and two texts, and else nothing but scores.
Any other row with chosen and rejected is TRL's: it may carry a `video`, and other columns, an `id` among them, are left alone;
columns that a model would have to see are refused. The authors' rows name no question: all get `prompt`, and their video names
are paths below the videos folder, with their ending. A prompt that is a plain text becomes one user turn of the model's chat
template; a conversation (system, user and assistant turns, the last a user's) stays one.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from synpo.config import ConfigError, PairsConfig
from synpo.records import Message, Pair, RecordError, parse_record, read_jsonl, record_id

AUTHORS = {"video_name", "pos_pre", "neg_pre", "pos_score", "neg_score"}
RECORD = {field.name for field in fields(Pair)}
SEEN = {"image", "images", "videos"}
SHOWN = {
    "tools": "the chat template would show them to the model",
    "chat_template_kwargs": "set model.template_variables",
}
ROLES = ("system", "user", "assistant")
BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def load_pairs(path: str | os.PathLike[str], prompt: str = PairsConfig.prompt) -> list[Pair]:
    """All pairs of a file, in its order; `prompt` is the question of rows that have none (the authors').

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        RecordError: a row is not a pair (the message names file, line and key), or the file holds none.
    """
    if os.path.isdir(path):
        inside = sorted(Path(path).glob("*.jsonl"))
        hint = f"; did you mean {inside[0]}?" if len(inside) == 1 else ""
        raise IsADirectoryError(f"--pairs takes a JSON Lines file, got the folder {os.fspath(path)}{hint}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"pairs file {os.fspath(path)} does not exist; --pairs takes a JSON Lines file")
    pairs = [_parse(row, f"{path}:{number}", prompt) for number, row in read_jsonl(path)]
    if not pairs:
        raise RecordError(f"{path} holds no pair")
    return pairs


def pairs_of(rows: Iterable[Any], name: str, prompt: str = PairsConfig.prompt) -> list[Pair]:
    """Pairs of rows in memory: mappings as the lines of a file have them (a `datasets.Dataset`, say), or records.

    Raises RecordError for a row that is not a pair; the message says which of `name`.
    """
    return [
        row if isinstance(row, Pair) else _parse(row, f"{name}, row {number}", prompt)
        for number, row in enumerate(rows)
    ]


def origin(path: str | os.PathLike[str]) -> Path:
    """Where `synpo pairs` notes what a pairs file was made from, in the folder of its stages' records."""
    return Path(f"{os.fspath(path)}.work", "made_from.json")


def videos_of(pairs: Sequence[Pair], path: str | os.PathLike[str], given: Path | None) -> Path | None:
    """The folder that the pairs' video paths are relative to: the one given, else the one `synpo pairs` made the file from.

    None where no pair has a video. Raises ConfigError when it is not known, or not there.
    """
    if given is not None:
        if not given.is_dir():
            raise ConfigError(
                f"--videos: {given} is {'a file' if given.exists() else 'not there'}; name the folder of videos"
            )
        return given
    seen = next((pair for pair in pairs if pair.video), None)
    if seen is None:
        return None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        noted = Path(json.loads(origin(path).read_text(encoding="utf-8"))["videos"])
        if noted.is_dir():
            return noted
    raise ConfigError(f"pair {seen.id} has the video {seen.video}; --videos should name the folder it is in")


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
    return _scored(parse_record(Pair, {"id": record_id(values), **values, **scores}, where), where)


def _scored(pair: Pair, where: str) -> Pair:
    """The pair; RecordError where a score of it is no number."""
    for name in ("chosen_score", "rejected_score"):
        if (score := getattr(pair, name)) is not None and not abs(score) <= sys.float_info.max:
            raise RecordError(f"{where}: {name} should be a number or null, got {score!s:.80}")
    return pair


def _parse(row: Any, where: str, default_prompt: str) -> Pair:
    if not isinstance(row, Mapping):
        raise RecordError(f"{where}: expected a JSON object, got {type(row).__name__}")
    if "video_name" in row:
        return _authors(row, default_prompt, where)
    plain = all(isinstance(row.get(name), str) for name in ("id", "chosen", "rejected"))
    if plain and "video" in row and "prompt" in row and row.keys() <= RECORD:
        found = parse_record(Pair, {**row, "prompt": _question(row["prompt"], False, f"{where}: prompt")}, where)
        return _scored(found, where)
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
    if missing and not (missing == ["prompt"] and isinstance(row["chosen"], list)):
        shared = (
            ". Of texts that begin with their prompt, trl's `extract_prompt` takes it off"
            if missing == ["prompt"]
            else ""
        )
        raise RecordError(
            f"{where}: no {' and no '.join(missing)}; found {', '.join(row) or 'no key'}; a pair has prompt, chosen and rejected "
            f"and may have a video, or it has {', '.join(sorted(AUTHORS))}{shared}"
        )
    if told := sorted(name for name in SHOWN.keys() & row.keys() if row[name]):
        raise RecordError(
            f"{where}: the column {told[0]} would not be read ({SHOWN[told[0]]}); write it into the prompt, or leave it out"
        )
    if seen := sorted(name for name in SEEN & row.keys() if row[name]):
        raise RecordError(
            f"{where}: the column {', '.join(seen)} would not be seen by the model; a pair is about one video, named by its path "
            "in the column video, or about none"
        )
    video = row.get("video")
    prompt, chosen, rejected = _conversations(row, where)
    turns = {
        "prompt": _question(prompt, bool(video), f"{where}: prompt"),
        "chosen": _answer(chosen, f"{where}: chosen"),
        "rejected": _answer(rejected, f"{where}: rejected"),
    }
    return parse_record(Pair, {"id": record_id(video, turns), "video": video, **turns}, where)


def _conversations(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a row, the turns that both answers begin with counted to the prompt."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if not (isinstance(chosen, list) and isinstance(rejected, list) and (prompt is None or len(chosen) > 1)):
        return prompt, chosen, rejected
    asked = chosen[:-1]
    if asked != rejected[:-1]:
        raise RecordError(f"{where}: chosen and rejected answer different prompts")
    users = [turn["content"] for turn in asked if isinstance(turn, Mapping) and turn.get("role") == "user"]
    if isinstance(prompt, str) and prompt.strip() not in [u.strip() for u in users if isinstance(u, str)]:
        raise RecordError(
            f"{where}: the prompt {prompt[:80]!r} is no user turn of the conversations in chosen and rejected"
        )
    if isinstance(prompt, list) and prompt != asked:
        raise RecordError(f"{where}: prompt is another conversation than the one chosen and rejected begin with")
    return asked, chosen[-1:], rejected[-1:]


def _question(value: Any, video: bool, where: str) -> str | list[Message]:
    """A prompt: a plain string, a single user turn as its text, or a conversation that ends with a user turn."""
    if isinstance(value, str):
        return value
    turns = [_turn(turn, video, where) for turn in value] if isinstance(value, list) else []
    roles = [turn["role"] for turn in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2) + ["user"]:
        raise RecordError(
            f"{where} should be a text, or a conversation of user and assistant turns that ends with a user's (a system turn may "
            f"come first; what an answer begins with belongs into the answers), got {', '.join(roles) or repr(value)[:80]}"
        )
    return turns[0]["content"] if roles == ["user"] else turns


def _answer(value: Any, where: str) -> str:
    """An answer: a plain string, or a conversation of exactly one assistant turn."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1:
        turn = _turn(value[0], False, where)
        if turn["role"] == "assistant":
            return turn["content"]
    raise RecordError(f"{where} should be a text or one assistant turn with text, got {str(value)[:80]!r}")


def _turn(turn: Any, video: bool, where: str) -> Message:
    """One turn as role and text. What a model would have to read beside the text (tool calls, images) is refused."""
    if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
        raise RecordError(
            f"{where} should hold turns with a role ({', '.join(ROLES)}) and text, got {str(turn)[:80]!r}"
        )
    if read := sorted(name for name in BESIDE if turn.get(name)):
        raise RecordError(
            f"{where}: {', '.join(read)} of a turn would not be trained on; write it into its content, or leave it out"
        )
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        shown = (
            content[1:]
            if video and turn["role"] == "user" and content[:1] and content[0].get("type") == "video"
            else content
        )
        texts = [part.get("text") for part in shown if part.get("type") == "text"]
        if len(texts) == len(shown) and all(isinstance(text, str) for text in texts):
            content = "".join(texts)
    if not isinstance(content, str):
        raise RecordError(
            f"{where}: a turn should hold text (and, before it, the row's one video), got {str(turn.get('content'))[:80]!r}"
        )
    return {"role": turn["role"], "content": content}
