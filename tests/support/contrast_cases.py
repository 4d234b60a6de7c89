"""What the tests of contrastive sampling share: the definition as a loop, random logits, and the backends of the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from synpo_kernels import _ext

INF, NAN = math.inf, math.nan
needs_extension = pytest.mark.skipif(not _ext.available(), reason=f"C++ extension: {_ext.reason}")
BACKENDS = [pytest.param("cpp", marks=needs_extension), "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def naive(expert: Tensor, amateur: Tensor | None, u: float, **options: float) -> tuple[int, float]:
    """The definition for one row, one step a line, in Python floats; logits are mixed in fp32 as documented."""
    alpha, plausibility = options.get("alpha", 0.5), options.get("plausibility", 0.0)
    e = expert.float()
    mixed = e if amateur is None or alpha == 0 else e * (1 + alpha) - amateur.float() * alpha
    cutoff = float(e.max() + math.log(plausibility)) if plausibility > 0 else -INF
    left = [(x, v) for v, (x, y) in enumerate(zip(mixed.tolist(), e.tolist())) if y >= cutoff and y > -INF]
    left.sort(key=lambda pair: (-pair[0], pair[1]))
    temperature = options.get("temperature", 1.0)
    if temperature == 0:
        temperature, u = 1.0, 0.0
    left = left[: int(options.get("top_k", 0)) or None]
    weights = [math.exp((x - left[0][0]) / temperature) for x, _ in left]
    mass = [sum(weights[: i + 1]) for i in range(len(weights))]
    nucleus = next(i for i, m in enumerate(mass) if m >= options.get("top_p", 1.0) * mass[-1] or i + 1 == len(mass))
    weights = [w for w in weights[: nucleus + 1] if w >= options.get("min_p", 0.0)]
    total, running = sum(weights), 0.0
    for weight, (_, v) in zip(weights, left):
        running += weight
        if running > u * total:
            return v, math.log(weight / total)
    raise AssertionError("u must be below 1")


def random_logits(
    rows: int, vocab: int, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, V) of an expert and of an amateur, and uniform numbers (B,)."""
    generator = torch.Generator().manual_seed(seed)
    expert = 3 * torch.randn(rows, vocab, generator=generator)
    amateur = expert + torch.randn(rows, vocab, generator=generator)
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    return expert.to(device, dtype), amateur.to(device, dtype), uniform.to(device)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6, equal_nan=True)
