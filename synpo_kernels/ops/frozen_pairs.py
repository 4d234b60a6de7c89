"""SynPO with a frozen head as one op: one pass over the vocabulary, and the loss of its log-probabilities.

What `logprobs.linear_logprobs` and `pair_loss.pairs` do one after the other, for the price of one op to the host: a small pass
waits for the host, and a node of autograd takes it longer than a kernel runs. U = ∂logp/∂x and g = ∂loss/∂logp are kept; backward
is their product with the upstream gradient, rounded once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from ..head import Head
from . import logprobs, pair_loss
from .opaque import op
from .scaling import scaled_rows


@op("synpo_frozen")
def synpo_frozen(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    sequences: int,
    alpha: float,
    beta: float,
    reduction: str,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    backend: str,
    workspace: int | None,
    want: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x (N, D), W (V, D), b (V,), labels (N,) of 2B sequences → loss, statistics, empty and nonfinite pairs as
    `pair_loss.pairs`, g (N,), U (N, D).

    The loss is differentiable in x. U is empty unless `want`; a caller lets go of it, as the backward pass may turn it into
    ∂L/∂x.
    """
    head = Head(weight, bias, softcap, logit_scale)
    found = logprobs.forward(x, head, labels, ignore_index, backend, want_direction=want, workspace=workspace)
    shape = (sequences, -1) if cu_seqlens is None else (-1,)
    settings = (alpha, beta, ignore_index, reduction, backend)
    loss, g, *statistics = pair_loss.pairs.run(found.logps.view(shape), labels.view(shape), cu_seqlens, *settings)
    fields, empty, nonfinite = statistics
    return loss, fields, empty, nonfinite, g.view(-1), x.new_empty(0) if found.direction is None else found.direction


@synpo_frozen.register_fake
def _(x, weight, bias, labels, cu_seqlens, sequences, *options):  # type: ignore[no-untyped-def]
    loss, g, *statistics = pair_loss.results(x[:, 0], sequences)
    return loss, *statistics, g, x.new_empty(x.shape if options[-1] else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:])
    ctx.backend = inputs[-3]


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    g, direction = ctx.saved_tensors
    found = None if upstream is None else scaled_rows(direction, g * upstream, ctx.backend)
    return found, *[None] * 14


synpo_frozen.register_autograd(_backward, setup_context=_keep)
