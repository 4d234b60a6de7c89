"""Attention while answers are written: what rows share of a prompt is held once and read once for all of them.

    weights of a row = softmax [ q · K_shared | q · K_own ]        K_shared: once a video;  K_own: the row's own columns

Eight answers to a question about one video so hold one copy of its keys and values, and a step multiplies with them once for
the eight. Two products and a softmax are also what a single new token needs, where kernels made for long queries are slow on a
CPU, and grouped heads need no repeated keys under a mask. Scores are fp32, as many at a time as `SCORES` says.

Rows that read texts of different lengths need no padding either: their tokens follow one another in one row (`Ragged`), and
only here each goes to its own.

Transformers calls the attention by name and hands it a mask; neither has a place there, so both are given here, for the time
of one pass (`reading`).

Shape legend: R rows, G groups of rows that share a prompt, A rows of the largest group, H heads of keys and n queries for each,
S new tokens a row, T new tokens of all rows, P columns of prompt, L columns of a row's own, D head size, X any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from synpo.model.adapter import CaptionModel

SCORES = {"cpu": 1 << 20, "cuda": 1 << 25}  # at a time, fp32: what a cache holds, and 128 MiB
OTHER = ("softcap", "position_bias", "s_aux")  # what some models add to their scores


@dataclass
class Shared:
    """Keys and values of G prompts and which of them each of R rows has read.

    Attributes:
        keys, values: for every layer (G, H, P, D).
        mask: (G, P) bool, True on tokens.
        group: (R,) int64.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    mask: Tensor
    group: Tensor

    def __post_init__(self) -> None:
        # (R, 1, 1, 1, P)
        self.bias = None if bool(self.mask.all()) else additive(self.mask)[self.group, None, None, None]
        group = self.group.cpu()  # waits for the device once; the rest is arithmetic on a few integers
        count = torch.bincount(group, minlength=len(self.mask))
        self.largest = int(count.max())
        order = group.argsort(stable=True)
        rank = torch.arange(len(order)) - (count.cumsum(0) - count)[group[order]]
        # Where a row stands when every group has room for A: its place in (G, A).
        slot = torch.empty_like(order).scatter_(0, order, group[order] * self.largest + rank)
        self.even = len(order) == len(count) * self.largest and bool((slot.diff() == 1).all())
        self.slot = slot.to(self.group.device)

    def keep(self, rows: Tensor) -> Shared:
        """Of these rows, (K,) int64, an index as often as it is wanted; prompts that none of them has read are let go."""
        used, group = self.group[rows].unique(return_inverse=True)
        if len(used) == len(self.mask):
            return Shared(self.keys, self.values, self.mask, group)
        return Shared([k[used] for k in self.keys], [v[used] for v in self.values], self.mask[used], group)

    @staticmethod
    def merge(parts: Sequence[Shared]) -> Shared:
        """Rows and prompts one after the other, the shorter prompts padded on the left."""
        width = max(p.mask.shape[1] for p in parts)

        def side_by_side(columns: Sequence[Tensor]) -> Tensor:
            return torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in columns])

        firsts = torch.tensor([len(p.mask) for p in parts]).cumsum(0).tolist()
        return Shared(
            [side_by_side(layer) for layer in zip(*(p.keys for p in parts))],
            [side_by_side(layer) for layer in zip(*(p.values for p in parts))],
            torch.cat([F.pad(p.mask, (width - p.mask.shape[1], 0)) for p in parts]),
            torch.cat([p.group + first for p, first in zip(parts, [0, *firsts])]),
        )

    def by_group(self, x: Tensor) -> Tensor:
        """(R, H, n, S, X) as (G·H, A·n·S, X); nothing where a group has fewer rows."""
        if not self.even:
            x = x.new_zeros(len(self.mask) * self.largest, *x.shape[1:]).index_copy_(0, self.slot, x)
        return x.unflatten(0, (len(self.mask), self.largest)).transpose(1, 2).flatten(0, 1).flatten(1, 3)

    def by_row(self, x: Tensor, like: Tensor) -> Tensor:
        """(G·H, A·n·S, X) as (R, H, n, S, X), with H, n and S of `like`."""
        heads, queries, new = like.shape[1:4]
        x = x.view(len(self.mask), heads, self.largest, queries, new, -1).transpose(1, 2).flatten(0, 1)
        return x if self.even else x[self.slot]


class Ragged:
    """Where T tokens of R rows stand, that follow one another: the row of each and its column of S, aligned on the right."""

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        """`mask`: (R, S) bool on the CPU, True on tokens."""
        self.shape = mask.shape
        self.row, self.column = (x.to(device) for x in mask.nonzero(as_tuple=True))
        self.last = (mask.sum(1).cumsum(0) - 1).to(device)  # (R,) the place of every row's last token

    def spread(self, x: Tensor) -> Tensor:
        """(1, H, T, D) as (R, H, S, D), zero where no token is: what is masked still meets a weight of zero."""
        wide = x.new_zeros(*self.shape, x.shape[1], x.shape[3])
        wide[self.row, self.column] = x[0].transpose(0, 1)
        return wide.transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(R, S, H, D) as (1, T, H, D)."""
        return x[self.row, self.column][None]


@dataclass
class _Pass:
    """The pass under way: the mask of the rows' own columns, (R, 1, S, L) or none, what they share, and the layers so far."""

    bias: Tensor | None
    shared: Shared | None
    ragged: Ragged | None
    layers: int = 0


