"""Record files: strict parsing, append-only stores that survive a kill, atomic writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from synpo.records import (
    Caption,
    Pair,
    RecordError,
    RecordStore,
    Score,
    atomic_path,
    parse_record,
    read_jsonl,
    read_records,
    record_id,
    write_json,
    write_records,
)
from synpo.video import FrameSampling

PAIR = Pair("1", "a.mp4", "Describe.", "größer", "kleiner", 7.5, 2)


def caption(name: str) -> Caption:
    return Caption(name, "a.mp4", None, 0, "text", "draft", -0.5)


def test_ids_follow_the_content_and_nothing_else() -> None:
    assert record_id("a", 1, FrameSampling()) == record_id("a", 1, FrameSampling())
    assert record_id({"x": 1, "y": 2}) == record_id({"y": 2, "x": 1})
    assert record_id("a", "b") != record_id("ab")
    assert record_id(FrameSampling(fps=1)) != record_id(FrameSampling(fps=2))
    assert len(record_id(None)) == 16


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    pairs = [PAIR, Pair("2", None, "p", "c", "r")]
    write_records(tmp_path / "deep" / "pairs.jsonl", pairs)
    assert read_records(Pair, tmp_path / "deep" / "pairs.jsonl") == pairs
    assert pairs[0].margin == 5.5
    assert pairs[1].margin is None
    assert "größer" in (tmp_path / "deep" / "pairs.jsonl").read_text(encoding="utf-8")


def test_a_failed_score_has_no_total() -> None:
    assert Score("1", "c", "v", None, None, None, None, "judge", "timed out").failed
    assert not Score("1", "c", "v", 5, 4.5, 3, 13.0, "judge").failed


ROW: dict[str, Any] = {"id": "1", "video": None, "prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "extra": 1}, "f:3: unknown key extra; a Pair has id, video"),
        ({**ROW, "chosen": 5}, "chosen should be .*str.*, got 5"),
        ({**ROW, "chosen_score": True}, "chosen_score should be"),
        ({**ROW, "chosen_score": "7"}, "chosen_score should be"),
        ({"id": "1"}, "f:3: .*missing"),
        (["id"], "expected a JSON object, got list"),
    ],
)
def test_a_row_that_is_no_record_is_named(row: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse_record(Pair, row, "f:3")


def test_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"b": 2}\n{"c"')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"b": 2})]
    path.write_text('{"a": 1}\n{"b": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (2, {"b": 2})]
    path.write_text('{"a": 1}\n{"b"\n{"c": 3}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl:2: not JSON"):
        list(read_jsonl(path))


def test_a_store_knows_what_it_holds_and_opens_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "captions.jsonl"
    store = RecordStore(Caption, path)
    store.append(caption("1"), caption("2"))
    assert "1" in store
    assert "3" not in store
    again = RecordStore(Caption, path)
    again.append(caption("3"))
    assert [c.id for c in again] == ["1", "2", "3"]
    assert again["2"] == caption("2")
    assert len(RecordStore(Caption, path)) == 3


@pytest.mark.parametrize("names", [("1",), ("3", "1"), ("3", "3")])
def test_an_id_that_is_held_is_refused_and_nothing_of_the_batch_is_added(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    store = RecordStore(Caption, tmp_path / "captions.jsonl")
    store.append(caption("1"))
    with pytest.raises(ValueError, match="already holds a record with id"):
        store.append(*map(caption, names))
    assert [c.id for c in store] == ["1"]
    assert [c.id for c in RecordStore(Caption, store.path)] == ["1"]


@pytest.mark.parametrize("torn", [b'{"id": "3", "vid', b'{"id": "3"}', '{"id": "größ'.encode()[:-1]])
def test_a_line_torn_by_a_kill_is_dropped(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    RecordStore(Caption, path).append(caption("1"), caption("2"))
    with open(path, "ab") as file:
        file.write(torn)
    store = RecordStore(Caption, path)
    assert [c.id for c in store] == ["1", "2"]
    store.append(caption("3"))
    assert [c.id for c in read_records(Caption, path)] == ["1", "2", "3"]


def test_a_killed_writer_loses_no_record_it_reported(tmp_path: Path) -> None:
    """A process is killed while it appends as fast as it can; every record it had said was written is there."""
    path = tmp_path / "captions.jsonl"
    code = (
        "import sys\nfrom synpo.records import Caption, RecordStore\n"
        f"store = RecordStore(Caption, {str(path)!r})\n"
        "for i in range(100000):\n"
        "    store.append(Caption(str(i), 'a.mp4', None, i, 'x' * 5000, 'd', 0.0))\n"
        "    print(i, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == 20:
                process.kill()
                break
    store = RecordStore(Caption, path)
    assert len(store) >= 21
    assert [c.id for c in store] == [str(i) for i in range(len(store))]


def test_an_atomic_write_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": "ä"})
    assert json.loads(path.read_text()) == {"x": "ä"}
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": "ä"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": "ä"}


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": 1}\n{"b": "größ'.encode()[:-1])
    assert list(read_jsonl(path)) == [(1, {"a": 1})]
    path.write_bytes(b'{"a": "\xff"}\n{"b": 2}\n')
    with pytest.raises(RecordError, match=r"a\.jsonl:1: not JSON .*, which every line has to be by itself"):
        list(read_jsonl(path))
