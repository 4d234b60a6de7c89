"""Pair files: our records and TRL's three shapes; a row that is no pair is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from synpo.data.pairs import load_pairs
from synpo.records import Pair, RecordError, write_records


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def test_our_records_come_back_as_they_were(tmp_path: Path) -> None:
    pairs = [Pair("1", "a.mp4", "Describe.", "good", "bad", 9.0, 2.5), Pair("2", None, "Hi", "a", "b")]
    write_records(tmp_path / "pairs.jsonl", pairs)
    assert load_pairs(tmp_path / "pairs.jsonl") == pairs


def test_trl_shapes_mean_the_same_pair(tmp_path: Path) -> None:
    user, good, bad = turn("user", "Why?"), turn("assistant", "Because."), turn("assistant", "No.")
    path = write(
        tmp_path / "pairs.jsonl",
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "video": "a.mp4"},
    )
    plain, conversational, implicit, with_video = load_pairs(path)
    assert plain == conversational == implicit
    assert (plain.video, plain.prompt, plain.chosen, plain.rejected) == (None, "Why?", "Because.", "No.")
    assert with_video.video == "a.mp4"
    assert with_video.id != plain.id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Why?", "chosen": "Because."}, "pairs.jsonl:2: no rejected"),
        ({"prompt": "Why?", "chosen": "a", "rejected": 3}, "rejected should be a text or one assistant turn"),
        ({"prompt": [turn("user", "a"), turn("user", "b")], "chosen": "a", "rejected": "b"}, "one user turn"),
        ({"chosen": "a", "rejected": "b"}, "prompt should be a text"),
        (
            {"chosen": [turn("user", "x"), turn("assistant", "a")], "rejected": [turn("assistant", "a")]},
            "different prompts",
        ),
        ({"id": "1", "video": None, "prompt": "x", "chosen": "a"}, "pairs.jsonl:2"),
        ({"id": "1", "video": None, "prompt": "x", "chosen": "a", "rejected": "b", "score": 1}, "unknown key score"),
        ([1], "expected a JSON object, got list"),
    ],
)
def test_a_row_that_is_no_pair_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {"prompt": "Why?", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(RecordError, match=message):
        load_pairs(path)


def test_missing_and_empty_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl does not exist; --pairs takes"):
        load_pairs(tmp_path / "missing.jsonl")
    with pytest.raises(RecordError, match="holds no pair"):
        load_pairs(write(tmp_path / "empty.jsonl"))
