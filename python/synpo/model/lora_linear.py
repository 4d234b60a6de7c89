"""A linear layer with LoRA, y = x Wᵀ + c + s (drop(x) Aᵀ) Bᵀ, in as few passes over x and y as library products allow.

PEFT's forward widens x to the dtype of A, scales the small product's result at the size of y and adds it in a pass of its own;
its backward does the same in reverse. Here (N rows, D in, E out, r rank):

    h = drop(x) Aᵀ            (N, r)        y = x Wᵀ + c,  then  y += s h Bᵀ            the sum in the product's own epilogue
    u = s g B                 (N, r)        ∂x = g W,      then ∂x += u A               likewise; with dropout u A is its mask's
    ∂A = uᵀ drop(x)           ∂B = s gᵀ h

A and B are cast to what the layer computes in (autocast's dtype), x is not copied, s costs nothing. Dropout is the module's own,
so its random numbers are PEFT's. W in 4 or 8 bits stays with its own kernel, and y is added to.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from synpo.model.meant import autocast_of, computes_in


class _LoraLinear(torch.autograd.Function):
    """x, seen (N, D); base (N, E) or weight (E, D) with bias (E,); a (r, D), b (E, r) → (N, E).

    seen is drop(x), None where that is x itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seen: Tensor | None,
        base: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        inner = (x if seen is None else seen) @ a.T
        ctx.scale, ctx.dropped = scale, seen is not None
        ctx.save_for_backward(x if seen is None else seen, weight, a, b, inner)
        if base is not None:
            return torch.addmm(base, inner, b.T, alpha=scale)
        assert weight is not None
        out = F.linear(x, weight, bias)
        if torch.compiler.is_compiling():  # torch 2.11 loses the gradients of what a traced function changes in place
            return torch.addmm(out, inner, b.T, alpha=scale)
        return out.addmm_(inner, b.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        seen, weight, a, b, inner = ctx.saved_tensors
        needs_x, needs_seen, needs_base, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        u = (g @ b).mul_(ctx.scale)
        grad_x = g @ weight if needs_x and weight is not None else None
        grad_seen = u @ a if needs_seen else None
        if needs_x and not ctx.dropped:
            grad_x = u @ a if grad_x is None else grad_x.addmm_(u, a)
        return (
            grad_x,
            grad_seen,
            g if needs_base else None,
            None,
            g.sum(0) if needs_bias else None,
            u.T @ seen if needs_a else None,
            (g.T @ inner).mul_(ctx.scale) if needs_b else None,
            None,
        )


def lora_linear(layer: Any, x: Tensor) -> Tensor | None:
    """The output of a LoRA layer of PEFT's for x (…, D); None where it does what is not plain LoRA in one precision."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    (name,) = active
    a, b, base = layer.lora_A[name], layer.lora_B[name], layer.base_layer
    dtype, frozen = computes_in(x), type(base) is nn.Linear and not base.weight.requires_grad
    one_precision = autocast_of(x) or x.dtype == a.weight.dtype and (not frozen or x.dtype == base.weight.dtype)
    if b.bias is not None or layer.fan_in_fan_out or x.dtype == torch.float64 or not one_precision:
        return None
    rows = x.reshape(-1, x.shape[-1])
    seen = layer.lora_dropout[name](rows)
    plain = frozen and not (base._forward_hooks or base._forward_pre_hooks)
    out = _LoraLinear.apply(
        rows.to(dtype),
        None if seen is rows else seen.to(dtype),
        None if plain else base(x).flatten(0, -2).to(dtype),
        base.weight.to(dtype) if plain else None,
        base.bias.to(dtype) if plain and base.bias is not None else None,
        a.weight.to(dtype),
        b.weight.to(dtype),
        layer.scaling[name],
    )
    return out.unflatten(0, x.shape[:-1])


def fuse(model: nn.Module) -> int:
    """Give the LoRA layers of `model` that stand on linear ones, quantized or not, this forward; how many they are."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), nn.Linear)]
    for layer in layers:
        if not isinstance(layer, _Fused):
            layer.__class__ = _fused(type(layer))
    return len(layers)


class _Fused:
    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        out = None if arguments or options else lora_linear(self, x)
        return super().forward(x, *arguments, **options) if out is None else out  # type: ignore[misc]


@cache
def _fused(kind: type[Any]) -> type[Any]:
    """A kind of PEFT's layers with this forward; one for all of them, so that torch.compile compiles once."""
    return type(kind.__name__, (_Fused, kind), {"__module__": kind.__module__})
