"""Pair files: our records and TRL's three shapes; a row that is no pair is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from synpo.config import ConfigError
from synpo.data.pairs import hold_out, load_pairs, origin, videos_of
from synpo.records import Pair, RecordError, write_json, write_records


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turn(role: str, text: Any) -> dict[str, Any]:
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
    "columns",
    [
        {"id": "row 7"},
        {"id": 7},
        {"id": "row 7", "source": "web", "score_chosen": 8.5, "messages": [turn("user", "Why?")]},
        {"id": "row 7", "video": None, "margin": 2},
        {"id": None, "video": None, "images": []},
    ],
)
@pytest.mark.parametrize("kind", ["plain", "conversational", "implicit"])
def test_columns_of_their_own_leave_trl_rows_what_they_are(kind: str, columns: dict[str, Any], tmp_path: Path) -> None:
    """Ids of such rows are those of conversations or prompts, often the same for many pairs; ours are of the content."""
    user, good, bad = turn("user", "Why?"), turn("assistant", "Because."), turn("assistant", "No.")
    row: dict[str, Any] = {
        "plain": {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        "conversational": {"prompt": [user], "chosen": [good], "rejected": [bad]},
        "implicit": {"chosen": [user, good], "rejected": [user, bad]},
    }[kind]
    path = write(tmp_path / "pairs.jsonl", row, columns | row, row | columns)
    bare, first, last = load_pairs(path)
    assert bare == first == last
    with_video = load_pairs(write(tmp_path / "video.jsonl", row | columns | {"video": "a.mp4", "extra": 1}))[0]
    assert with_video == load_pairs(write(tmp_path / "bare.jsonl", row | {"video": "a.mp4"}))[0]
    assert with_video.video == "a.mp4" and with_video.id != bare.id


def test_our_record_is_known_by_id_and_video(tmp_path: Path) -> None:
    row = {"id": "mine", "video": None, "prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    scored = row | {"id": "scored", "video": "a.mp4", "chosen_score": 9, "rejected_score": 1.5}
    mine, second = load_pairs(write(tmp_path / "pairs.jsonl", row, scored))
    assert (mine.id, second.id, second.margin) == ("mine", "scored", 7.5)


SYSTEM, ASKED, ANSWERED = turn("system", "Be brief."), turn("user", "Why?"), turn("assistant", "What?")
LONG = [SYSTEM, ASKED, ANSWERED, turn("user", "That.")]
GOOD, BAD = [turn("assistant", "Because.")], [turn("assistant", "No.")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": LONG, "chosen": GOOD, "rejected": BAD}, LONG),
        ({"prompt": LONG, "chosen": "Because.", "rejected": "No."}, LONG),
        ({"chosen": LONG + GOOD, "rejected": LONG + BAD}, LONG),
        ({"prompt": LONG, "chosen": LONG + GOOD, "rejected": LONG + BAD}, LONG),
        ({"prompt": "Why?", "chosen": [ASKED, *GOOD], "rejected": [ASKED, *BAD]}, "Why?"),  # ultrafeedback_binarized
        ({"prompt": "Why?", "chosen": LONG + GOOD, "rejected": LONG + BAD}, LONG),
        ({"prompt": [SYSTEM, ASKED], "chosen": GOOD, "rejected": BAD}, [SYSTEM, ASKED]),
        ({"prompt": [turn("user", [{"type": "text", "text": "Why?"}])], "chosen": GOOD, "rejected": BAD}, "Why?"),
        (
            {
                "prompt": [turn("user", [{"type": "video"}, {"type": "text", "text": "Why?"}])],
                "chosen": [turn("assistant", [{"type": "text", "text": "Because."}])],
                "rejected": BAD,
                "video": "a.mp4",
            },
            "Why?",
        ),
    ],
)
def test_conversations_stay_conversations(row: dict[str, Any], prompt: Any, tmp_path: Path) -> None:
    (pair,) = load_pairs(write(tmp_path / "pairs.jsonl", row))
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "Because.", "No.")
    write_records(tmp_path / "again.jsonl", [pair])
    assert load_pairs(tmp_path / "again.jsonl") == [pair], "as a record of ours"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Who?", "chosen": [ASKED, *GOOD], "rejected": [ASKED, *BAD]}, "the prompt 'Who.' is no user turn"),
        ({"prompt": [SYSTEM], "chosen": [ASKED, *GOOD], "rejected": [ASKED, *BAD]}, "is another conversation than"),
        ({"prompt": [ASKED, SYSTEM], "chosen": GOOD, "rejected": BAD}, "got user, system"),
        ({"prompt": [ASKED, ANSWERED], "chosen": GOOD, "rejected": BAD}, "ends with a user's .* got user, assistant"),
        (
            {"prompt": [turn("tool", "4")], "chosen": GOOD, "rejected": BAD},
            "turns with a role .system, user, assistant.",
        ),
        (
            {"prompt": [ASKED], "chosen": [GOOD[0] | {"tool_calls": [1]}], "rejected": BAD},
            "tool_calls of a turn would not",
        ),
        (
            {
                "prompt": [turn("user", [{"type": "video"}, {"type": "text", "text": "Why?"}])],
                "chosen": "a",
                "rejected": "b",
            },
            "should hold text .and, before it, the row's one video",
        ),
        (
            {
                "prompt": [turn("user", [{"type": "text", "text": "Why?"}, {"type": "video"}])],
                "chosen": "a",
                "rejected": "b",
                "video": "a.mp4",
            },
            "should hold text .and, before it, the row's one video",
        ),
    ],
)
def test_a_conversation_that_would_be_cut_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=message):
        load_pairs(write(tmp_path / "pairs.jsonl", row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Why?", "chosen": "Because.", "id": 3},
            "pairs.jsonl:2: no rejected; found prompt, chosen, id; a pair has prompt, chosen and rejected .* or it has neg_pre",
        ),
        (
            {"prompt": "Why?", "completion": "a", "label": True},
            "no chosen and no rejected; found prompt, completion, label",
        ),
        ({"id": "1", "chosen": "a", "rejected": "b"}, "no prompt; found id, chosen, rejected; .* `extract_prompt`"),
        ({}, "no prompt and no chosen and no rejected; found no key"),
        (
            {"prompt": "Why?", "chosen": "a", "rejected": "b", "images": ["a.png"]},
            "the column images would not be seen",
        ),
        (
            {"prompt": "Why?", "chosen": "a", "rejected": "b", "tools": [{"name": "look"}]},
            "the column tools would not be read .the chat template would show them to the model",
        ),
        (
            {"prompt": "Why?", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"enable_thinking": False}},
            "the column chat_template_kwargs would not be read .set model.template_variables",
        ),
        (
            {"id": "1", "video": None, "prompt": "Why?", "chosen": "a", "rejected": "b", "chosen_score": float("nan")},
            "chosen_score should be a number or null, got nan",
        ),
        (
            {"id": "1", "video": None, "prompt": "Why?", "chosen": "a", "rejected": "b", "rejected_score": 10**400},
            "rejected_score should be a number or null, got 1000",
        ),
        (
            {"video_name": "a.mp4", "pos_pre": "a", "neg_pre": "b", "pos_score": float("inf"), "neg_score": 1},
            "chosen_score should be a number or null, got inf",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Be"}],
                "chosen": "cause.",
                "rejected": "!",
            },
            "what an answer begins with belongs into the answers.*got user, assistant",
        ),
        (
            {"prompt": "Why?", "chosen": "a", "rejected": "b", "video_name": "a.mp4"},
            "found prompt, chosen, rejected, video_name; a row with video_name has .* call their video `video`",
        ),
        ({"prompt": "Why?", "chosen": "a", "rejected": 3}, "rejected should be a text or one assistant turn"),
        ({"prompt": [turn("user", "a"), turn("user", "b")], "chosen": "a", "rejected": "b"}, "got user, user"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt should be a text"),
        (
            {"chosen": [turn("user", "x"), turn("assistant", "a")], "rejected": [turn("assistant", "a")]},
            "different prompts",
        ),
        ({"id": "1", "video": None, "prompt": "x", "chosen": "a"}, "pairs.jsonl:2: no rejected; found id, video"),
        (
            {"id": "1", "video": None, "prompt": "x", "chosen": "a", "rejected": "b", "chosen_score": "9"},
            "chosen_score should be",
        ),
        ({"id": "1", "video": 4, "prompt": "x", "chosen": "a", "rejected": "b"}, "video should be"),
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


AUTHORS = {"video_name": "a/b.mp4", "pos_pre": "Good.", "neg_pre": "Bad.", "pos_score": 9.5, "neg_score": 4}


def test_the_authors_rows_are_pairs_about_a_video(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", AUTHORS, AUTHORS | {"video_name": "c.mp4"})
    first, second = load_pairs(path, prompt="What happens?")
    assert (first.video, first.prompt, first.chosen, first.rejected) == ("a/b.mp4", "What happens?", "Good.", "Bad.")
    assert (first.margin, second.video) == (5.5, "c.mp4")
    assert first.id != second.id
    assert load_pairs(path)[0].prompt == "Describe the video in detail."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_pre": None}, r"pairs.jsonl:1: chosen should be"),
        ({"pos_score": "high"}, r"pairs.jsonl:1: chosen_score should be"),
        ({"score": 1}, r"pairs.jsonl:1: unknown key score; found video_name, .*; a row with video_name has neg_pre"),
    ],
)
def test_authors_rows_that_are_none_are_named(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=message):
        load_pairs(write(tmp_path / "pairs.jsonl", AUTHORS | change))
    with pytest.raises(RecordError, match="no neg_pre"):
        load_pairs(write(tmp_path / "pairs.jsonl", {k: v for k, v in AUTHORS.items() if k != "neg_pre"}))


def test_held_out_pairs_share_no_video_with_the_others() -> None:
    pairs = [Pair(str(i), f"{i // 3}.mp4", "Describe.", "a", f"b{i}") for i in range(12)]
    taught, held = hold_out(pairs, 4)
    assert len(held) == 6 and len(taught) == 6
    assert not {p.video for p in held} & {p.video for p in taught}
    assert hold_out(pairs[::-1], 4)[1] != [] and {p.id for p in hold_out(pairs[::-1], 4)[1]} == {p.id for p in held}
    assert hold_out(pairs, 0) == (pairs, [])
    with pytest.raises(ConfigError, match="train.held_out: 12 of 12 pairs"):
        hold_out(pairs, 12)


def test_the_videos_of_pairs_are_those_they_were_made_from(tmp_path: Path) -> None:
    path, videos = tmp_path / "pairs.jsonl", tmp_path / "videos"
    videos.mkdir()
    seen, unseen = Pair("a", "v.mp4", "p", "c", "r"), Pair("b", None, "p", "c", "r")
    assert videos_of([unseen], path, None) is None
    with pytest.raises(ConfigError, match=r"pair a has the video v\.mp4; --videos should name the folder it is in"):
        videos_of([unseen, seen], path, None)
    write_json(origin(path), {"videos": str(videos)})
    assert videos_of([unseen, seen], path, None) == videos
    assert videos_of([seen], path, tmp_path) == tmp_path
    videos.rmdir()
    with pytest.raises(ConfigError, match="--videos should name"):
        videos_of([seen], path, None)
    with pytest.raises(ConfigError, match="--videos: .* is not there"):
        videos_of([seen], path, videos)
