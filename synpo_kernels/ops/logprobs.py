"""The custom op between the public API and the backends: implementation, shapes for tracing, autograd.

An op is opaque to torch.compile, which sees its fake implementation alone, so a compiled step neither breaks nor traces
the loops over the vocabulary. Backends are chosen inside, where real tensors are.

    linear_logprobs            with `want_direction` it finishes ∂L/∂x in the forward pass: it keeps U = ∂logp/∂x, the size of x.
                               Backward is one elementwise product, needs neither W nor logits and takes any upstream
                               gradient. With retain_graph=True it may run any number of times; the pass that frees the
                               graph works in U itself, which becomes ∂L/∂x. Without, it is the plain forward pass.
    linear_logprobs_gradients  recomputes the slices for what U does not give: the gradients of a trained head, and of x where
                               no U was kept. For that x, the head and two numbers a row are kept.

LoRA makes of x and W one head of D + r columns, [x, u] and [W, B] (README.md). The first comes concatenated, so that autograd
carries its gradient on to x, A and whatever lies between; the second is put together where it is needed and does not outlive
the pass. Where the head is spread over processes (`parallel`) all communication is in the forward pass.

Rows whose label is `ignore_index` are left out of every product; their results and gradients are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import passes
from ..backends.choice import choose
from ..backends.passes import Forward, Gradients, widest, workspace_of
from ..checks import inside_op
from ..head import Head, compute_dtype
from . import parallel
from .opaque import op
from .scaling import scaled_rows


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
    chosen, size = choose(backend, x), workspace_of(x.device, workspace)
    with inside_op(x):
        return chosen.forward(
            x, head, labels, _used(labels, ignore_index), want_direction=want_direction, workspace=size
        )


def gradients(
    x: Tensor,
    head: Head,
    labels: Tensor,
    ignore_index: int | None,
    backend: str,
    found: Forward,
    upstream: Tensor,
    *,
    want: Sequence[bool],
    workspace: int | None,
    first_column: int = 0,
) -> Gradients:
    """Gradients of (hidden, weight, bias) for upstream (N,) by recomputing the slices; see `passes.gradients`."""
    chosen, ignore_index = choose(backend, x), _used(labels, ignore_index)
    with inside_op(x):
        rows, count = chosen.rows(labels, ignore_index)
        if ignore_index is not None:
            upstream = upstream.where(labels != ignore_index, 0)  # rows past the count have none
        result = passes.gradients(
            passes.in_order(x, rows, count),
            head,
            labels[rows],
            Forward(found.logps[rows], found.normalizer[rows], None),
            upstream[rows],
            chosen.tiles(count),
            workspace_of(x.device, workspace),
            want=want,
            magnify=chosen.magnify(x.dtype),
            first_column=first_column,
        )
    if result.hidden is None or ignore_index is None:
        return result
    hidden = x.new_zeros(x.shape)
    hidden[rows] = result.hidden
    return replace(result, hidden=hidden)


def _used(labels: Tensor, ignore_index: int | None) -> int | None:
    """ignore_index, but None where the host can see that no label has it: the rows are then not gathered."""
    unused = ignore_index is None or (labels.device.type == "cpu" and not (labels == ignore_index).any())
    return None if unused else ignore_index


def _head(weight: Tensor, extra: Tensor | None, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Head:
    return Head(weight if extra is None else torch.cat([weight, extra], 1), bias, softcap, logit_scale)


@op("linear_logprobs")
def linear_logprobs(
    x: Tensor,
    weight: Tensor,
    extra: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    backend: str,
    workspace: int | None,
    group: str,
    want_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, D + r), W (V, D), B (V, r), b (V,), labels (N,) → logps (N,), log-sum-exp (N,), U (N, D + r), labels of the shard.

    logps are differentiable in x, W, B and b. U is empty unless `want_direction`; a caller lets go of it, as the backward pass
    may turn it into ∂L/∂x.

    Args:
        group: name of the process group that W, B and b are spread over by rows; empty: they are whole, and so are the last
            labels.
    """
    head = _head(weight, extra, bias, softcap, logit_scale)
    options: dict[str, Any] = {"want_direction": want_direction, "workspace": workspace}
    if group:
        found, aimed = parallel.forward(x, head, labels, ignore_index, backend, group, **options)
    else:
        found, aimed = forward(x, head, labels, ignore_index, backend, **options), labels.new_empty(0)
    return found.logps, found.normalizer, x.new_empty(0) if found.direction is None else found.direction, aimed


@linear_logprobs.register_fake
def _(x, weight, extra, bias, labels, *options):  # type: ignore[no-untyped-def]
    *_, group, want_direction = options
    logps = x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype))
    direction, aimed = x.new_empty(x.shape if want_direction else 0), labels.new_empty(labels.shape if group else 0)
    return logps, torch.empty_like(logps, dtype=widest(x.device)), direction, aimed


@op("linear_logprobs_gradients")
def linear_logprobs_gradients(
    x: Tensor,
    weight: Tensor,
    extra: Tensor | None,
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
    want: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂L/∂x (N, D + r), ∂L/∂W (V, D), ∂L/∂B (V, r), ∂L/∂b (V,) for upstream (N,); one that is not wanted is empty."""
    want_hidden, want_weight, want_extra, want_bias = want
    first = 0 if want_weight else weight.shape[1]
    head, known = _head(weight, extra, bias, softcap, logit_scale), Forward(logps, normalizer, None)
    options: dict[str, Any] = {"workspace": workspace, "first_column": first}
    options["want"] = (want_hidden, want_weight or want_extra, want_bias)
    found = gradients(x, head, labels, ignore_index, backend, known, upstream, **options)
    d_weight, d_extra = found.weight, None
    if found.weight is not None and extra is not None:
        parts = found.weight.tensor_split([weight.shape[1] - first], 1)
        d_weight, d_extra = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    wanted = zip(want, (found.hidden, d_weight, d_extra, found.bias))
    d_x, d_weight, d_extra, d_bias = (d if w and d is not None else x.new_empty(0) for w, d in wanted)
    return d_x, d_weight, d_extra, d_bias


@linear_logprobs_gradients.register_fake
def _(x, weight, extra, bias, *options):  # type: ignore[no-untyped-def]
    shapes = (x.shape, weight.shape, (0,) if extra is None else extra.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if wanted else (0,)) for wanted, shape in zip(options[-1], shapes))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *head, labels, softcap, logit_scale, ignore_index, backend, workspace, group, ctx.has_direction = inputs
    logps, normalizer, direction, aimed = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(normalizer, direction, aimed)
    if group:
        labels, ignore_index = aimed, parallel.IGNORED
    ctx.options = (softcap, logit_scale, ignore_index, backend, workspace)
    recomputed = not ctx.has_direction or any(t is not None and t.requires_grad for t in head[1:])
    ctx.save_for_backward(direction, *((*head, labels, logps, normalizer) if recomputed else ()))


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 12
    direction, *known = ctx.saved_tensors
    want = list(ctx.needs_input_grad[:4])
    found: list[Tensor | None] = [None] * 4
    finished = want[0] and ctx.has_direction
    if finished:
        want[0] = False
    if any(want):
        every = linear_logprobs_gradients(*known, upstream, *ctx.options, want)
        found = [each if wanted else None for each, wanted in zip(every, want)]
    if finished:
        found[0] = scaled_rows(direction, upstream, ctx.options[3])
    return (*found, *[None] * 8)


linear_logprobs.register_autograd(_backward, setup_context=_keep)
