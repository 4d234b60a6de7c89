"""A flash kernel over runs of unequal length, made of torch: the arguments of `torch.nn.attention.varlen.varlen_attn`."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

ASKS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether this release's kernel has to be told that keys have fewer heads than queries; 2.11 takes them as they come."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: list[int],
    key_bounds: list[int],
    scale: float | None = None,
) -> Tensor:
    """Attention (T_q, heads, head size), each run causal, the end of its queries aligned with that of its keys."""
    out = []
    for i in range(len(query_bounds) - 1):
        q = query[query_bounds[i] : query_bounds[i + 1]].transpose(0, 1)
        k, v = (x[key_bounds[i] : key_bounds[i + 1]].transpose(0, 1) for x in (key, value))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        sdpa = torch.nn.functional.scaled_dot_product_attention
        out.append(sdpa(q[None], k[None], v[None], seen, scale=scale, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


class Runs:
    """Stands in for `varlen_attn`; `calls` counts."""

    def __init__(self, host: Any = lambda bounds: bounds) -> None:
        self.calls, self.host, self.real = 0, host, varlen_attn

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.is_meta:
            options: dict[str, Any] = {"scale": scale, "window_size": window_size}
            options |= {"enable_gqa": enable_gqa} if ASKS else {}
            return self.real(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)
        assert window_size == (-1, 0) and enable_gqa == ASKS and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        bounds = [self.host(bounds).tolist() for bounds in (cu_seq_q, cu_seq_k)]
        for found, longest in zip(bounds, (max_q, max_k)):
            assert max(b - a for a, b in zip(found, found[1:])) == longest
        self.calls += 1
        return attend(query, key, value, *bounds, scale=scale)
