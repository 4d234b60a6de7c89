"""The benchmark of contrastive sampling: right variants get times, a peer that is wrong or fails a reason, ours no excuse."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import contrast


def failing(*inputs: Tensor | float) -> Tensor:
    raise FileNotFoundError("nvcc is not here\nat all")


def other(expert: Tensor, *rest: Tensor | float) -> Tensor:
    return expert.argmin(-1)


def rows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, object]]:
    out = tmp_path / "contrast.json"
    options = ["--device", "cpu", "--shapes", "3x200", "--seconds", "0.05", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench.contrast", *options])
    with torch.no_grad():
        contrast.main()
    return {row["variant"]: row for row in json.loads(out.read_text())["rows"]}


def test_peers_that_fail_or_draw_other_tokens_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(contrast, "warpers", failing)
    monkeypatch.setattr(contrast, "lean", other)
    rows = rows_of(tmp_path, monkeypatch)
    assert rows["warpers"]["reason"] == rows["warpers+p"]["reason"] == "FileNotFoundError: nvcc is not here"
    assert rows["lean"]["reason"] == "drew 3 of 3 tokens differently" and "p50" not in rows["lean"]
    assert {name for name, row in rows.items() if "p50" in row} == {
        "read", "op", "op+p", "fallback", "fallback+p", "plain", "plain+p",
    }  # fmt: skip
    assert all(row["floor_ms"] > 0 and row["graph"] is None for row in rows.values() if "p50" in row)
    assert "not timed: warpers: FileNotFoundError" in capsys.readouterr().out


def test_no_times_where_ours_draws_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = contrast.op

    def mistaken(*inputs: Tensor, backend: str = "auto") -> Tensor:
        return op(*inputs, backend=backend) + (backend == "torch")

    monkeypatch.setattr(contrast, "op", mistaken)
    with pytest.raises(SystemExit, match="fallback drew 3 of 3 tokens differently: no times"):
        rows_of(tmp_path, monkeypatch)
