"""The public functions and modules: checks, layouts and documentation; the arithmetic is elsewhere.

linear_logprobs       hidden states and a head → per-token log-probabilities, any objective on top (`losses`)
FusedLinearSynPOLoss  the same, carried through to the SynPO loss and the statistics worth logging
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .backends.passes import LOW_WORKSPACE
from .checks import check_head, check_low_rank, in_autocast
from .head import Head, layer_head, whole
from .losses import IGNORE_INDEX, check_layout, check_parameters
from .ops import logprobs
from .ops.frozen_pairs import synpo_frozen
from .ops.pair_loss import SynPOOutput, synpo_pairs
from .ops.parallel import gathered_frozen, local, partitioned
from .ops.trained_pairs import synpo_trained

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_logprobs(
    hidden: Tensor,
    head: Head | nn.Module | Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int | None = IGNORE_INDEX,
    backend: str = "auto",
    memory: str = "default",
    workspace: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """log softmax(z)[label] of each row, z = cap(logit_scale · (hidden @ weight.T + bias)), without holding z.

    Differentiable in hidden, weight and bias for any upstream gradient (once, not twice). Where neither weight nor bias
    requires a gradient, one pass over the vocabulary yields the result and its gradient. Only rows that are not ignored
    are computed.

    Args:
        hidden: (..., D) float32, bfloat16, float16, or float64 (all arithmetic is then float64).
        head: weight (V, D), dtype and device of hidden; or a linear layer, with its bias and PEFT's LoRA on it; or a `Head`, as
            `hidden_states_and_head` returns, which knows bias, LoRA, softcap and logit_scale itself. Under autocast hidden and
            weight are cast to the autocast dtype, as in a linear layer (give a weight of that dtype already: the cast is a
            copy of V·D numbers).
        labels: (...) int64, aligned: labels[t] is the token that hidden[t] predicts. `ignore_index` marks rows to skip.
        bias: (V,) dtype and device of weight.
        softcap: cap(r) = softcap · tanh(r / softcap), Gemma's final-logit soft cap; None: none.
        logit_scale: factor on the logits before the cap.
        ignore_index: None says that no label is ignored, which saves finding the kept rows.
        backend: "auto", "chunked" (any device), "cpu" (the C++ extension) or "triton" (CUDA).
        workspace: bytes held at a time beyond inputs, result and gradients: a slice of the logits, and sums of its products in
            fp32 for as many rows. None: 128 MiB on a GPU, 32 on a CPU. A smaller one takes more, smaller slices (about 256
            columns by 64 rows at the least), which costs time and changes rounding, nothing else.
        memory: "low" is a workspace of 16 MiB.
        low_rank: (u (..., r), B (V, r)) adds u @ B.T to the raw logits, as LoRA on the head does (`lora_head`). With a frozen
            weight it costs r/D more of everything, and one product more in the backward pass where B is trained.
        group: processes that hold the head by rows (vocabulary parallel): weight, bias and B are this process's rows, in
            the order of ranks, as many as it has, none included; a shard padded to equal size is passed without its
            padding, weight[:rows]. hidden, u and labels (in the whole vocabulary) are the same on all. The result, and the
            gradients of hidden and u, are complete on every process; those of the shard stay with it. All must use the
            result in the same way. All communication is in the forward pass.

    A weight that is a DTensor is gathered whole (FSDP2: each process has hidden states of its own), its gradient averaged
    over its mesh; with a group, its local rows are used. A weight that ZeRO-3 has partitioned is gathered by DeepSpeed for
    the forward pass; it must be frozen.

    Returns:
        (...) float32 (float64 for float64 inputs), 0 at ignored rows and connected to the graph even if all are ignored.

    Raises:
        ValueError: shapes, dtypes or devices disagree; a label is outside [0, V) (checked on CPU; on a CUDA device the
            gather of the label's row fails with a device-side assertion); the backend is unknown or cannot serve.
    """
    found, low_rank = resolved(hidden, head, bias, softcap, logit_scale, low_rank)
    options: dict[str, Any] = {"ignore_index": ignore_index, "backend": backend, "group": group}
    return _logprobs(hidden, found, labels, low_rank, workspace=check_workspace(memory, workspace), **options)


def _logprobs(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    *,
    ignore_index: int | None,
    backend: str,
    workspace: int | None,
    group: ProcessGroup | None,
) -> Tensor:
    """`linear_logprobs` of a head as `resolved` gives it, however it is spread over processes."""
    plain = whole if group is None else local
    weight, bias = plain(head.weight), None if head.bias is None else plain(head.bias)
    u, b = (None, None) if low_rank is None else (whole(low_rank[0]), plain(low_rank[1]))
    with gathered_frozen(weight, bias) if partitioned(weight) or partitioned(bias) else nullcontext():
        hidden, weight, bias, u, b = in_autocast(hidden, weight, bias, u, b)
        check_head(hidden, weight, labels, bias, head.softcap, ignore_index, sharded=group is not None)
        if low_rank is not None:
            check_low_rank(hidden, weight, u, b)
            hidden = torch.cat([hidden, u], -1)
        flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
        bias = None if bias is None else bias.contiguous()
        trained = any(t is not None and t.requires_grad for t in (weight, b, bias))
        # under a head that is trained whole ∂L/∂x is recomputed too: as many products, and no U held until then
        recomputed = trained and b is None and group is None
        want_direction = torch.is_grad_enabled() and hidden.requires_grad and not recomputed
        options = (head.softcap, head.logit_scale, ignore_index, backend, workspace, group.group_name if group else "")
        logps, *_ = logprobs.linear_logprobs(flat, weight, b, bias, flat_labels, *options, want_direction)
        return logps.view(labels.shape)


def check_workspace(memory: str, workspace: int | None) -> int | None:
    """Bytes of the workspace that `memory` and `workspace` ask for, None for the default."""
    if memory not in ("default", "low"):
        raise ValueError(f"memory must be 'default' or 'low', got {memory!r}")
    if workspace is not None and (memory == "low" or isinstance(workspace, bool) or workspace <= 0):
        raise ValueError(f"workspace must be a positive number of bytes, given without memory='low'; got {workspace!r}")
    return LOW_WORKSPACE if memory == "low" else workspace


def resolved(
    hidden: Tensor,
    given: Head | nn.Module | Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    low_rank: tuple[Tensor, Tensor] | None,
) -> tuple[Head, tuple[Tensor, Tensor] | None]:
    """Whatever was given for a head, and beside it, as a `Head` without LoRA, and what its LoRA adds, as `low_rank` of
    `linear_logprobs`.

    Raises:
        ValueError: something is given twice; or as `layer_head`.
    """
    if isinstance(given, Tensor):
        return Head(given, bias, softcap, logit_scale), low_rank
    own = {"bias": bias is not None, "low_rank": low_rank is not None}
    if isinstance(given, Head):
        found = given
        own |= {"softcap": softcap is not None, "logit_scale": logit_scale != 1.0}
    else:
        found = replace(layer_head(given), softcap=softcap, logit_scale=logit_scale)
    if twice := [name for name, is_given in own.items() if is_given]:
        raise ValueError(f"a head given as {type(given).__name__} brings its own {', '.join(twice)}; leave that out")
    return replace(found, lora=()), found.low_rank(hidden)


class FusedLinearSynPOLoss(nn.Module):
    """SynPO from hidden states and the head, https://arxiv.org/abs/2506.00835:

        L = -mean over pairs [ σ(α (P+ - P-)) + β a+ ]

    Args:
        alpha: sharpness of the preference term. beta: weight of the language reward.
        reduction: "mean" over the pairs that have tokens on both sides, or "sum".
        softcap, logit_scale, ignore_index, backend, memory, workspace, group: as `linear_logprobs`.

    Under a trained head the gradients are finished in the forward pass, pair by pair as far as they fit
    `ops.trained_pairs.PAIR_BYTES` (and V·D numbers in fp32), in three products. With a workspace given, or memory "low", they
    are streamed instead: four products, and nothing but slices held.
    """

    def __init__(
        self,
        alpha: float = 30.0,
        beta: float = 0.2,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        ignore_index: int | None = IGNORE_INDEX,
        reduction: str = "mean",
        backend: str = "auto",
        memory: str = "default",
        workspace: int | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_parameters(positive={"alpha": alpha}, least_zero={"beta": beta})
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.workspace = check_workspace(memory, workspace)
        self.alpha, self.beta, self.reduction, self.backend = alpha, beta, reduction, backend
        self.softcap, self.logit_scale, self.ignore_index, self.group = softcap, logit_scale, ignore_index, group

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, reduction={self.reduction!r}, backend={self.backend!r}"

    def forward(
        self,
        hidden: Tensor,
        head: Head | nn.Module | Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> SynPOOutput:
        """Loss of B pairs.

        Args:
            hidden: (2B, T, D), chosen sequences first, then the rejected in the same order; or packed (N, D) with
                cu_seqlens. head: weight, layer or `Head`, as `linear_logprobs`. labels: (2B, T) or (N,), already aligned to
                the row that predicts them.
            cu_seqlens: (2B + 1,) int bounds of the packed sequences, chosen first; equal neighbours: an empty completion.
            bias, low_rank: beside a weight, as `linear_logprobs`.

        Raises:
            ValueError: as `linear_logprobs`; an odd number of sequences; a layout that is neither of the two.
        """
        expected = 3 if cu_seqlens is None else 2
        if hidden.dim() != expected:
            raise ValueError(
                f"hidden must be (2B, T, D), or (N, D) with cu_seqlens; got shape {tuple(hidden.shape)} "
                f"{'without' if cu_seqlens is None else 'with'} cu_seqlens"
            )
        sequences = hidden.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        if sequences % 2 or sequences <= 0:
            raise ValueError(f"pairs need an even number of sequences, chosen first then rejected; got {sequences}")
        found, low_rank = resolved(hidden, head, bias, self.softcap, self.logit_scale, low_rank)
        plain = (
            low_rank is None and self.group is None and not partitioned(found.weight) and not partitioned(found.bias)
        )
        trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (found.weight, found.bias))
        if plain and not (trained and self.workspace is not None):
            return self._at_once(hidden, found, labels, cu_seqlens, sequences, trained)
        ours: dict[str, Any] = {"ignore_index": self.ignore_index, "backend": self.backend}
        logps = _logprobs(hidden, found, labels, low_rank, workspace=self.workspace, group=self.group, **ours)
        ours |= {"alpha": self.alpha, "beta": self.beta, "reduction": self.reduction}
        return synpo_pairs(logps, labels, cu_seqlens, **ours)[0]

    def _at_once(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        sequences: int,
        trained: bool,
    ) -> SynPOOutput:
        """By one op, where all of the head is here (ZeRO-3 may hold it in parts) and nothing is streamed."""
        weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
        hidden, weight, bias = in_autocast(hidden, weight, bias)
        check_head(hidden, weight, labels, bias, head.softcap, self.ignore_index, sharded=False)
        check_layout(labels, None, cu_seqlens)
        flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
        bias = None if bias is None else bias.contiguous()
        ours = (self.alpha, self.beta, self.reduction, head.softcap, head.logit_scale, self.ignore_index, self.backend)
        given = (flat, weight, bias, flat_labels, cu_seqlens, sequences, *ours)
        if trained:
            want = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
            loss, fields, empty, nonfinite, *_ = synpo_trained(*given, want)
        else:
            direction = torch.is_grad_enabled() and hidden.requires_grad
            loss, fields, empty, nonfinite, *_ = synpo_frozen(*given, self.workspace, direction)
        return SynPOOutput(*[loss, *fields.unbind(), empty, nonfinite])
