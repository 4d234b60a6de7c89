"""Which backend serves, errors that say why not, and an import that needs torch alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from synpo_kernels import _ext, linear_logprobs
from synpo_kernels.backends import choice

ROOT = Path(__file__).resolve().parents[2]


def test_auto_on_a_cpu_even_with_the_interpreter(monkeypatch) -> None:
    """The compiled kernel where it is built, serves the dtype and is faster; plain torch elsewhere."""
    half = torch.zeros(1, dtype=torch.bfloat16)
    extension = SimpleNamespace(isa=lambda: "avx2", on_intel=lambda: False)
    monkeypatch.setattr(_ext, "_C", extension)
    assert choice.choose("auto", torch.zeros(1)).name == "cpu"
    assert choice.choose("auto", torch.zeros(1, dtype=torch.float64)).name == "chunked"
    assert choice.choose("auto", torch.zeros(1, device="meta")).name == "chunked"
    extension.on_intel = lambda: True  # whose library is the faster one for fp32
    assert choice.choose("auto", torch.zeros(1)).name == "chunked"
    assert choice.choose("auto", half).name == choice.choose("cpu", torch.zeros(1)).name == "cpu"
    extension.isa = lambda: "portable"
    assert choice.choose("auto", half).name == "chunked"
    assert choice.choose("cpu", half).name == "cpu"
    monkeypatch.setattr(_ext, "_C", None)
    assert choice.choose("auto", half).name == "chunked"


def test_the_compiled_kernel_says_why_it_cannot_serve(monkeypatch) -> None:
    with pytest.raises(ValueError, match="float64; use backend='chunked'"):
        choice.choose("cpu", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="runs on CPUs, hidden is on meta"):
        choice.choose("cpu", torch.zeros(1, device="meta"))
    monkeypatch.setattr(_ext, "_C", None)
    monkeypatch.setattr(_ext, "reason", "not built here")
    with pytest.raises(ValueError, match="not built here; use backend='chunked'"):
        choice.choose("cpu", torch.zeros(1))


def test_auto_and_triton_on_this_device(device) -> None:
    assert choice.choose("triton", torch.zeros(1, device=device)).name == "triton"
    if device.type == "cuda":
        assert choice.choose("auto", torch.zeros(1, device=device)).name == "triton"


def test_auto_on_a_gpu_without_triton_says_so(monkeypatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32)
    with pytest.warns(UserWarning, match="run on plain torch: triton is not installed"):
        assert choice.choose("auto", on_gpu).name == "chunked"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"'auto' or one of \['chunked', 'cpu', 'triton'\], got 'cuda'"):
        linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="cuda")


def test_triton_says_why_it_cannot_serve(monkeypatch) -> None:
    with pytest.raises(ValueError, match="float64"):
        choice.choose("triton", torch.zeros(1, dtype=torch.float64))
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="need a CUDA device, hidden is on cpu; use backend='chunked'"):
        choice.choose("triton", torch.zeros(1))
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        choice.choose("triton", torch.zeros(1))


GOOD = {
    "hidden": torch.zeros(4, 8),
    "head": torch.zeros(10, 8),
    "labels": torch.zeros(4, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": torch.zeros(10, 9)}, r"must share D, got \(4, 8\) and \(10, 9\)"),
        ({"head": torch.zeros(0)}, "a sharded weight must be gathered first"),
        ({"head": torch.zeros(0, 8)}, "at least one vocabulary entry"),
        (
            {"head": torch.zeros(10, 8, dtype=torch.bfloat16)},
            "weight must have the dtype of hidden, torch.float32, got",
        ),
        ({"head": torch.zeros(10, 8, device="meta")}, "weight must be on the device of hidden, cpu, got meta"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels must be int64 of shape \(4,\)"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "got torch.int32"),
        ({"labels": torch.tensor([0, 1, 10, -100])}, r"labels must lie in \[0, 10\).*from 0 to 10"),
        ({"labels": torch.tensor([0, 1, -1, -100])}, "from -1 to 1"),
        ({"labels": torch.tensor([0, 1, 2, -100]), "ignore_index": None}, "from -100 to 2"),
        ({"bias": torch.zeros(8)}, r"bias must be \(10,\)"),
        ({"bias": torch.zeros(10, dtype=torch.float64)}, "bias must have the dtype"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"hidden": torch.zeros(4, 8).int(), "head": torch.zeros(10, 8).int()}, "hidden must be float64"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**GOOD, **change})


IMPORT = """
import sys
for name in ("transformers", "synpo", "triton", "peft", "accelerate"):
    sys.modules[name] = None  # import raises ImportError
import torch
import synpo_kernels
hidden = torch.randn(4, 3, 8, requires_grad=True)
out = synpo_kernels.FusedLinearSynPOLoss()(hidden, torch.randn(11, 8), torch.randint(0, 11, (4, 3)))
out.loss.backward()
assert torch.isfinite(hidden.grad).all() and out.loss.item() < 0
print("ran", sorted(name for name in sys.modules if name.startswith(("synpo_kernels.kernels", "synpo_kernels.backends.gpu"))))
"""


def test_import_and_loss_with_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ran []"


def test_every_module_but_the_kernels_imports_without_triton() -> None:
    """find_spec finds them; a missing triton is named as the reason, not a traceback."""
    code = IMPORT.split("hidden =")[0] + "\nfrom synpo_kernels.backends import choice\nimport importlib.util\n"
    code += "choice.find_spec = lambda name: None\nprint(choice.triton_supports(torch.zeros(1))[1])\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "triton is not installed" in done.stdout, done.stderr
    assert importlib.util.find_spec("synpo_kernels.backends.gpu") is not None