_under_way: ContextVar[_Pass | None] = ContextVar("pass", default=None)
# attention of transformers in whose place this may stand, by name; anything else stays as it is
SERVED = ("sdpa", "flash_attention_2", "flash_attention_3")
_installed: set[str] = set()


def additive(mask: Tensor) -> Tensor:
    """0 where the mask is True, -inf elsewhere, fp32."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def serves(lm: CaptionModel, cache: Cache) -> bool:
    """Whether every layer of the model keeps its whole past and leaves its attention to one that this stands in for."""
    decoder = lm.base.get_decoder()
    return (
        decoder.config.get_text_config()._attn_implementation in SERVED
        and getattr(decoder, "_supports_attention_backend", False)
        and all(isinstance(x, DynamicLayer) and not x.is_sliding and x.keys is not None for x in cache.layers)
    )


def by_row(x: Tensor) -> Tensor:
    """New keys or values of the pass under way, (R, H, S, D) or (1, H, T, D), as (R, H, S, D)."""
    under_way = _under_way.get()
    return x if under_way is None or under_way.ragged is None else under_way.ragged.spread(x)


@contextmanager
def reading(bias: Tensor | None, shared: Shared | None, layers: int, ragged: Ragged | None = None) -> Iterator[None]:
    """For the time of one pass through `layers` layers, attention goes by `bias`, (R, 1, S, L), `shared` and `ragged`."""
    for name in SERVED:
        if name not in _installed:
            _install(name)
    token = _under_way.set(_Pass(bias, shared, ragged))
    try:
        yield
        seen = _under_way.get().layers  # type: ignore[union-attr]
        if seen != layers:
            raise RuntimeError(
                f"{seen} of {layers} layers asked for attention by its name in transformers; load the model with "
                "model.attention = eager"
            )
    finally:
        _under_way.reset(token)


def _install(name: str) -> None:
    """Teach transformers' attention `name` to look for a pass under way; without one it is as it was."""
    inner = ALL_ATTENTION_FUNCTIONS[name]
    _installed.add(name)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        under_way = _under_way.get()
        if under_way is None:
            return inner(module, query, key, value, attention_mask, **options)
        if unknown := [name for name in OTHER if options.get(name) is not None]:
            raise RuntimeError(
                f"attention with {unknown[0]} is not written here; load the model with model.attention = eager"
            )
        under_way.layers += 1
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = module.layer_idx
        shared, ragged = under_way.shared, under_way.ragged
        query = query if ragged is None else ragged.spread(query)
        columns = key.shape[2] + (0 if shared is None else shared.mask.shape[1])
        most = SCORES.get(query.device.type, SCORES["cuda"])
        size = max(1, most // max(1, query.shape[0] * query.shape[1] * columns))  # new tokens at a time
        parts = []
        for start in range(0, query.shape[2], size):
            few = slice(start, start + size)
            bias = None if under_way.bias is None else under_way.bias[:, :, few]
            parts.append(_attend(query[:, :, few], key, value, bias, shared, layer, scaling))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return (out if ragged is None else ragged.gather(out)), None

    ALL_ATTENTION_FUNCTIONS.register(name, attention)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, shared: Shared | None, layer: int, scaling: float
) -> Tensor:
    """Attention (R, S, heads, D) of queries (R, heads, S, D) to keys and values (R, H, L, D) and to what rows share."""
    rows, heads, new, size = query.shape
    q = query.reshape(rows, key.shape[1], -1, new, size)  # (R, H, n, S, D)
    scores = _product(q.flatten(0, 1).flatten(1, 2), key.flatten(0, 1)).view(*q.shape[:4], -1)
    scores = scores.mul_(scaling) if bias is None else torch.add(bias[:, :, None], scores, alpha=scaling)
    if shared is not None:
        keys, values = shared.keys[layer], shared.values[layer]
        prompts = shared.by_row(_product(shared.by_group(q), keys.flatten(0, 1)), q)
        bias = shared.bias
        prompts = prompts.mul_(scaling) if bias is None else torch.add(bias, prompts, alpha=scaling)
        scores = torch.cat([prompts, scores], dim=-1)
    weights = scores.softmax(-1).to(value.dtype)
    own = weights[..., -key.shape[2] :]
    out = torch.bmm(own.flatten(0, 1).flatten(1, 2), value.flatten(0, 1)).view(*q.shape[:4], -1)
    if shared is not None:
        prompts = shared.by_group(weights[..., : keys.shape[2]])
        out += shared.by_row(torch.bmm(prompts, values.flatten(0, 1)), q)
    return out.view(rows, heads, new, -1).transpose(1, 2)


def _product(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores (B, X, L) in fp32 of queries (B, X, D) and keys (B, L, D)."""
    keys = keys.transpose(1, 2)
    if queries.dtype in (torch.float32, torch.float64):
        return torch.bmm(queries, keys)
    if queries.is_cuda:
        return torch.bmm(queries, keys, out_dtype=torch.float32)
    return torch.bmm(queries.float(), keys.float())
