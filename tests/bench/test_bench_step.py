"""The step benchmark: right providers get times and memory, wrong ones a reason, absent ones are listed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import measure, step, steps

SIZE = {"hidden": 64, "layers": 1, "vocab": 512, "prompt": 24, "answer": 5, "pairs": 2}
TINY = [*(f"--{name}={value}" for name, value in SIZE.items()), "--device=cpu", "--time-budget=0.1"]


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in json.loads(out.with_suffix(".json").read_text())["rows"]}


def test_everyone_is_checked_timed_and_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([*TINY, "--out", str(tmp_path / "step")]) == 0
    rows = rows_of(tmp_path / "step")
    assert set(rows) == {"synpo shared", "synpo padded", "synpo usual", "dpo shared", "dpo trl", "dpo trl rows"}
    for name, row in rows.items():
        if "trl" in name and row["status"] == "absent":
            assert "trl" in row["reason"] or "No module" in row["reason"]
            continue
        assert row["status"] == "ok", row
        assert row["gradient_error"] < 1e-4
        assert row["runs"] >= 3
        assert row["pairs_per_second"] == pytest.approx(2000 / row["p50_ms"])
        assert row["peak_mib"] > 0
        assert row["plan_mib"] is None or 0.6 < row["peak_mib"] / row["plan_mib"] < 1.2
    assert all(rows[name]["plan_mib"] for name in ("synpo shared", "synpo padded"))
    printed = capsys.readouterr().out
    assert "synpo shared" in printed and "x trl" in printed
    assert (tmp_path / "step.csv").read_text().count("\n") == 7


def test_a_provider_with_another_loss_shows_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(size: Any, model: Any, device: torch.device) -> steps.Step:
        built = steps._ours("synpo", True, size, model, device)
        loss = built.loss
        built.loss = lambda: 1.01 * loss()
        return built

    monkeypatch.setattr(steps, "providers", lambda: iter([steps.Provider("synpo other", "synpo", other, "")]))
    assert step.main([*TINY, "--out", str(tmp_path / "step")]) == 1
    (row,) = rows_of(tmp_path / "step").values()
    assert row["status"] == "wrong"
    assert "loss off by 1.0e-02" in row["reason"]
    assert row["p50_ms"] is None


def test_a_peer_that_fails_at_full_size_is_listed_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(size: Any, model: Any, device: torch.device) -> steps.Step:
        if size.prompt == SIZE["prompt"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n28 GiB")
        return steps._usual("synpo", size, model, device)

    def odd(size: Any, model: Any, device: torch.device) -> steps.Step:
        raise AssertionError  # without a word

    ours = next(steps.providers())
    peers = [steps.Provider("peer greedy", "synpo", greedy, ""), steps.Provider("peer odd", "synpo", odd, ""), ours]
    monkeypatch.setattr(steps, "providers", lambda: iter(peers))
    assert step.main([*TINY, "--out", str(tmp_path / "step")]) == 0
    rows = rows_of(tmp_path / "step")
    assert rows["peer greedy"]["status"] == "failed" and "out of memory" in rows["peer greedy"]["reason"]
    assert rows["peer odd"]["status"] == "absent" and rows["peer odd"]["reason"].startswith("AssertionError")
    assert rows[ours.name]["status"] == "ok" and rows[ours.name]["runs"] >= 3
    assert "peer greedy    failed: OutOfMemoryError" in capsys.readouterr().out


def test_tensors_alive_are_added_up() -> None:
    def run() -> torch.Tensor:
        first = torch.ones(1 << 20)  # 4 MiB
        second = first + first
        del first
        return second.double()[:1].clone()

    peak = measure.peak_tensor_bytes(run, torch.device("cpu"))
    assert abs(peak - 12 * 2**20) < 2**12, "two of 4 MiB, or one and its double of 8"
