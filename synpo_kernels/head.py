"""The language-model head as every backend sees it, and the number formats its arithmetic runs in.

    z = cap(logit_scale · (x Wᵀ + b)),    cap(r) = softcap · tanh(r / softcap), or r when there is no softcap

Shape legend (all files of this package): N rows, D hidden size, V vocabulary, S = 2B sequences, B pairs, T padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import _ext


@dataclass(frozen=True)
class Head:
    """A linear head and what turns its product into logits."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0

    def columns(self, chunk: slice) -> Head:
        """The head restricted to a chunk of the vocabulary: views, no copy."""
        bias = None if self.bias is None else self.bias[chunk]
        return replace(self, weight=self.weight[chunk], bias=bias)

    def cap(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and softcap `raw` = x Wᵀ + b in place.

        Returns (z, slope): the logits, and ∂z / ∂(logit_scale · raw) = 1 - tanh² under a softcap (None stands for ones).
        """
        if self.logit_scale != 1.0:
            raw.mul_(self.logit_scale)
        if self.softcap is None:
            return raw, None
        ratio = raw.div_(self.softcap).tanh_()
        slope = ratio.square().neg_().add_(1.0)
        return ratio.mul_(self.softcap), slope


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Format of logits, sums and accumulators: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def taken_whole(matrix: Tensor) -> bool:
    """Whether products of half-precision matrices such as this one are taken in their own format, summed in fp32.

    So tensor cores do it for bf16 and fp16, and on a CPU the extension for bf16; torch itself rounds the sums there.
    """
    return matrix.is_cuda or (matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and _ext.multiplies())


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of equal dtypes, accumulated and returned in fp32 (float64 for float64)."""
    if a.dtype == compute_dtype(a.dtype):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    total = a.new_zeros(len(a), b.shape[1], dtype=torch.float32)
    add_matmul(total, a, b)
    return total


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place; a and b of equal dtypes, `total` in their compute dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif taken_whole(a):
        torch.ops.synpo_kernels.add_product(total, a, b)
    else:
        total.addmm_(a.float(), b.float())
