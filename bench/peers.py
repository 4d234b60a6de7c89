"""Everything that can compute the loss: ours in every backend, plain PyTorch, and other people's kernels.

A provider maps (hidden (S, T, D), weight (V, D), labels (S, T)) to a scalar whose backward fills the gradients. Packages
are imported when a provider is loaded; one that is missing, or refuses the device, is listed as absent with its reason.

Objective. All compute SynPO, but for
- Liger's preference loss: its functions see a completion's mean log-probability only, so they cannot express the language
  reward (a mean of probabilities). Its SimPO is the nearest work of the same cost;
- quack's and, in one of its two ways, torch's chunked cross-entropy: they finish their gradients in the forward pass, which a
  mean over tokens alone allows. Their cross-entropy is less work than SynPO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import IGNORE_INDEX
from bench.truth import synpo
from synpo_kernels import FusedLinearSynPOLoss
from synpo_kernels.backends import choice

HEADS = ("frozen", "trained")
CHUNK = 4096  # rows that quack takes at a time, its own choice
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute the loss; `load` imports what it needs and returns the function for a device."""

    name: str
    load: Callable[[torch.device], LossFunction]
    note: str
    objective: str = "synpo"
    heads: tuple[str, ...] = HEADS  # those it serves

    @property
    def ours(self) -> bool:
        return self.name.startswith("synpo ")


def mode(device: torch.device, **options: Any) -> LossFunction:
    """Ours in another mode, on the backend that is chosen for the device."""
    module = FusedLinearSynPOLoss(**options)
    return lambda hidden, weight, labels: module(hidden, weight, labels).loss


def _ours(backend: str, device: torch.device) -> LossFunction:
    supports, _ = choice.BACKENDS[backend]
    usable, reason = supports(torch.empty(0, device=device))
    if not usable:
        raise RuntimeError(reason)
    module = FusedLinearSynPOLoss(backend=backend)
    return lambda hidden, weight, labels: module(hidden, weight, labels).loss


def _from_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The usual code: logits, upcast, log-softmax over the vocabulary, gather."""
    logits = (hidden @ weight.T).float()
    kept = labels != IGNORE_INDEX
    picked = logits.log_softmax(-1).gather(-1, labels.where(kept, 0)[..., None])[..., 0]
    return synpo(picked.where(kept, 0.0), labels)


def _naive(device: torch.device) -> LossFunction:
    return _from_logits


def _compiled(device: torch.device) -> LossFunction:
    return torch.compile(_from_logits, dynamic=False)


def _liger_simpo(compiled: bool, device: torch.device) -> LossFunction:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    module = LigerFusedLinearSimPOLoss(beta=2.0, gamma=1.0, compute_nll_loss=False, compiled=compiled)
    return lambda hidden, weight, labels: module(weight, hidden, labels)[0]


def _per_token(nll: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LossFunction:
    """SynPO on top of a peer that gives (N, D), (V, D), (N,) → -logp (N,)."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logps = -nll(hidden.flatten(0, 1), weight, labels.flatten()).float()
        return synpo(logps.view(labels.shape), labels)

    return loss


def _needs_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise RuntimeError(f"{what} runs on CUDA devices only")


