"""The benchmark of decoding runs to its end, and its gate stops times of ways that write something else."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import decode


def test_every_way_writes_the_same_and_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "decode.json"
    options = [
        "--rows",
        "2",
        "--views",
        "2",
        "--answers",
        "1",
        "--tokens",
        "4",
        "--seconds",
        "0.01",
        "--skip-long",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["bench.decode", *options, str(out)])
    decode.main()
    rows = json.loads(out.read_text())["rows"]
    ways = {row["way"] for row in rows if "way" in row}
    assert {"plain", "contrastive", "two loops", "hf generate", "text hf guidance"} <= ways
    looks = {row["what"]: row for row in rows if "what" in row}
    assert looks.keys() >= {"plain draft", "plain draft, look", "plain before", "contrastive draft, look"}
    assert all(row["p50"] > 0 and row["runs"] >= 2 for row in rows)
    assert looks["plain draft"]["ratio"] == 1


def ways(**changed: object) -> dict[str, object]:
    """Every way, all of which write four rows of zeros unless changed."""
    names = {name for pair in decode.AGREE for name in pair} | {"text plain"}
    return {name: lambda *_: torch.zeros(4, 8) for name in names} | changed


def test_no_times_for_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.check(ways(), "two loops", "contrastive") is None
    runs = ways(**{"two loops": lambda *_: torch.ones(4, 8)})
    with pytest.raises(decode.Disagreement, match="two loops and contrastive disagree in 4 of 4 rows"):
        decode.check(runs, "two loops", "contrastive")
    monkeypatch.setattr(decode, "streams", lambda *_: runs)
    monkeypatch.setattr(decode, "look_table", lambda *_: iter([]))
    out = tmp_path / "decode.json"
    options = ["--rows", "2", "3", "--seconds", "0.01", "--skip-long", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench.decode", *options])
    assert decode.main() == 1
    found = [row for row in json.loads(out.read_text())["rows"] if row["way"] in ("two loops", "contrastive")]
    assert [(row["rows"], "p50" in row) for row in found] == [(2, False), (3, False)], "others are timed all the same"
    assert "two loops and contrastive disagree in 4 of 4 rows: no times" in capsys.readouterr().out


def test_a_peer_that_fails_is_named() -> None:
    def failing(*_: object) -> torch.Tensor:
        raise AttributeError("no such processor")

    runs = ways(**{"text hf guidance": failing})
    assert decode.check(runs, "text hf guidance", "text contrastive") == "AttributeError: no such processor"


def test_a_row_is_there_before_the_next_way_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark that is cut off has shown and written what it had."""
    ran: list[str] = []
    runs = {name: lambda *_, name=name: (ran.append(name), torch.zeros(4, 8))[1] for name in ways()}
    monkeypatch.setattr(decode, "streams", lambda *_: runs)
    lm = decode.small(24, 32, 1, torch.device("cpu"))
    table = decode.stream_table(lm, decode.noise(1, 2, 24), 4, 48, 0.01)
    assert next(table)["way"] == "plain" and set(ran) == {"plain", "hf generate"}
    assert next(table)["way"] == "hf generate" and set(ran) == {"plain", "hf generate"}
    assert next(table)["way"] == "contrastive" and set(ran) == {"plain", "hf generate", "contrastive", "two loops"}
