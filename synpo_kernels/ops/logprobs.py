"""The custom ops between the public API and the backends: implementation, shapes for tracing, autograd.

An op is opaque to torch.compile, which sees its fake implementation alone, so a compiled step neither breaks nor traces
the loops over the vocabulary. Backends are chosen inside, where real tensors are.

    linear_logprobs_frozen     finishes its gradient in the forward pass: it keeps U = ∂logp/∂x, the size of x. Backward
                               is one elementwise product, needs neither W nor logits, takes any upstream gradient and
                               may run any number of times.
    linear_logprobs_trained    keeps x, W and two numbers a row; `linear_logprobs_gradients` recomputes the slices.
                               Without gradients it is the plain forward pass; with a frozen head, and `low`, the
                               recomputation that takes the place of U.

Rows whose label is `ignore_index` are left out of every product; their results and gradients are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.choice import Backend, choose
from ..backends.passes import Forward, cut, low_rows
from ..checks import inside_op
from ..head import Head, compute_dtype


def forward(
    x: Tensor, head: Head, labels: Tensor, ignore_index: int | None, backend: str, *, want_direction: bool, low: bool
) -> Forward:
    """x (N, D), labels (N,) → `Forward` with N rows, 0 where ignored. low: a block of rows at a time, smaller slices."""
    chosen = choose(backend, x)
    ignore_index = _used(labels, ignore_index)
    with inside_op(x):
        if ignore_index is None and not low:
            return chosen.forward(x, head, labels, want_direction=want_direction)
        logps = x.new_zeros(len(x), dtype=compute_dtype(x.dtype))
        normalizer, direction = torch.zeros_like(logps), x.new_zeros(x.shape) if want_direction else None
        aimed = _aimed(labels, ignore_index)
        for at, count in _blocks(chosen, x, labels, ignore_index, low):
            found = chosen.forward(x[at], head, aimed[at], want_direction=want_direction, count=count, low=low)
            logps[at], normalizer[at] = found.logps, found.normalizer
            if direction is not None and found.direction is not None:
                direction[at] = found.direction
    return Forward(logps, normalizer, direction)


def gradients(
    x: Tensor,
    head: Head,
    labels: Tensor,
    ignore_index: int | None,
    backend: str,
    found: Forward,
    upstream: Tensor,
    want: tuple[bool, bool, bool],
    low: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias) for upstream (N,); one that is not wanted is empty.

    low: smaller slices, and a block of rows at a time where the hidden states alone want a gradient (one of the head is a
    sum over all rows, finished chunk by chunk of the vocabulary).
    """
    chosen = choose(backend, x)
    ignore_index = _used(labels, ignore_index)
    d_hidden, d_weight, d_bias = x.new_zeros(x.shape if want[0] else 0), x.new_empty(0), x.new_empty(0)
    aimed = _aimed(labels, ignore_index)
    with inside_op(x):
        for at, count in _blocks(chosen, x, labels, ignore_index, low and want == (True, False, False)):
            known = Forward(found.logps[at], found.normalizer[at], None)
            result = chosen.gradients(x[at], head, aimed[at], known, upstream[at], want=want, count=count, low=low)
            if result.hidden is not None:
                d_hidden[at] = result.hidden
            if result.weight is not None:
                d_weight = result.weight
            if result.bias is not None:
                d_bias = result.bias
    return d_hidden, d_weight, d_bias


def _blocks(
    backend: Backend, x: Tensor, labels: Tensor, ignore_index: int | None, low: bool
) -> Iterator[tuple[Tensor | slice, Tensor | None]]:
    """Yield (rows to compute, how many of them count) in one block, or with `low` in several; see `Partition`."""
    rows, count = (None, None) if ignore_index is None else backend.partition(labels, ignore_index)
    total = len(x) if rows is None else len(rows)
    for block in cut(total, low_rows(x)) if low else [slice(0, total)]:
        yield block if rows is None else rows[block], None if count is None else count - block.start


def _used(labels: Tensor, ignore_index: int | None) -> int | None:
    """ignore_index, but None where the host can see that no label has it: the rows are then not gathered."""
    unused = ignore_index is None or (labels.device.type == "cpu" and not (labels == ignore_index).any())
    return None if unused else ignore_index


def _aimed(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Labels that can be looked up: 0 in place of ignore_index."""
    return labels if ignore_index is None else labels.where(labels != ignore_index, 0)


@torch.library.custom_op("synpo_kernels::linear_logprobs_frozen", mutates_args=())
def frozen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """x (N, D), W (V, D), labels (N,) → logps (N,), U (N, D); differentiable in x alone."""
    head = Head(weight, bias, softcap, logit_scale)
    found = forward(x, head, labels, ignore_index, backend, want_direction=True, low=False)
    assert found.direction is not None
    return found.logps, found.direction


@frozen.register_fake
def _(x, weight, bias, labels, softcap, logit_scale, ignore_index, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype)), x.new_empty(x.shape)


def _keep_direction(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


@once_differentiable
def _frozen_backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    (direction,) = ctx.saved_tensors
    if upstream is None:
        return (None,) * 8
    # multiplied in the wider dtype and rounded once, without a copy of U in that dtype
    return (torch.mul(direction, upstream[:, None], out=torch.empty_like(direction)), *[None] * 7)


frozen.register_autograd(_frozen_backward, setup_context=_keep_direction)


@torch.library.custom_op("synpo_kernels::linear_logprobs_trained", mutates_args=())
def trained(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    backend: str,
    low: bool,
) -> tuple[Tensor, Tensor]:
    """x (N, D), W (V, D), b (V,), labels (N,) → logps (N,), log-sum-exp (N,); logps differentiable in x, W and b."""
    head = Head(weight, bias, softcap, logit_scale)
    found = forward(x, head, labels, ignore_index, backend, want_direction=False, low=low)
    return found.logps, found.normalizer


@trained.register_fake
def _(x, weight, bias, labels, softcap, logit_scale, ignore_index, backend, low):  # type: ignore[no-untyped-def]
    logps = x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype))
    return logps, torch.empty_like(logps)


@torch.library.custom_op("synpo_kernels::linear_logprobs_gradients", mutates_args=())
def trained_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logps: Tensor,
    normalizer: Tensor,
    upstream: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    backend: str,
    low: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂x (N, D), ∂L/∂W (V, D), ∂L/∂b (V,) for upstream (N,); one that is not wanted is empty."""
    head, found = Head(weight, bias, softcap, logit_scale), Forward(logps, normalizer, None)
    want = (want_hidden, want_weight, want_bias)
    return gradients(x, head, labels, ignore_index, backend, found, upstream, want, low)


@trained_gradients.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    labels,
    logps,
    normalizer,
    upstream,
    softcap,
    logit_scale,
    ignore_index,
    backend,
    low,
    want_hidden,
    want_weight,
    want_bias,
):
    shapes = ((want_hidden, x.shape), (want_weight, weight.shape), (want_bias, weight.shape[:1]))
    return tuple(x.new_empty(shape if wanted else (0,)) for wanted, shape in shapes)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, labels, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, labels, *output)


@once_differentiable
def _trained_backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 9
    want = ctx.needs_input_grad[:3]
    found = trained_gradients(*ctx.saved_tensors, upstream, *ctx.options, *want)
    return (*(gradient if wanted else None for gradient, wanted in zip(found, want)), *[None] * 6)


trained.register_autograd(_trained_backward, setup_context=_keep_inputs)
