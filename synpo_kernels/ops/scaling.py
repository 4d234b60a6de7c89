"""The end of a backward pass: what the forward pass kept, times the upstream gradient; in place where nobody reads it again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.choice import choose
from ..checks import inside_op


def may_overwrite(kept: Tensor) -> bool:
    """Whether a backward pass may write to what its node kept: the graph is freed behind it, and nothing is traced."""
    traced = type(kept) is not Tensor or torch._is_functional_tensor(kept) or torch.compiler.is_compiling()
    return not traced and not torch._C._autograd._get_current_graph_task_keep_graph()


def scaled(kept: Tensor, factor: Tensor, backend: str) -> Tensor:
    """kept (...) times factor (), in the dtype of kept."""
    if not may_overwrite(kept):
        return (kept * factor).to(kept.dtype)
    if choose(backend, kept).name == "triton":
        from ..kernels import rows  # imports triton

        with inside_op(kept):
            rows.scale(kept, factor)
        return kept
    return kept.mul_(factor)


def put_rows(values: Tensor, factor: Tensor, out: Tensor, rows: Tensor | slice, backend: str) -> None:
    """out[rows] = values (n, D) times factor (n,), taken in the wider of their dtypes and rounded once to that of out."""
    if backend == "triton" and values.stride(1) == 1:
        from ..kernels import rows as kernels  # imports triton

        kernels.scale_rows(values, factor.contiguous(), out, None if isinstance(rows, slice) else rows)
    else:
        out[rows] = torch.mul(values, factor[:, None], out=torch.empty_like(values, dtype=out.dtype))


def scaled_rows(kept: Tensor, factor: Tensor, backend: str) -> Tensor:
    """kept (N, D) times factor (N,), taken in the wider of their dtypes and rounded once to that of kept."""
    if not may_overwrite(kept):
        return torch.mul(kept, factor[:, None], out=torch.empty_like(kept))
    if choose(backend, kept).name == "triton":
        from ..kernels import rows  # imports triton

        with inside_op(kept):
            rows.scale_rows(kept, factor.contiguous(), kept)
        return kept
    return torch.mul(kept, factor[:, None], out=kept)
