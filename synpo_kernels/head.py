"""The language-model head as every backend sees it, and the number formats its arithmetic runs in.

    z = cap(logit_scale · (x Wᵀ + b)),    cap(r) = softcap · tanh(r / softcap), or r when there is no softcap

Shape legend (all files of this package): N rows, D hidden size, V vocabulary, S = 2B sequences, B pairs, T padded length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import _ext


@dataclass(frozen=True)
class Head:
    """A linear head, LoRA on it, and what turns its product into logits; takes the place of a weight in every loss."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0
    lora: tuple[
        tuple[Any, Tensor, Tensor, float], ...
    ] = ()  # (dropout, A (r, D), B (V, r), scaling) of active adapters

    def low_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """What LoRA adds to the product of hidden (..., D), as (u (..., r), B (V, r)) for u Bᵀ; None without LoRA."""
        if not self.lora:
            return None
        parts = [lora_head(drop(hidden.to(a.dtype)), whole(a), whole(b), s) for drop, a, b, s in self.lora]
        u, b = (torch.cat(side, -1).to(hidden.dtype) for side in zip(*parts))
        return u, b

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits (..., V) of hidden (..., D), plainly: for looking, and for tests."""
        z = hidden @ whole(self.weight).T
        if (low_rank := self.low_rank(hidden)) is not None:
            z = z + low_rank[0] @ low_rank[1].T
        z = z if self.bias is None else z + whole(self.bias)
        z = z * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def columns(self, chunk: slice) -> Head:
        """The head restricted to a chunk of the vocabulary: views, no copy."""
        bias = None if self.bias is None else self.bias[chunk]
        return replace(self, weight=self.weight[chunk], bias=bias)

    def cap(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and softcap `raw` = x Wᵀ + b in place.

        Returns (z, slope): the logits, and ∂z / ∂(logit_scale · raw) = 1 - tanh² under a softcap (None stands for ones).
        """
        if self.logit_scale != 1.0:
            raw.mul_(self.logit_scale)
        if self.softcap is None:
            return raw, None
        ratio = raw.div_(self.softcap).tanh_()
        slope = ratio.square().neg_().add_(1.0)
        return ratio.mul_(self.softcap), slope


def lora_head(hidden: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """`low_rank` of `linear_logprobs` for LoRA on the head, W' = W + scaling · B A (https://arxiv.org/abs/2106.09685).

    Args:
        hidden: (..., D), after LoRA's dropout where it has one. lora_a: A (r, D). lora_b: B (V, r). scaling: usually α/r,
            α/√r with rank stabilisation.

    Returns:
        (scaling · hidden @ A.T (..., r), B (V, r)); several adapters are concatenated, each part along its last dimension.
    """
    return scaling * (hidden @ lora_a.T), lora_b


def layer_head(layer: nn.Module) -> Head:
    """The head that a linear layer is, or one that PEFT has wrapped: with LoRA on it, trained whole, or as it was where
    adapters are off. A layer does not know what its model does to the logits afterwards.

    Raises:
        ValueError: no linear layer, or what is trained in it is not W, b and LoRA as W + scaling · B A (DoRA, for one).
    """
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"a head is a linear layer with a weight (V, D), got {type(layer).__name__}; of a Hugging Face model take the one "
            "that hidden_states_and_head returns"
        )
    lora, shifts = [], []
    active: Any = layer
    if hasattr(layer, "lora_A") and not (active.disable_adapters or active.merged):
        for name in (n for n in active.active_adapters if n in active.lora_A):
            if name in active.lora_variant:
                raise ValueError(
                    f"{type(active.lora_variant[name]).__name__.removesuffix('LinearVariant')} on the output head is not "
                    "supported by the fused loss, plain LoRA is; take lm_head out of target_modules, or train it whole "
                    "with modules_to_save"
                )
            a, b, scaling = active.lora_A[name], active.lora_B[name], active.scaling[name]
            lora.append((active.lora_dropout[name], a.weight, b.weight, scaling))
            if b.bias is not None:
                shifts.append((scaling, b.bias))
    trained = [] if getattr(layer, "merged", False) else [n for n, p in layer.named_parameters() if p.requires_grad]
    known = {id(p) for p in (weight, bias, *(p for _, a, b, _ in lora for p in (a, b)), *(p for _, p in shifts))}
    known |= {id(p) for p in getattr(active, "token_adapter", nn.Module()).parameters()}  # of which `weight` is made
    if unknown := [name for name in trained if id(layer.get_parameter(name)) not in known]:
        raise ValueError(
            f"the output head trains {', '.join(unknown)}, which the fused loss does not know: it supports the head's own weight "
            "and bias, and plain LoRA on it"
        )
    for scaling, shift in shifts:
        shift = scaling * whole(shift).to(weight.dtype)
        bias = shift if bias is None else whole(bias) + shift
    return Head(weight, bias, lora=tuple(lora))


def whole(parameter: Any) -> Tensor:
    """A DTensor as a plain tensor, gathered from all processes of its mesh; any other tensor as it is.

    Differentiable: gradients are averaged over the mesh, as FSDP does, and each process keeps its part.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Format of logits, sums and accumulators: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def taken_whole(matrix: Tensor) -> bool:
    """Whether products of half-precision matrices such as this one are taken in their own format, summed in fp32.

    So tensor cores do it for bf16 and fp16, and on a CPU the extension for bf16; torch itself rounds the sums there.
    """
    return matrix.is_cuda or (matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and _ext.multiplies())


def add_matmul(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """total += a @ b in place; a and b of equal dtypes, `total` in their compute dtype.

    fresh: total is overwritten, and may on a GPU be of the dtype of a and b.
    """
    if fresh and a.is_cuda and a.dtype == total.dtype:
        torch.mm(a, b, out=total)
        return
    if a.is_cuda and a.dtype != total.dtype:
        if fresh:
            torch.mm(a, b, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return
    if fresh:
        total.zero_()
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif taken_whole(a):
        torch.ops.synpo_kernels.add_product(total, a, b)
    else:
        total.addmm_(a.float(), b.float())
