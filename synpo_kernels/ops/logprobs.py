"""The custom ops between the public API and the backends: implementation, shapes for tracing, autograd.

An op is opaque to torch.compile, which sees its fake implementation alone, so a compiled step neither breaks nor traces
the loops over the vocabulary. Backends are chosen inside, where real tensors are.

    linear_logprobs_frozen     finishes its gradient in the forward pass: it keeps U = ∂logp/∂x, the size of x. Backward
                               is one elementwise product, needs neither W nor logits and takes any upstream gradient. With
                               retain_graph=True it may run any number of times; the pass that frees the graph works in U
                               itself, which becomes ∂L/∂x.
    linear_logprobs_trained    keeps x, W and two numbers a row; `linear_logprobs_gradients` recomputes the slices.
                               Without gradients it is the plain forward pass.

Rows whose label is `ignore_index` are left out of every product; their results and gradients are 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.choice import choose
from ..backends.passes import Forward, in_order, widest, workspace_of
from ..checks import inside_op, may_overwrite
from ..head import Head, compute_dtype


def forward(
    x: Tensor,
    head: Head,
    labels: Tensor,
    ignore_index: int | None,
    backend: str,
    *,
    want_direction: bool,
    workspace: int | None,
) -> Forward:
    """x (N, D), labels (N,) → `Forward` with N rows, 0 where ignored."""
    chosen = choose(backend, x)
    size = workspace_of(x.device, workspace)
    with inside_op(x):
        options: dict[str, Any] = {"want_direction": want_direction, "workspace": size}
        return chosen.forward(x, head, labels, _used(labels, ignore_index), **options)


def gradients(
    x: Tensor,
    head: Head,
    labels: Tensor,
    ignore_index: int | None,
    backend: str,
    found: Forward,
    upstream: Tensor,
    want: tuple[bool, bool, bool],
    workspace: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias) for upstream (N,); one that is not wanted is empty."""
    chosen = choose(backend, x)
    size, ignore_index = workspace_of(x.device, workspace), _used(labels, ignore_index)
    d_hidden, d_weight, d_bias = x.new_zeros(x.shape if want[0] else 0), x.new_empty(0), x.new_empty(0)
    rows: Tensor | slice = slice(None)
    count = None
    if ignore_index is not None:
        rows, count = chosen.partition(labels, ignore_index)
        labels = labels.where(labels != ignore_index, 0)  # what can be looked up
    with inside_op(x):
        known = Forward(found.logps[rows], found.normalizer[rows], None)
        options: dict[str, Any] = {"want": want, "workspace": size, "count": count}
        result = chosen.gradients(in_order(x, rows, count), head, labels[rows], known, upstream[rows], **options)
    if result.hidden is not None:
        d_hidden[rows] = result.hidden
    return (
        d_hidden,
        d_weight if result.weight is None else result.weight,
        d_bias if result.bias is None else result.bias,
    )


def _used(labels: Tensor, ignore_index: int | None) -> int | None:
    """ignore_index, but None where the host can see that no label has it: the rows are then not gathered."""
    unused = ignore_index is None or (labels.device.type == "cpu" and not (labels == ignore_index).any())
    return None if unused else ignore_index


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
    workspace: int | None,
    private: bool,
) -> tuple[Tensor, Tensor]:
    """x (N, D), W (V, D), labels (N,) → logps (N,), U (N, D); differentiable in x alone.

    private: the caller lets go of U, which the backward pass may then turn into ∂L/∂x.
    """
    head = Head(weight, bias, softcap, logit_scale)
    found = forward(x, head, labels, ignore_index, backend, want_direction=True, workspace=workspace)
    assert found.direction is not None
    return found.logps, found.direction


@frozen.register_fake
def _(x, weight, bias, labels, softcap, logit_scale, ignore_index, backend, workspace, private):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype)), x.new_empty(x.shape)


def _keep_direction(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.private = inputs[-1]


@once_differentiable
def _frozen_backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    (direction,) = ctx.saved_tensors
    if upstream is None:
        return (None,) * 10
    # multiplied in the wider dtype and rounded once; in U itself where this backward pass is its last reader
    out = direction if ctx.private and may_overwrite(direction) else torch.empty_like(direction)
    return (torch.mul(direction, upstream[:, None], out=out), *[None] * 9)


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
    workspace: int | None,
) -> tuple[Tensor, Tensor]:
    """x (N, D), W (V, D), b (V,), labels (N,) → logps (N,), log-sum-exp (N,); logps differentiable in x, W and b."""
    head = Head(weight, bias, softcap, logit_scale)
    found = forward(x, head, labels, ignore_index, backend, want_direction=False, workspace=workspace)
    return found.logps, found.normalizer


@trained.register_fake
def _(x, weight, bias, labels, softcap, logit_scale, ignore_index, backend, workspace):  # type: ignore[no-untyped-def]
    logps = x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype))
    return logps, torch.empty_like(logps, dtype=widest(x.device))


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
    workspace: int | None,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂x (N, D), ∂L/∂W (V, D), ∂L/∂b (V,) for upstream (N,); one that is not wanted is empty."""
    head, found = Head(weight, bias, softcap, logit_scale), Forward(logps, normalizer, None)
    want = (want_hidden, want_weight, want_bias)
    return gradients(x, head, labels, ignore_index, backend, found, upstream, want, workspace)


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
    workspace,
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