def _liger_cross_entropy(device: torch.device) -> LossFunction:
    _needs_cuda(device, "its Triton kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="none")
    return _per_token(lambda hidden, weight, labels: module(weight, hidden, labels))


def _liger_hopper(device: torch.device) -> LossFunction:
    _needs_cuda(device, "its CuTe kernel")
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    return _per_token(LigerFusedScaledCrossEntropySM90Function.apply)


def _mean(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> LossFunction:
    """The cross-entropy of a peer that maps (N, D), (V, D), (N,) to a mean over the labels that count."""
    return lambda hidden, weight, labels: cross_entropy(hidden.flatten(0, 1), weight, labels.flatten())


def _torch(reduction: str, device: torch.device) -> LossFunction:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise RuntimeError(f"torch 2.13 has linear_cross_entropy in chunks, this is {torch.__version__}")
    function = partial(
        torch.nn.functional.linear_cross_entropy,
        reduction=reduction,
        ignore_index=IGNORE_INDEX,
        options=torch.nn.LinearCrossEntropyOptions(),  # its own choice of chunks and of accumulation
    )
    return _per_token(function) if reduction == "none" else _mean(function)


def _quack(scaled: bool, device: torch.device) -> LossFunction:
    _needs_cuda(device, "its CuTe kernel")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, scaled_exp_lce_supported

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if scaled and not scaled_exp_lce_supported(hidden, weight, CHUNK, "mean"):
            raise RuntimeError("its scaled exponentials need sm_90, bfloat16 and a vocabulary in multiples of 128")
        return chunked_linear_cross_entropy(
            hidden, weight, labels, ignore_index=IGNORE_INDEX, chunk_size=CHUNK, use_scaled_exp=scaled
        )

    return _mean(loss)


def _cut_cross_entropy(filter_eps: str | None, device: torch.device) -> LossFunction:
    from cut_cross_entropy import linear_cross_entropy

    if device.type == "cuda":
        options = {"impl": "cce", "filter_eps": filter_eps}
    elif filter_eps is not None:
        options = {"impl": "torch_compile"}
    else:
        raise RuntimeError("on a CPU its torch_compile implementation runs, which skips nothing")
    return _per_token(
        lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, reduction="none", **options)
    )


def _trl(device: torch.device) -> LossFunction:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size

    def nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        kept = labels != IGNORE_INDEX
        logps = ChunkedLogProbFunction.apply(hidden[kept], weight, None, labels[kept], 1.0, chunk_size, None, 1.0, ())[
            0
        ]
        return -logps.new_zeros(labels.shape).masked_scatter(kept, logps)

    return _per_token(nll)


def providers() -> Iterator[Provider]:
    """All of them, ours first."""
    for backend in choice.BACKENDS:
        yield Provider(f"synpo {backend}", partial(_ours, backend), f"FusedLinearSynPOLoss(backend={backend!r})")
    low = partial(mode, memory="low")
    yield Provider("synpo low-memory", low, "memory='low': a workspace of 16 MiB", heads=("frozen",))
    yield Provider("synpo streaming", low, "memory='low': the logits twice, four products, 16 MiB", heads=("trained",))
    # what compiles longest comes last
    yield Provider("naive", _naive, "full logits in fp32, log-softmax, gather")
    yield Provider("torch lce", partial(_torch, "none"), "linear_cross_entropy(reduction='none') in chunks, torch 2.13")
    yield Provider(
        "torch lce mean", partial(_torch, "mean"), "the same with reduction='mean', one pass fewer", "cross-entropy"
    )
    yield Provider("trl", _trl, "ChunkedLogProbFunction, the chunked log-probability head")
    yield Provider("liger simpo eager", partial(_liger_simpo, False), "SimPO without its torch.compile", "simpo")
    yield Provider("liger fused ce", _liger_cross_entropy, "LigerFusedLinearCrossEntropyLoss(reduction='none')")
    yield Provider("cce", partial(_cut_cross_entropy, "high"), "cut-cross-entropy; skips small gradients on CUDA")
    yield Provider("cce exact", partial(_cut_cross_entropy, None), "cut-cross-entropy with filter_eps=None")
    yield Provider(
        "quack", partial(_quack, False), "chunked_linear_cross_entropy(use_scaled_exp=False)", "cross-entropy"
    )
    yield Provider(
        "quack scaled", partial(_quack, True), "the same with its scaled exponentials, sm_90", "cross-entropy"
    )
    yield Provider("liger hopper", _liger_hopper, "fused scaled cross entropy in CuTe, sm_90 only")
    yield Provider("naive compiled", _compiled, "torch.compile of naive")
    yield Provider("liger simpo", partial(_liger_simpo, True), "SimPO: the nearest work of the same cost", "simpo")
