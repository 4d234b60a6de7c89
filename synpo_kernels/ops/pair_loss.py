"""The end of a SynPO step as one op: per-token log-probabilities → loss, what is worth logging, and g_t = ∂L/∂logp_t.

    logps (2B, T) or packed (N,)  →  loss (), g in the shape of logps, 8 statistics a pair

On CUDA two small kernels (`kernels/pair_loss.py`), elsewhere the torch ops of `losses`. Nothing is read back to the host
and nothing loops over pairs; how many pairs are valid is found on the device. The gradient is finished in the forward
pass, so backward is g times a number and may run any number of times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import losses
from ..backends.choice import choose
from ..head import compute_dtype
from ..losses import IGNORE_INDEX
from .opaque import op


@dataclass(frozen=True)
class SynPOOutput:
    """Loss and detached statistics of one batch of B pairs. A pair with an empty completion has 0 in every (B,) field.

    A hidden state that is not finite makes its pair's statistics and the loss NaN: check `nonfinite_pairs`.
    """

    loss: Tensor  # () differentiable
    chosen_logps: Tensor  # (B,) m+, mean log-probability of the chosen tokens
    rejected_logps: Tensor  # (B,) m-
    chosen_prob: Tensor  # (B,) P+ = exp(m+), geometric-mean token probability
    rejected_prob: Tensor  # (B,) P-
    language_reward: Tensor  # (B,) a+, arithmetic mean of the chosen tokens' probabilities
    margin: Tensor  # (B,) P+ - P-
    chosen_grad_norm: Tensor  # (B,) ‖g‖₂ over the chosen tokens, g_t = ∂loss/∂logp_t
    rejected_grad_norm: Tensor  # (B,) ‖g‖₂ over the rejected tokens
    empty_pairs: Tensor  # () int64, pairs that contributed nothing
    nonfinite_pairs: Tensor  # (B,) bool, pairs in which a log-probability is NaN or infinite


FIELDS = tuple(SynPOOutput.__dataclass_fields__)[1:-2]  # rows of the ops' (8, B) statistics


def synpo_pairs(
    logps: Tensor,
    labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    alpha: float = 30.0,
    beta: float = 0.2,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[SynPOOutput, Tensor]:
    """SynPO loss and statistics of B pairs, L = -mean over pairs [ σ(α (P+ - P-)) + β a+ ], arXiv 2506.00835.

    Args:
        logps: (2B, T), chosen sequences first; or (N,) with `cu_seqlens`; floating.
        labels: same shape, int64; tokens equal to `ignore_index` do not count. None: every token counts.
        cu_seqlens: (2B + 1,) int bounds of the packed sequences; equal neighbours: an empty completion.
        reduction: "mean" over the pairs that have tokens on both sides, or "sum".
        backend: "auto", "triton" for the kernels, anything else that `linear_logprobs` knows for torch ops.

    Returns:
        the output, its loss differentiable in logps (once); and g (shape of logps) = ∂loss/∂logp_t in float32 (float64 for
        float64 logps), detached, 0 at tokens that do not count.

    Raises:
        ValueError: shapes disagree, an odd number of sequences, an unknown reduction.
    """
    losses.check_layout(logps, labels, cu_seqlens)
    if (sequences := _sequences(logps, cu_seqlens)) % 2:
        raise ValueError(f"pairs need an even number of sequences, chosen first; got {sequences}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    loss, g, fields, empty, nonfinite = pairs(logps, labels, cu_seqlens, alpha, beta, ignore_index, reduction, backend)
    return SynPOOutput(*[loss, *fields.unbind(), empty, nonfinite]), g


@op("synpo_pairs")
def pairs(
    logps: Tensor,
    labels: Tensor | None,
    cu_seqlens: Tensor | None,
    alpha: float,
    beta: float,
    ignore_index: int | None,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """→ loss (), g like logps, statistics (8, B) in the order of `FIELDS`, empty pairs () int64, nonfinite (B,) bool."""
    # in one layout, or sums over rows would be taken in another order and end in other bits
    logps, labels = logps.contiguous(), None if labels is None or ignore_index is None else labels.contiguous()
    sequences = _sequences(logps, cu_seqlens)
    if sequences and choose(backend, logps).name == "triton":
        from ..kernels import pair_loss  # imports triton

        found = results(logps, sequences)
        bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
        ours: dict[str, Any] = {"alpha": alpha, "beta": beta, "ignore_index": ignore_index, "mean": reduction == "mean"}
        with torch.cuda.device_of(logps):  # Triton launches on the current device
            pair_loss.launch(logps, labels, bounds, *found, **ours)
        return found
    logps = logps.to(compute_dtype(logps.dtype))
    layout: dict[str, Any] = {"cu_seqlens": cu_seqlens, "ignore_index": ignore_index}
    stats = losses.sequence_stats(logps, labels, **layout)
    loss = losses.synpo(stats, alpha=alpha, beta=beta, reduction=reduction)
    g = losses.synpo_coefficients(stats, logps, labels, alpha=alpha, beta=beta, **layout)
    valid = stats.valid_pairs.to(logps.dtype)
    if reduction == "mean":
        g = g / valid.sum().clamp(min=1.0)
    norms = losses.token_norms(g, cu_seqlens=cu_seqlens)
    chosen, rejected = stats.chosen, stats.rejected
    p_chosen, p_rejected = chosen.mean_logps.exp(), rejected.mean_logps.exp()
    means = (chosen.mean_logps, rejected.mean_logps, p_chosen, p_rejected, chosen.mean_probs, p_chosen - p_rejected)
    fields = torch.stack([*(value * valid for value in means), *norms])
    return loss, g, fields, stats.empty_pairs, stats.nonfinite_pairs


def _sequences(logps: Tensor, cu_seqlens: Tensor | None) -> int:
    return logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def results(logps: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tensors for what the op returns."""
    g = torch.empty(logps.shape, dtype=compute_dtype(logps.dtype), device=logps.device)
    empty = torch.empty((), dtype=torch.int64, device=logps.device)
    nonfinite = torch.empty(sequences // 2, dtype=torch.bool, device=logps.device)
    return g.new_empty(()), g, g.new_empty(len(FIELDS), sequences // 2), empty, nonfinite


@pairs.register_fake
def _(logps, labels, cu_seqlens, *options):  # type: ignore[no-untyped-def]
    return results(logps, _sequences(logps, cu_seqlens))


def _keep_coefficients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (g,) = ctx.saved_tensors
    return (None if upstream is None else (g * upstream).to(ctx.dtype), *[None] * 7)


pairs.register_autograd(_backward, setup_context=_keep_coefficients)
