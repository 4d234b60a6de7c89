"""The benchmark of decoding runs to its end, and its gate stops times of ways that write something else."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import decode


def test_every_way_writes_the_same_and_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "decode.json"
    options = ["--rows", "2", "--answers", "2", "--tokens", "6", "--seconds", "0.01", "--skip-long", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench.decode", *options, str(out)])
    decode.main()
    rows = json.loads(out.read_text())["rows"]
    ways = {row["way"] for row in rows if "way" in row}
    assert {"plain", "contrastive", "two loops", "hf generate", "text hf guidance"} <= ways
    looks = {row["what"]: row for row in rows if "what" in row}
    assert looks.keys() >= {"plain draft", "plain draft, look", "plain before", "contrastive draft, look"}
    assert all(row["p50"] > 0 and row["runs"] >= 2 for row in rows)
    assert looks["plain draft"]["ratio"] == 1


def test_no_times_for_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other = torch.zeros(4, 8), torch.ones(4, 8)
    names = {name for pair in decode.AGREE for name in pair}
    assert decode.check({name: lambda *_: same for name in names}) == {}
    runs = {name: lambda *_: same for name in names} | {"two loops": lambda *_: other}
    with pytest.raises(decode.Disagreement, match="two loops and contrastive disagree in 4 of 4 rows"):
        decode.check(runs)
    monkeypatch.setattr(decode, "streams", lambda *_: runs)
    monkeypatch.setattr(decode, "look_table", lambda *_: [])
    out = tmp_path / "decode.json"
    monkeypatch.setattr(sys, "argv", ["bench.decode", "--rows", "2", "3", "--skip-long", "--json", str(out)])
    assert decode.main() == 1
    assert [row["rows"] for row in json.loads(out.read_text())["rows"]] == [2, 3], "the next table is made all the same"
    assert "two loops and contrastive disagree" in capsys.readouterr().out


def test_a_peer_that_fails_is_named() -> None:
    def failing(*_: object) -> torch.Tensor:
        raise AttributeError("no such processor")

    names = {name for pair in decode.AGREE for name in pair}
    runs = {name: lambda *_: torch.zeros(4, 8) for name in names} | {"text hf guidance": failing}
    assert decode.check(runs) == {"text hf guidance": "AttributeError: no such processor"}
