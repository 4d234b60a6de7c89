"""The autograd.Functions between the public API and the backends, nothing else.

`FrozenHead` finishes its gradient in the forward pass (it keeps U = ∂logp/∂x, the size of x): backward is one
elementwise product, needs neither W nor logits, takes any upstream gradient and may run any number of times.
`TrainedHead` keeps x, W and two numbers a row, and recomputes the slices in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import Backend
from .head import Head
from .passes import Forward


class FrozenHead(torch.autograd.Function):
    """x (N, D) → logps (N,), differentiable in x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Head, labels: Tensor, backend: Backend) -> Tensor:
        result = backend.forward(x, head, labels, want_direction=True)
        ctx.save_for_backward(result.direction)
        return result.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (direction * upstream[:, None]).to(direction.dtype), None, None, None


class TrainedHead(torch.autograd.Function):
    """x (N, D), W (V, D), b (V,) or None → logps (N,), differentiable in all three."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        labels: Tensor,
        backend: Backend,
    ) -> Tensor:
        result = backend.forward(x, Head(weight, bias, softcap, logit_scale), labels, want_direction=False)
        ctx.save_for_backward(x, weight, bias, labels, result.logps, result.normalizer)
        ctx.softcap, ctx.logit_scale, ctx.backend = softcap, logit_scale, backend
        return result.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, labels, logps, normalizer = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):  # the products below choose their own precision
            found = ctx.backend.gradients(
                x,
                Head(weight, bias, ctx.softcap, ctx.logit_scale),
                labels,
                Forward(logps, normalizer, None),
                upstream,
                want=ctx.needs_input_grad[:3],
            )
        return found.hidden, found.weight, found.bias, None, None, None, None
