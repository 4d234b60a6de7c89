"""Rows on their way to becoming answers: their key/value caches, masks and positions, as one batch.

    step          one or a few tokens a row
    keep          rows that are finished leave
    merge         batches (expert and amateur) become one, the shorter padded on the left
    spread        rows are repeated: several answers to one prompt

Rows are aligned on the right. What does not belong to a row (padding on the left, columns between a shared prefix and the
rest, tokens that were tried and not taken) is masked, and positions are given explicitly, so it changes nothing.
What several rows have read of one prompt is not in their rows of the cache but held once (attention.py).

Shape legend: R rows, L columns of the cache, S new columns, G videos, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from synpo.model.adapter import CaptionModel
from synpo.pipeline.attention import Ragged, Shared, additive, by_row, reading, serves


class RoomLayer(DynamicLayer):
    """A cache layer with room for the whole answer: a step writes its columns, where DynamicLayer copies all of them."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]], room: int) -> None:
        """`parts` are keys and values (R_i, heads, L_i, D); their rows follow one another, aligned on the right."""
        super().__init__()
        keys = parts[0][0]
        self.lazy_initialization(keys, keys)
        rows, length = sum(len(k) for k, _ in parts), max(k.shape[-2] for k, _ in parts)
        self._room = []
        for columns in zip(*parts):
            space = keys.new_empty(
                rows, columns[0].shape[1], length + room, columns[0].shape[3]
            )  # (R, heads, L + room, D)
            first = 0
            for part in columns:
                begin = length - part.shape[2]
                space[first : first + len(part), :, :begin] = 0  # masked, but 0 · NaN would be NaN
                space[first : first + len(part), :, begin:length] = part
                first += len(part)
            self._room.append(space)
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self._length = length
        self.keys, self.values = (x[..., :length, :] for x in self._room)
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = by_row(key_states), by_row(value_states)
        start, end = self._length, self._length + keys.shape[-2]
        for room, new in zip(self._room, (keys, values)):
            room[..., start:end, :] = new
        return self._show(end)

    def get_seq_length(self) -> int:
        return self._length

    def batch_select_indices(self, indices: Tensor) -> None:
        kept = []
        for x in self._room:
            space = x.new_empty(len(indices), *x.shape[1:])
            space[..., : self._length, :] = x[:, :, : self._length][indices]
            kept.append(space)
        self._room = kept
        self._show(self._length)


