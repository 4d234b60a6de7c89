"""Kernels of liger-kernel (https://github.com/linkedin/Liger-Kernel) for what decoder layers do beside products and attention.

    norm    x · w / √(mean x² + ε), or (1 + w) in the place of w          one pass over x for six to eight
    gate    silu(a) · b, or gelu(a) · b                                   one for two, and one tensor less is kept
    rope    both halves of queries and keys turned by their positions     one in place for six

A part gets a kernel only where the kernel gives what the part itself gives, on a few numbers of its dtype: no table of families
says so, and a part of another form stays as it is. Heads are not touched: liger-kernel's would make a loss of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("norm", "gate", "rope")
SETTINGS = {"rms_norm": "norm", "swiglu": "gate", "geglu": "gate", "rope": "rope"}
"""What transformers' `liger_kernel_config` calls them."""


def installed() -> bool:
    return find_spec("liger_kernel") is not None


@torch.no_grad()
def apply(decoder: Any, wanted: Mapping[str, bool] | None = None) -> dict[str, int]:
    """Give parts of a decoder liger-kernel's kernels; how many of each kind got one.

    Args:
        wanted: kind → whether; those left out are wanted.
    """
    found = dict.fromkeys(KINDS, 0)
    on = dict.fromkeys(KINDS, True) | dict(wanted or {})
    tried: dict[Any, Callable[..., Tensor] | None] = {}
    for module in decoder.modules():
        kind = _kind(module)
        if kind is None or not on[kind]:
            continue
        key = (type(module), module.weight.shape if kind == "norm" else repr(module.act_fn))
        if key not in tried:
            tried[key] = (_norm_of if kind == "norm" else _gate_of)(module)
        if (forward := tried[key]) is not None:
            module.forward = MethodType(forward, module)
            found[kind] += 1
    if on["rope"]:
        found["rope"] = _rope(decoder)
    return found


def _kind(module: nn.Module) -> str | None:
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight") and _epsilon(module) is not None:
        return "norm"
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return "gate"
    return None


def _epsilon(norm: Any) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _same(found: Tensor, expected: Tensor) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(expected.dtype, 1e-5)
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def _numbers(*shape: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator).to(like.device, like.dtype)


def _norm_of(norm: Any) -> Callable[..., Tensor] | None:
    from liger_kernel.transformers.functional import liger_rms_norm

    x = _numbers(3, len(norm.weight), like=norm.weight)
    expected = norm(x.clone())
    for offset, casting in ((0.0, "llama"), (1.0, "gemma")):

        def forward(self: Any, x: Tensor, offset: float = offset, casting: str = casting) -> Tensor:
            return liger_rms_norm(x, self.weight, _epsilon(self), offset, casting, not offset)

        if _same(forward(norm, x), expected):
            return forward
    return None


def _gate_of(mlp: Any) -> Callable[..., Tensor] | None:
    from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

    weight = next(p for p in mlp.gate_proj.parameters() if p.is_floating_point())
    a, b = _numbers(2, 3, 64, like=weight)
    x = _numbers(3, mlp.gate_proj.in_features, like=weight)
    own = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    if not _same(own, mlp(x)):
        return None
    for gated in (liger_swiglu, liger_geglu):

        def forward(self: Any, x: Tensor, gated: Callable[..., Tensor] = gated) -> Tensor:
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))

        if _same(gated(a.clone(), b.clone()), mlp.act_fn(a) * b):
            return forward
    return None


def _rope(decoder: Any) -> int:
    """1 where attention of the decoder's family turns queries and keys by liger-kernel's kernel from now on, on this device."""
    from liger_kernel.transformers.functional import liger_rope

    modeling: Any = sys.modules[type(decoder).__module__]
    own, device = getattr(modeling, "apply_rotary_pos_emb", None), next(decoder.parameters()).device.type
    if own is None or getattr(own, "of_liger", None) == device:
        return int(own is not None)
    like = next(p for p in decoder.parameters() if p.is_floating_point())
    q, k = _numbers(1, 4, 3, 16, like=like), _numbers(1, 2, 3, 16, like=like)
    cos, sin = (torch.cat([half, half], -1) for half in _numbers(2, 1, 3, 8, like=like))
    try:
        expected = own(q, k, cos, sin)
        found = liger_rope(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)), cos, sin)
    except (TypeError, ValueError, RuntimeError):  # of another form
        return 0
    if not all(map(_same, found, expected)):
        return 0

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *arguments: Any, **options: Any) -> Any:
        if q.device.type != device or arguments or options:
            return own(q, k, cos, sin, *arguments, **options)
        return liger_rope(q, k, cos, sin)

    turned.of_liger = device  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = turned
    return 1


class _Norm(torch.autograd.Function):
    """What its norm keeps: what it was given, and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


class _Gate(torch.autograd.Function):
    """What its gate keeps: both factors."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.empty_like(a)


def stand_in(decoder: Any) -> None:
    """Let a decoder on the meta device, where no kernel is launched, keep what it would with liger-kernel's."""
    for module in decoder.modules():
        if (kind := _kind(module)) == "norm":
            module.forward = MethodType(lambda self, x: _Norm.apply(x), module)
        elif kind == "gate":
            module.forward = MethodType(
                lambda self, x: self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x))), module
            )
