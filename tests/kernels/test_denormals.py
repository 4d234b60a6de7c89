"""Exponentials too small to matter are 0 before a product sees them: denormal numbers make some CPUs twenty times slower."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import float_flags
from synpo_kernels import _ext
from synpo_kernels.backends import passes
from synpo_kernels.backends.portable import TorchTiles
from synpo_kernels.head import Head

if not _ext.available():
    pytest.skip(f"C++ extension: {_ext.reason}", allow_module_level=True)

LEAST = passes.LEAST
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def head_pass(x: Tensor, weight: Tensor, labels: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.synpo_kernels.head_pass(x, weight, None, labels, softcap, 1.0, 16 << 20, True)


def floats(first: float, last: float, step: int = 1) -> Tensor:
    """Every `step`-th fp32 number from `first` down to `last`, both negative."""
    bits = torch.tensor([first, last]).view(torch.int32)
    return torch.arange(int(bits[0]), int(bits[1]) + 1, step, dtype=torch.int32).view(torch.float32)


def test_every_number_near_the_threshold(isa) -> None:
    """One other token, whose exponential is the sum and, but for its sign, the direction: what was written to the slice."""
    gaps = torch.cat([floats(-69.25, -69.375), floats(-87.25, -87.375), floats(-60.0, -400.0, 997)])
    total, _, direction = head_pass(
        gaps[:, None], torch.tensor([[0.0], [1.0]]), torch.zeros(len(gaps), dtype=torch.long)
    )
    exact = gaps.double().exp()
    kept = exact >= LEAST * (1 + 1e-4)
    assert not total[exact < LEAST].any() and not direction[exact < LEAST].any()
    for found in (total, -direction[:, 0]):
        torch.testing.assert_close(found[kept].double(), exact[kept], rtol=2e-6, atol=0.0)
        assert ((found == 0) | (found >= LEAST)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 60.0])
def test_half_precision_and_softcaps(softcap, dtype, isa) -> None:
    """A softcap's slope makes an exponential smaller still. fp16 holds directions no finer than 2^-24; its slice is fp32."""
    coarse, fine = torch.meshgrid(torch.arange(-55.0, -75.0, -0.5), torch.arange(0.0, 0.5, 2**-7), indexing="ij")
    x = torch.stack([coarse.flatten(), fine.flatten(), torch.full_like(fine, softcap / 3).flatten()], 1)
    weight = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])  # the label's logit is a third of the softcap
    labels = torch.zeros(len(x), dtype=torch.long)
    total, _, direction = head_pass(x.to(dtype), weight.to(dtype), labels, softcap)
    logits = x.double() @ weight.double().T
    ratio = torch.tanh(logits / softcap) if softcap else torch.zeros_like(logits)
    logits = softcap * ratio if softcap else logits
    gap, slope = logits[:, 1] - logits[:, 0], 1 - ratio[:, 1] ** 2
    found = -direction[:, 0].double()
    assert gap.max() > -65 and gap.min() < -70, "the threshold is not crossed"
    assert ((total == 0) | (total >= LEAST)).all()
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 1.0}[dtype]
    assert ((found == 0) | (found >= LEAST * (1 - rounding))).all()
    if dtype != torch.float16:
        kept = gap.exp() * slope > LEAST * 1.02
        expected = gap[kept].exp() * slope[kept]
        torch.testing.assert_close(found[kept], expected, rtol=rounding + 1e-4, atol=0.0)


def problem(spread: float, softcap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and the likeliest labels; with a spread of 20 many exponentials of z - z_y would be denormal."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 96, generator=generator) / math.sqrt(96)
    x = spread * torch.randn(70, 96, generator=generator)
    logits = x @ weight.T
    labels = logits.argmax(1)
    if spread == 20.0 and not softcap:
        gap = logits - logits.gather(1, labels[:, None])
        assert ((gap < -87.34) & (gap > -103.3)).float().mean() > 0.05, "exponentials would not be denormal"
    return x.to(dtype), weight.to(dtype), labels


def noticed(run: Callable[[], object]) -> int:
    """What the floating-point unit noticed, where this thread does all the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = float_flags.noticed(run)
    torch.set_num_threads(threads)
    return flags


PEAKED = pytest.mark.parametrize("spread", [2.0, 20.0, 100.0])
READABLE = pytest.mark.skipif(not float_flags.AVAILABLE, reason="reads a register of x86-64 CPUs under Linux")


@READABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 40.0])
@PEAKED
def test_the_cpu_notices_no_denormal_number(spread, softcap, dtype, isa) -> None:
    """Not in the slice, and not in what is multiplied with it: the flags of the floating-point unit stay clear."""
    inputs = problem(spread, softcap, dtype)
    assert noticed(lambda: head_pass(*inputs, softcap)) == 0


@READABLE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 40.0])
@PEAKED
def test_nor_does_it_in_the_portable_backend(spread, softcap, dtype) -> None:
    x, weight, labels = problem(spread, softcap or 0.0, dtype)
    head, tiles = Head(weight, softcap=softcap), TorchTiles()
    anchor, _ = passes.target_logits(x, head, labels)
    assert noticed(lambda: passes.accumulate(x, head, labels, anchor, tiles, 1 << 18, want_pull=True)) == 0