@dataclass
class Streams:
    """R rows that have read their prompts.

    Attributes:
        cache: their keys and values, L columns.
        mask: (R, L) bool, True on tokens; with the columns to come where there is room for them, (R, L + room).
        position: of the next token: (R, 1) int64, or (3, R, 1) for models that count in three dimensions.
        shared: what is held once for several rows, in front of the cache's columns.
    """

    lm: CaptionModel
    cache: Cache
    mask: Tensor
    position: Tensor
    shared: Shared | None = None

    def __post_init__(self) -> None:
        self._padded = not bool(self.mask.all())
        self._bias = additive(self.mask)
        self._served = serves(self.lm, self.cache)

    def step(self, tokens: Tensor) -> Tensor:
        """Read S more tokens a row, (R, S) int64. Returns the logits (R, S, V) of what follows each."""
        new = tokens.shape[1]
        positions = self.position if new == 1 else self.position + torch.arange(new, device=tokens.device)
        self.position = self.position + new
        return self.read(tokens, positions, keep=new)

    def read(self, tokens: Tensor, positions: Tensor, keep: int = 1) -> Tensor:
        """Read tokens (R, S) at these positions, (R, S) or (3, R, S). Returns the logits (R, keep, V) at the last columns."""
        new = tokens.shape[1]
        length = self.cache.get_seq_length() + new
        mask = self.mask[:, :length].long() if self._padded else None
        guide: Any = nullcontext()
        if self._served and (self._padded or new > 1 or self.shared is not None or not tokens.is_cuda):
            mask = self._causal(new) if self._padded or new > 1 else None
            guide = reading(mask, self.shared, len(self.cache.layers))
        with guide:
            return forward(self.lm, self.cache, keep, input_ids=tokens, attention_mask=mask, position_ids=positions)

    def read_rest(self, tokens: Tensor, positions: Tensor, given: Tensor) -> Tensor:
        """Read the tokens (R, S) that are `given`, (R, S) bool on the CPU, at these positions. Returns logits (R, V) of the last.

        They are aligned on the right. Where the attention is ours no padding goes through the model.
        """
        if not self._served or bool(given.all()):
            return self.read(tokens, positions)[:, -1]
        ragged = Ragged(given, tokens.device)
        mask = self._causal(tokens.shape[1])
        where = (..., ragged.row, ragged.column)
        with reading(mask, self.shared, len(self.cache.layers), ragged):
            return forward(
                self.lm, self.cache, ragged.last,
                input_ids=tokens[where][None], attention_mask=mask, position_ids=positions[where][..., None, :],
            )[0]  # fmt: skip

    def _causal(self, new: int) -> Tensor:
        """The mask of the last `new` columns, to be added to scores: (R, 1, new, L) fp32."""
        length = self.cache.get_seq_length() + new
        mask = self._bias[:, None, None, :length]
        if new == 1:
            return mask
        mask = mask.repeat(1, 1, new, 1)
        mask[..., length - new :] += additive(self.mask.new_ones(new, new).tril())
        return mask

    def take_back(self, new: int, taken: Tensor) -> None:
        """Of the last `new` tokens read, rows keep the first `taken`, (R,) int64, and forget the others."""
        length = self.cache.get_seq_length()
        columns = slice(length - new, length)
        self.mask[:, columns] = torch.arange(new, device=taken.device) < taken[:, None]
        self._bias[:, columns] = additive(self.mask[:, columns])
        self.position = self.position - (new - taken)[:, None]
        self._padded = True

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, (K,) int64, only."""
        self.cache.batch_select_indices(rows)
        self.mask, self._bias = self.mask[rows], self._bias[rows]
        self.position = self.position[..., rows, :]
        if self.shared is not None:
            self.shared = self.shared.keep(rows)


def forward(lm: CaptionModel, cache: Cache, keep: int | Tensor = 1, **inputs: Tensor | None) -> Tensor:
    """Logits (R, K, V) at the last `keep` columns, or at those given, (K,) int64."""
    return lm.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits


def spread(streams: Streams, rows: Tensor, room: int) -> Streams:
    """These rows of the streams, (K,) int64, an index as often as it is wanted, with room for more tokens."""
    lm, mask, shared = streams.lm, streams.mask, streams.shared
    if any(streams.cache.is_sliding):
        streams.keep(rows)
        return merge([streams], room)
    if shared is not None:
        shared = shared.keep(rows)
    elif serves(lm, streams.cache):
        shared = share(streams.cache, None, mask, rows)
        mask = mask[:, :0]
    cache = Cache(layers=[repeat(layer, rows, mask.shape[1], room) for layer in streams.cache.layers])
    return Streams(lm, cache, F.pad(mask[rows], (0, room), value=True), streams.position[..., rows, :], shared)


def share(cache: Cache, places: Tensor | None, mask: Tensor, group: Tensor) -> Shared:
    """These rows of a cache, (G,) int64, their first columns as `mask`, (G, P), for rows of these groups, (R,) int64.

    All of its rows, None, are not copied but shown: nothing writes to what is shared.
    """
    layers: list[Any] = cache.layers
    keys, values = (
        [x[:, :, : mask.shape[1]] if places is None else x[places, :, : mask.shape[1]].contiguous() for x in columns]
        for columns in zip(*((layer.keys, layer.values) for layer in layers))
    )
    return Shared(keys, values, mask, group)


def repeat(layer: Any, source: Tensor, width: int, room: int) -> Any:
    """The first `width` columns of a layer, its rows repeated as `source` says, and room for more."""
    if layer.keys is None:  # a layer that borrows another's keys
        return layer
    return RoomLayer([(layer.keys[source, :, :width], layer.values[source, :, :width])], room)


def merge(streams: Sequence[Streams], room: int) -> Streams:
    """Several streams of the same model as one batch, rows in order, with room for `room` more tokens."""
    length = max(s.mask.shape[1] for s in streams)
    layers = [_merge_layers(layer, room) for layer in zip(*(s.cache.layers for s in streams))]
    mask = torch.cat([F.pad(s.mask, (length - s.mask.shape[1], 0)) for s in streams])
    position = torch.cat([s.position for s in streams], dim=-2)
    shared = None
    if any(s.shared is not None for s in streams):
        shared = Shared.merge([s.shared or _share_nothing(s) for s in streams])
    return Streams(streams[0].lm, Cache(layers=layers), F.pad(mask, (0, room), value=True), position, shared)


def _share_nothing(streams: Streams) -> Shared:
    rows = torch.arange(len(streams.mask), device=streams.mask.device)
    return share(streams.cache, None, streams.mask[:, :0], rows)


def _merge_layers(layers: Sequence[Any], room: int) -> Any:
    first = layers[0]
    if first.keys is None:
        return first
    if not isinstance(first, DynamicSlidingWindowLayer):
        return RoomLayer([(x.keys, x.values) for x in layers], room)
    # A window keeps the last columns, and those are aligned on the right like everything else.
    length = max(x.keys.shape[-2] for x in layers)
    keys, values = (
        torch.cat([F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in columns])
        for columns in zip(*((x.keys, x.values) for x in layers))
    )
    layer = DynamicSlidingWindowLayer(sliding_window=first.sliding_window)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    layer.cumulative_length = max(x.cumulative_length for x in layers)
    return layer
