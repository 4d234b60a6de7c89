"""The table of what fits where: estimated on any machine, and two real steps of a small model, quantized or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import architectures, fit
from bench.architectures import Architecture


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    text = architectures._text(64, 2, 4, 2, 128, 600, False)
    made = Architecture("small", 0.1, lambda: architectures._llama(**text), lambda frames: 0)
    monkeypatch.setitem(architectures.ARCHITECTURES, "small", made)
    monkeypatch.setattr(fit, "TEXT", 24)
    return "small"


def test_without_a_gpu_everything_is_estimated(small: str, tmp_path: Path, capsys: Any) -> None:
    assert fit.main(["--models", small, "--device", "cpu", "--answer", "5", "--out", str(tmp_path / "fit")]) == 0
    shown = capsys.readouterr().out
    assert "estimated: no GPU has confirmed it" in shown and "| small, 34 | QLoRA, checkpointed |" in shown
    rows = json.loads((tmp_path / "fit.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["estimated"] * 4
    assert all(row["largest"]["8GB"] > 1 and row["plan_gib"] > 0 for row in rows)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rows_are_confirmed_by_two_real_steps(quantization: str, small: str) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'synpo[qlora]')")
    device = torch.device("cpu")
    (row,) = (
        row
        for row in fit.estimated(architectures.ARCHITECTURES[small], 8, 5, 4)
        if row.quantization == quantization and row.checkpointing
    )
    losses = []

    def make() -> Any:
        step = fit.ours(row, 5, 4, device)
        losses.append(float(step.loss().detach()))
        assert all("lora" in name for name in step.parameters) and len(step.parameters) == 2 * 7 * 2
        return step

    found = fit.confirmed(row, make, device)
    assert (found.status, found.reason) == ("measured", "") and found.pairs_per_second
    assert losses[0] == losses[0]


def test_what_a_row_raises_is_its_reason(small: str) -> None:
    (row, *_) = fit.estimated(architectures.ARCHITECTURES[small], 8, 5, 4)

    def make() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n28 GiB")

    found = fit.confirmed(row, make, torch.device("cpu"))
    assert found.status == "failed" and found.reason.startswith("OutOfMemoryError: CUDA out of memory")
