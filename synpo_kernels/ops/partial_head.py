"""The op for heads that are trained in part, or held in parts: it keeps U = ∂logp/∂x, as the frozen one does, and
recomputes the slices for what the head itself needs.

    LoRA on the head         z = x Wᵀ + u Bᵀ, u = scaling · x Aᵀ: with x̂ = [x, u] and Ŵ = [W, B] it is one head (V, D + r).
                             Forward 2 G (1 + r/D); backward G (1 + r/D) for the slices and G r/D for ∂L/∂B: W costs nothing.
    vocabulary parallel      every process has all rows of x and its shard of the head (`parallel`). All communication is in
                             the forward pass: U is complete on every process, and ∂L/∂W belongs to the shard.

x̂ comes concatenated, so that autograd carries its gradient on to x, A and whatever lies between; Ŵ is put together where
it is needed, a copy of (V, D + r) numbers that does not outlive the pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import passes
from ..backends.choice import choose
from ..backends.passes import Forward, Tiles
from ..backends.portable import TorchTiles, nothing, put
from ..checks import inside_op
from ..head import Head, compute_dtype
from . import logprobs, parallel


def _tiles(backend: str, x: Tensor, count: Tensor | None = None) -> tuple[Tiles, float]:
    """The tiles of a backend, and by how much they hold a slice larger. count: see `choice.Partition`."""
    if choose(backend, x).name != "triton":
        return TorchTiles(), 1.0
    from ..backends import gpu  # imports triton

    return gpu.TritonTiles(count), gpu.FP16_MAGNIFY if x.dtype == torch.float16 else 1.0


def _wide(weight: Tensor, extra: Tensor | None) -> Tensor:
    return weight if extra is None else torch.cat([weight, extra], 1)


@torch.library.custom_op("synpo_kernels::linear_logprobs_kept", mutates_args=())
def kept(
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
    """x (N, D + r), W (V, D), B (V, r) → logps (N,), log-sum-exp (N,), U (N, D + r) or empty, labels as the shard has them.

    Args:
        group: name of the process group that W, B and b are spread over by rows; empty: they are whole.
    """
    head = Head(_wide(weight, extra), bias, softcap, logit_scale)
    with inside_op(x):
        if not group:
            options: dict[str, Any] = {"want_direction": want_direction, "workspace": workspace}
            found = logprobs.forward(x, head, labels, ignore_index, backend, **options)
            return _all_tensors(x, found, labels.clone())
        processes, size = parallel.named(group), passes.workspace_of(x.device, workspace)
        aimed = parallel.aim(labels, len(weight), ignore_index, processes)
        found, (tiles, magnify) = nothing(x, want_direction), _tiles(backend, x)
        for at in passes.blocks(aimed, parallel.IGNORED, passes.block_rows(x, size)):
            options = {"want_direction": want_direction, "workspace": size}
            put(found, at, parallel.forward(x[at], head, aimed[at], tiles, magnify, processes, **options))
        return _all_tensors(x, found, aimed)


def _all_tensors(x: Tensor, found: Forward, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    direction = x.new_empty(0) if found.direction is None else found.direction
    return found.logps, found.normalizer, direction, labels


@kept.register_fake
def _(x, weight, extra, bias, labels, softcap, logit_scale, ignore_index, backend, workspace, group, want_direction):  # type: ignore[no-untyped-def]
    logps = x.new_empty(x.shape[0], dtype=compute_dtype(x.dtype))
    normalizer = torch.empty_like(logps, dtype=passes.widest(x.device))
    return logps, normalizer, x.new_empty(x.shape if want_direction else 0), torch.empty_like(labels)


@torch.library.custom_op("synpo_kernels::linear_logprobs_kept_gradients", mutates_args=())
def kept_gradients(
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
    ignored: int | None,
    backend: str,
    workspace: int | None,
    want_weight: bool,
    want_extra: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂W (V, D), ∂L/∂B (V, r), ∂L/∂b (V,) for upstream (N,); one that is not wanted is empty."""
    if len(weight) == 0:
        d_weight, d_extra, d_bias = map(x.new_zeros, _shapes(weight, extra, want_weight, want_extra, want_bias))
        return d_weight, d_extra, d_bias
    first = 0 if want_weight else weight.shape[1]
    with inside_op(x):
        rows, count = (slice(None), None) if ignored is None else choose(backend, x).partition(labels, ignored)
        tiles, magnify = _tiles(backend, x, count)
        if ignored is not None:
            upstream = upstream.where(labels != ignored, 0)  # rows past the count have none
        result = passes.gradients(
            passes.in_order(x, rows, count),
            Head(_wide(weight, extra), bias, softcap, logit_scale),
            labels[rows],
            Forward(logps[rows], normalizer[rows], None),
            upstream[rows],
            tiles,
            passes.workspace_of(x.device, workspace),
            want=(False, want_weight or want_extra, want_bias),
            magnify=magnify,
            first_column=first,
        )
    d_weight, d_extra, d_bias = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if result.weight is not None:
        of_weight, of_extra = result.weight.tensor_split([weight.shape[1] - first], 1)
        d_weight = of_weight.contiguous() if want_weight else d_weight
        d_extra = of_extra.clone(memory_format=torch.contiguous_format) if want_extra else d_extra
    return d_weight, d_extra, d_bias if result.bias is None else result.bias


def _shapes(
    weight: Tensor, extra: Tensor | None, want_weight: bool, want_extra: bool, want_bias: bool
) -> list[tuple[int, ...]]:
    return [
        tuple(weight.shape) if want_weight else (0,),
        tuple(extra.shape) if want_extra and extra is not None else (0,),
        (weight.shape[0],) if want_bias else (0,),
    ]


@kept_gradients.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    weight,
    extra,
    bias,
    labels,
    logps,
    normalizer,
    upstream,
    softcap,
    logit_scale,
    ignored,
    backend,
    workspace,
    want_weight,
    want_extra,
    want_bias,
):
    return tuple(x.new_empty(shape) for shape in _shapes(weight, extra, want_weight, want_extra, want_bias))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, weight, extra, bias, _, softcap, logit_scale, ignore_index, backend, workspace, group, _ = inputs
    logps, normalizer, direction, labels = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(normalizer, direction, labels)
    ignored = parallel.IGNORED if group else ignore_index
    ctx.options = (softcap, logit_scale, ignored, backend, workspace)
    trained = any(t is not None and t.requires_grad for t in (weight, extra, bias))
    ctx.save_for_backward(direction, *((x, weight, extra, bias, labels, logps, normalizer) if trained else ()))


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 12
    direction, *head = ctx.saved_tensors
    want = ctx.needs_input_grad[1:4]
    d_x = (direction * upstream[:, None]).to(direction.dtype) if ctx.needs_input_grad[0] else None
    found = kept_gradients(*head, upstream, *ctx.options, *want) if any(want) else (None,) * 3
    return (d_x, *(gradient if wanted else None for gradient, wanted in zip(found, want)), *[None] * 8)


kept.register_autograd(_backward, setup_context=_keep)
