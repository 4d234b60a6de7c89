"""What doctor says is what will be done."""

import shutil

import pytest
import torch

from synpo import doctor, onednn
from synpo.cli import main
from synpo_kernels import _ext
from synpo_kernels.backends import choice

GPU = {"C++ extension": "C++ extension version 1", "AMX": "this CPU has none", "torch": "2.13", "triton": "3.7"}


def test_everything_that_decides_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in ("CPU", "memory", "AMX", "Java", "C++ extension", "loss in bfloat16", "attention", *doctor.OPTIONAL):
        assert name in shown, name
    assert shown.splitlines()[-1].startswith("advice: ")
    found = doctor.facts()
    assert found["memory"].endswith("GiB") and found["AMX"] == onednn.described()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_backend_named_is_the_one_chosen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert doctor._loss(cpu, dtype).startswith(choice.choose("auto", torch.empty(0, 8, dtype=dtype)).name + ": ")
    monkeypatch.setattr(_ext, "_C", None)
    monkeypatch.setattr(_ext, "reason", "the C++ extension is not built; run this")
    assert doctor._loss(cpu, dtype) == "chunked: plain torch, as the C++ extension is not built; run this"
    if dtype == torch.float32:
        monkeypatch.undo()
        monkeypatch.setattr(choice, "_cpu_is_best", lambda hidden: False)
        if choice.cpu_supports(torch.empty(0, 8))[0]:
            assert doctor._loss(cpu, dtype) == "chunked: plain torch, as its own products are faster on this CPU"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"C++ extension": "the C++ extension is not built; run this"},
            "plain torch: the C++ extension is not built; run this",
        ),
        ({"C++ extension": "the C++ extension was built from other sources"}, "the loss runs on plain torch"),
        ({"AMX": "advertised, but a bfloat16 product dies"}, "an AMX that it does not grant"),
        ({}, "no GPU: small models"),
        ({"cuda:0": "A, sm_86, 24 GiB", "attention": "torch's"}, "--set model.quantization=nf4"),
        ({"cuda:0": "A, sm_90, 80 GiB", "attention": "torch's"}, "flash-attn would be used"),
        ({"cuda:0": "A, sm_90, 80 GiB", "attention": "torch's", "triton": "not installed"}, "pip install triton"),
        ({"cuda:0": "A, sm_90, 80 GiB", "attention": "flash-attn"}, "nothing is missing"),
    ],
)
def test_one_piece_of_advice(change: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert said in doctor.advice(GPU | change)


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "torch 2.13 does not see it" in doctor.advice(GPU)
