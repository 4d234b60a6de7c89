"""The op that leaves columns of the vocabulary out of a frozen head's gradient and says what that may have changed.

    linear_logprobs_certified    as `linear_logprobs_frozen` it finishes U = ∂logp/∂x in the forward pass; beside it comes
                                 the bound on the error of every row of U, see `skipping`.

It runs on the tiles of the portable and of the Triton backend: on a CPU on the portable one, whichever serves otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunked
from .checks import check_head, in_autocast, inside_op
from .dispatch import choose
from .epilogue import SynPOOutput
from .head import Head, compute_dtype
from .losses import IGNORE_INDEX
from .parallel import whole


@dataclass(frozen=True)
class CertifiedLogprobs:
    """What `certified_logprobs` returns; all but logps are detached."""

    logps: Tensor  # (...) log-probabilities, exact, differentiable in hidden
    bound: Tensor  # (...) ‖what skipping changed in ∂logp_t/∂hidden_t‖₂ is at most this; 0 where nothing was skipped
    kept_columns: Tensor  # () share of (rows that count) × V that entered the gradient's product; 0 without gradients


@dataclass(frozen=True)
class CertifiedSynPOOutput(SynPOOutput):
    """`SynPOOutput` with what skipping may have changed."""

    # () ‖what skipping changed in ∂loss/∂hidden‖, Frobenius, is at most this: √Σ_t (|g_t| bound_t)², g_t = ∂loss/∂logp_t
    gradient_bound: Tensor
    kept_columns: Tensor  # () as in CertifiedLogprobs


def with_certificate(output: SynPOOutput, coefficients: Tensor, found: CertifiedLogprobs) -> CertifiedSynPOOutput:
    """coefficients: g_t in the shape of the log-probabilities."""
    fields = {name: getattr(output, name) for name in output.__dataclass_fields__}
    bound = torch.linalg.vector_norm(coefficients * found.bound)
    return CertifiedSynPOOutput(**fields, gradient_bound=bound, kept_columns=found.kept_columns)


def certified_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    skip_tolerance: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = IGNORE_INDEX,
    backend: str = "auto",
) -> CertifiedLogprobs:
    """`linear_logprobs` under a frozen head, its gradient computed from the columns of the vocabulary that matter.

    The log-probabilities stay exact. Of each row's gradient, tokens with a total probability of at most `skip_tolerance`
    (weighed by the slope of the softcap) are replaced by their mean, and the error this can make is returned. It pays where
    the softmax of the model is peaked; a group of rows that would keep most columns is multiplied whole. The Triton path
    reads nothing back to the host; plain torch on a CUDA device reads a few numbers for each slice of the logits.

    Args:
        skip_tolerance: τ in [0, 1), such as 2**-10. 0 leaves out what underflowed alone. The others: as `linear_logprobs`.

    Raises:
        ValueError: as `linear_logprobs`; the head requires a gradient; the tolerance is out of range.
    """
    if not 0 <= skip_tolerance < 1:
        raise ValueError(f"skip_tolerance must lie in [0, 1), got {skip_tolerance}; 2**-10 is a good first choice")
    weight, bias = whole(weight), None if bias is None else whole(bias)
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError(
            "skip_tolerance needs a frozen head: weight or bias requires a gradient; freeze it (requires_grad_(False)), "
            "or leave skip_tolerance out"
        )
    hidden, weight, bias = in_autocast(hidden, weight, bias)
    check_head(hidden, weight, labels, bias, softcap, ignore_index, sharded=False)
    logps, _, bound, kept = certified(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        None if bias is None else bias.contiguous(),
        labels.reshape(-1).contiguous(),
        softcap,
        logit_scale,
        ignore_index,
        backend,
        skip_tolerance,
        torch.is_grad_enabled() and hidden.requires_grad,
    )
    return CertifiedLogprobs(logps.view(labels.shape), bound.view(labels.shape), kept)


@torch.library.custom_op("synpo_kernels::linear_logprobs_certified", mutates_args=())
def certified(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int | None,
    backend: str,
    tolerance: float,
    want_direction: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ logps (N,), U (N, D) or empty, bound (N,), kept share () float64; logps differentiable in x alone."""
    passes: Any = chunked
    if choose(backend, x).name == "triton":
        from . import fused as passes  # imports triton

    rows, count = (slice(None), None) if ignore_index is None else passes.partition(labels, ignore_index)
    aimed = labels if ignore_index is None else labels.where(labels != ignore_index, 0)
    with inside_op(x):
        found = passes.forward(
            x[rows],
            Head(weight, bias, softcap, logit_scale),
            aimed[rows],
            want_direction=want_direction,
            count=count,
            tolerance=tolerance,
        )
    logps, direction, bound = _results(x, want_direction)
    logps[rows], bound[rows] = found.logps, found.bound
    if want_direction:
        direction[rows] = found.direction
    return logps, direction, bound, found.kept


def _results(x: Tensor, want_direction: bool) -> tuple[Tensor, Tensor, Tensor]:
    logps = x.new_zeros(x.shape[0], dtype=compute_dtype(x.dtype))
    return logps, x.new_zeros(x.shape if want_direction else 0), torch.zeros_like(logps)


@certified.register_fake
def _(x, weight, bias, labels, softcap, logit_scale, ignore_index, backend, tolerance, want_direction):  # type: ignore[no-untyped-def]
    return *_results(x, want_direction), x.new_empty((), dtype=torch.float64)


def _keep_direction(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[1])


@once_differentiable
def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    (direction,) = ctx.saved_tensors
    gradient = None if upstream is None else (direction * upstream[:, None]).to(direction.dtype)
    return (gradient, *[None] * 9)


certified.register_autograd(_backward, setup_context=_keep_direction)
