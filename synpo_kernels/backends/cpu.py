"""The compiled backend for CPUs: both products of the frozen head's pass in the C++ extension, logits never in memory.

A chunk of W is packed for each product; each tile of logits becomes exponentials while it is in cache, which the
second product takes at once. x is packed once, the sum E' is held in fp32: a block of rows takes half the workspace with the two,
the chunks of W and the exponentials the rest. Results are the same bit for bit for any number of threads (torch's own:
OMP_NUM_THREADS, torch.set_num_threads).

    instruction set   bfloat16                                    float32, float16
    amx               tile registers                              as avx512
    avx512_bf16       dot products of bf16 pairs                  as avx512
    avx512, avx2      widened to fp32 while packing               fp32, float16 widened
    portable          the same without vector instructions: for tests, "auto" prefers plain torch

The first of these that the CPU has is taken, but no dot products of bf16 on Intel's, where widening is faster: a rule, not a
timing, so that a run that is resumed rounds as before. SYNPO_CPU_ISA names another. "auto" leaves fp32 on Intel's CPUs to plain
torch (`_ext.outdoes_library`). "amx-emulated" is the path of "amx" with the tile registers in memory, for tests on other CPUs.

With bf16 instructions exponentials are rounded to bf16 for the second product, whose sums are fp32; the sum of a row's
exponentials is taken before that.

Gradients of a trained head are the portable backend's, as are heads whose rows are not contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ext
from ..head import Head
from . import passes, portable
from .passes import Forward


def instruction_set() -> str:
    """Name of the instruction set in use.

    Raises:
        ValueError: SYNPO_CPU_ISA names one that is unknown or that this CPU lacks. RuntimeError: no extension.
    """
    return _ext.module().isa()


def forward(
    x: Tensor, head: Head, labels: Tensor, ignore_index: int | None, *, want_direction: bool, workspace: int
) -> Forward:
    """Log-probabilities (N,) of `labels` and, if wanted, U (N, D) = ∂logp/∂x, 0 where ignored, in one pass; see `passes`."""
    if head.weight.stride(1) != 1 and x.shape[1] != 1:
        return portable.forward(x, head, labels, ignore_index, want_direction=want_direction, workspace=workspace)
    instruction_set()
    if ignore_index is None:
        return _rows(x, head, labels, want_direction, workspace)
    found = portable.nothing(x, want_direction)
    step = max(
        1, workspace // 2 // max(1, x.shape[1] * x.element_size())
    )  # a copy of so many rows, and half for the pass
    for rows in passes.blocks(labels, ignore_index, step):
        portable.put(found, rows, _rows(x[rows], head, labels[rows], want_direction, workspace // 2))
    return found


def _rows(x: Tensor, head: Head, labels: Tensor, want_direction: bool, workspace: int) -> Forward:
    total, target, direction = torch.ops.synpo_kernels.head_pass(
        x.contiguous(),
        head.weight,
        head.bias,
        labels.contiguous(),
        head.softcap or 0.0,
        head.logit_scale,
        workspace,
        want_direction,
    )
    logps = (target - target) - torch.log1p(total)  # NaN where the row is not finite, which must stay visible
    found = Forward(logps, passes.log_sum_exp(target, total), direction if want_direction else None)
    flagged = (total > passes.OVERFLOW).nonzero().squeeze(1)
    if flagged.numel():
        again = portable.forward(
            x[flagged], head, labels[flagged], None, want_direction=want_direction, workspace=workspace
        )
        portable.put(found, flagged, again)
    return found
