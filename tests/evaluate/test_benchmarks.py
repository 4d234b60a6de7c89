"""Reference files: the real ones, small ones of every format, and what is said of those that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from synpo.evaluate.benchmarks import match_videos, read_references


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MSRVTT = {
    "info": {},
    "videos": [{"video_id": "video0", "split": "train"}, {"video_id": "video1", "split": "test"}],
    "sentences": [
        {"video_id": "video0", "caption": "a dog", "sen_id": 0},
        {"video_id": "video1", "caption": "a cat", "sen_id": 1},
        {"video_id": "video0", "caption": "the dog", "sen_id": 2},
    ],
}


def test_the_real_vatex_file(real_data: Path) -> None:
    references = read_references(real_data / "captions" / "vatex_5_samples.json")
    assert references.format == "VATEX"
    assert len(references.captions) == 5
    assert all(len(captions) == 10 for captions in references.captions.values())
    assert references.captions["5-xGskbsBgI_000055_000065"][1] == (
        "A person is setting up a table to get get ready to shine boots"
    )


def test_the_real_dream_file(real_data: Path) -> None:
    references = read_references(real_data / "captions" / "DREAM-1k.jsonl")
    assert references.format == "DREAM-1k"
    assert list(references.captions) == [str(i) for i in range(1, 1001)]
    assert references.captions["3"] == [
        "Several animals jumped into a yellow pipe one by one, and the last brown bird jumped directly off the platform."
    ]
    assert references.events["3"] == ["Animals jumped into a yellow pipe", "A brown bird jumped off the platform"]


def test_other_real_files_are_refused_naming_what_they_hold(real_data: Path) -> None:
    with pytest.raises(
        ValueError, match=r"coco_fakecap.*expected VATEX .* list of 1000, the first .* keys image_id, caption"
    ):
        read_references(real_data / "captions" / "coco_fakecap_results.json")
    with pytest.raises(ValueError, match="got an object with keys 07309684-1f6e-4977-ab74-f3e63c361f36"):
        read_references(real_data / "captions" / "vdc_detailed_qa_100.jsonl")


def test_msrvtt_and_its_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "videodatainfo.json", MSRVTT)
    whole = read_references(path)
    assert whole.format == "MSR-VTT"
    assert whole.captions == {"video0": ["a dog", "the dog"], "video1": ["a cat"]}
    assert read_references(path, split="test").captions == {"video1": ["a cat"]}
    with pytest.raises(ValueError, match="no video of split 'val'; splits in this MSR-VTT file: test, train"):
        read_references(path, split="val")
    odd = {"videos": [{"video_id": "a", "split": 1}, {"video_id": "b", "split": [2]}, {"video_id": "c", "split": None}]}
    odd["sentences"] = [{"video_id": video, "caption": "a dog"} for video in "abc"]
    assert read_references(write(tmp_path / "odd.json", odd)).splits == {"a": "1", "b": "[2]"}
    with pytest.raises(ValueError, match="MSR-VTT videos need video_id"):
        read_references(write(tmp_path / "odd.json", {"videos": ["a"], "sentences": []}))


@pytest.mark.parametrize("number", [1, 2])
def test_our_own_format_whatever_the_file_is_called(tmp_path: Path, number: int) -> None:
    rows = [{"video": f"a/{i}.mp4", "captions": ["one", "two"]} for i in range(number)]
    references = read_references(write(tmp_path / "refs.json", *rows))
    assert references.format == "captions"
    assert references.captions == {row["video"]: row["captions"] for row in rows}


def test_dream_rows_that_name_their_file(tmp_path: Path) -> None:
    row = {
        "messages": [{"content": [{"video": {"video_file": "x/1.mp4"}}]}, {"content": [{"reference": "a dog"}]}],
        "idx": 1,
    }
    references = read_references(write(tmp_path / "d.jsonl", row))
    assert references.captions == {"x/1.mp4": ["a dog"]}
    assert references.events == {"x/1.mp4": []}
    for more in (None, [], {"events": None}, {"events": 3}):
        assert read_references(write(tmp_path / "d.jsonl", row | {"extra_info": more})).events == {"x/1.mp4": []}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got a file without a complete line"),
        ([[]], "expected VATEX .* got a list of 0"),
        ([{"videos": [], "sentences": []}], "MSR-VTT file without a single video"),
        ([[{"videoID": "x", "chCap": ["y"]}]], "list of 1, the first being an object with keys videoID, chCap"),
        ([[{"videoID": "x", "enCap": ["y"]}, {"videoID": "z"}]], "entry 2 is not like the first.* keys videoID"),
        ([{"video": "a", "captions": ["x"]}, {"video": "a", "captions": ["y"]}], "entry 2: 'a' is listed twice"),
        ([{"video": "a", "captions": []}], "captions of 'a' should be a list of at least one text"),
        ([{"video": "a", "captions": "x"}], "captions of 'a' should be a list of at least one text, got 'x'"),
        ([{"video": 3, "captions": ["x"]}], "entry 1: the video should be a text, got 3"),
        ([{"video": "a", "caption": "x"}], "got an object with keys video, caption"),
        ([{**MSRVTT, "sentences": [{"video_id": "other", "caption": "x"}]}], "missing 'other'"),
        ([{**MSRVTT, "sentences": MSRVTT["sentences"][:1]}], "captions of 'video1' should be a list of at least one"),
        (["text"], "got str 'text'"),
    ],
)
def test_bad_files(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_references(write(tmp_path / "refs", *rows))


def test_a_missing_file_and_a_split_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_references(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="none: the file does not name any"):
        read_references(write(tmp_path / "r.jsonl", {"video": "a", "captions": ["x"]}), split="test")


def test_match_videos_by_path_by_name_and_by_stem() -> None:
    files = ["a/1.mp4", "b/1.mp4", Path("test/video7010.mp4"), "odd.webm"]
    matched = match_videos(["a/1.mp4", "b/1", "video7010", "gone"], files)
    assert matched.files == {"a/1.mp4": "a/1.mp4", "b/1": "b/1.mp4", "video7010": "test/video7010.mp4"}
    assert matched.missing == ["gone"]
    assert matched.unused == ["odd.webm"]


def test_match_videos_never_guesses_and_never_leaves_the_folder() -> None:
    with pytest.raises(ValueError, match=r"'1' fits 2 files \('a/1.mp4', 'b/1.mp4'\)"):
        match_videos(["1"], ["a/1.mp4", "b/1.mp4"])
    with pytest.raises(ValueError, match="'x' and 'x.mp4' both fit x.mp4"):
        match_videos(["x", "x.mp4"], ["x.mp4"])
    assert match_videos(["../secret.mp4", "/etc/passwd"], ["secret.mp4"]).files == {}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_files_of_other_editors(mark: bytes, tmp_path: Path) -> None:
    vatex, lines = tmp_path / "vatex.json", tmp_path / "ours.jsonl"
    vatex.write_bytes(mark + json.dumps([{"videoID": "a", "enCap": ["größer"]}], ensure_ascii=False).encode())
    lines.write_bytes(mark + b'{"video": "a", "captions": ["x"]}\r\n{"video": "b", "captions": ["y"]}\r\n')
    assert read_references(vatex).captions == {"a": ["größer"]}
    assert read_references(lines).captions == {"a": ["x"], "b": ["y"]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"video,caption\na.mp4,a red circle\n", r"f:1: not JSON .*; expected VATEX"),
        (b"video,caption", "expected VATEX .* without a complete line"),
        ('{"video": "a", "captions": ["é"]}'.encode("latin-1"), "f is not UTF-8 .*save it as UTF-8"),
        ('{"video": "a", "captions": ["x"]}'.encode("utf-16"), "f is not UTF-8"),
        (b'{"video": "a", "captions": ["  ", "..."]}\n', "'a' has no caption with a word in it"),
    ],
)
def test_files_that_are_no_references(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        read_references(tmp_path / "f")
