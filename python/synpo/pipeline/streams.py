"""Prompts on their way to becoming answers: their key/value caches, masks and positions, as one batch.

    read      prompts that show the same video share one pass over what they have in common; each then reads its own rest
    merge     two batches (expert and amateur) become one, the shorter padded on the left
    step      one token a row
    keep      rows that are finished leave

Rows are aligned on the right, so padding is on the left or, after a shared prefix, between the prefix and the rest; it is
masked, and positions are given explicitly, so it changes nothing.

Shape legend: R rows, L columns of the cache, S new columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from synpo.model.adapter import CaptionModel, Prompt, pad_rows

VISUAL_TOKENS = ("video_token_id", "image_token_id", "video_token_index", "image_token_index")


class RoomLayer(DynamicLayer):
    """A cache layer with room for the whole answer: a step writes one column, where DynamicLayer copies all of them."""

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._room = [F.pad(x, (0, 0, 0, room)) for x in (keys, values)]  # (R, heads, L + room, D)
        self._show(keys.shape[-2])

    def _show(self, length: int) -> None:
        self.keys, self.values = (x[..., :length, :] for x in self._room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, new in zip(self._room, (key_states, value_states)):
            room[..., start:end, :] = new
        self._show(end)
        return self._room[0][..., :end, :], self._room[1][..., :end, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        self._room = [x[indices] for x in self._room]
        self._show(length)


@dataclass
class Streams:
    """R rows that have read their prompts.

    Attributes:
        cache: their keys and values, L columns.
        mask: (R, L) bool, True on tokens; after `merge` with the columns to come, (R, L + room).
        position: of the next token: (R, 1) int64, or (3, R, 1) for models that count in three dimensions.
    """

    lm: CaptionModel
    cache: Cache
    mask: Tensor
    position: Tensor

    def __post_init__(self) -> None:
        self._padded = not bool(self.mask.all())
        settings = self.lm.base.config.get_text_config()
        self._ready_mask = settings._attn_implementation == "sdpa" and not any(self.cache.is_sliding)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token a row, (R,) int64. Returns the logits (R, V) of the next one."""
        length = self.cache.get_seq_length() + 1
        mask: Tensor | None = None  # no padding, no mask: the fastest attention kernels take none
        if self._padded:
            mask = self.mask[:, :length]
            mask = mask[:, None, None] if self._ready_mask else mask.long()
        logits = _forward(
            self.lm, self.cache, input_ids=tokens[:, None], attention_mask=mask, position_ids=self.position
        )
        self.position = self.position + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, (K,) int64, only (or repeat them: an index may occur more than once)."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.position = self.position[..., rows, :]


def _forward(lm: CaptionModel, cache: Cache, **inputs: Tensor | None) -> Tensor:
    """Logits (R, V) at the last column."""
    return lm.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def _new_cache(lm: CaptionModel) -> DynamicCache:
    cache = DynamicCache(config=lm.base.config)
    other = sorted(
        {type(x).__name__ for x in cache.layers} - {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    )
    if other:
        raise ValueError(
            f"{type(lm.base).__name__} keeps its past in {', '.join(other)}; expected plain or sliding-window attention in "
            "every layer. Use a model with softmax attention throughout"
        )
    return cache


def _shared_length(lm: CaptionModel, prompts: Sequence[Prompt]) -> int:
    """Leading tokens that prompts about one video have in common; 0 where they cannot be read apart from the rest."""
    shortest = min(len(p.input_ids) for p in prompts)
    rows = torch.stack([p.input_ids[:shortest] for p in prompts])
    same = (rows == rows[0]).all(0).long().cumprod(0)
    length = min(int(same.sum()), shortest - 1)  # one token at least is left to give logits
    visual = torch.tensor([i for n in VISUAL_TOKENS if (i := getattr(lm.base.config, n, None)) is not None])
    return 0 if any(torch.isin(p.input_ids[length:], visual).any() for p in prompts) else length


def read(lm: CaptionModel, prompts: Sequence[Prompt]) -> tuple[Streams, Tensor]:
    """Run the model over prompts, R rows. Returns the streams and the logits (R, V) of the first tokens to come.

    Prompts whose `vision` is the same object show the same video: their common beginning is read once.
    """
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(id(prompt.vision), []).append(row)
    cache = _new_cache(lm)
    shared = [_shared_length(lm, [prompts[r] for r in rows]) for rows in groups.values()]
    # A window of attention counts columns, padding too: nothing may stand between a prefix and its rest.
    if len(groups) == len(prompts) or min(shared) == 0 or any(cache.is_sliding):
        return _read_all(lm, cache, [p.input_ids for p in prompts], [p.vision for p in prompts])

    firsts = [prompts[rows[0]] for rows in groups.values()]
    heads = [p.input_ids[:n] for p, n in zip(firsts, shared)]
    streams, _ = _read_all(lm, cache, heads, [p.vision for p in firsts])
    place = {row: g for g, rows in enumerate(groups.values()) for row in rows}
    streams.keep(torch.tensor([place[r] for r in range(len(prompts))], device=lm.device))
    ids, new = pad_rows([p.input_ids[shared[place[r]] :] for r, p in enumerate(prompts)], lm.pad_token_id, side="left")
    ids, new = ids.to(lm.device), new.to(lm.device)
    mask = torch.cat([streams.mask, new.bool()], dim=1)
    positions = streams.position + (new.cumsum(-1) - 1).clamp_(min=0)  # (R, S) or (3, R, S)
    logits = _forward(lm, cache, input_ids=ids, attention_mask=mask.long(), position_ids=positions)
    return Streams(lm, cache, mask, positions[..., -1:] + 1), logits


def _read_all(lm: CaptionModel, cache: Cache, rows: Sequence[Tensor], visions: Sequence[Any]) -> tuple[Streams, Tensor]:
    ids, mask = pad_rows(rows, lm.pad_token_id, side="left")
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    inputs = lm.forward_kwargs(ids, mask, visions)
    last = inputs["position_ids"].amax(-1, keepdim=True)  # (R, 1) or (3, R, 1)
    if last.dim() == 3:
        last = last.amax(0, keepdim=True).expand_as(last)
    logits = _forward(lm, cache, **inputs)
    return Streams(lm, cache, mask.bool(), last + 1), logits


def merge(streams: Sequence[Streams], room: int) -> Streams:
    """Several streams of the same model as one batch, rows in order, with room for `room` more tokens."""
    length = max(s.mask.shape[1] for s in streams)
    layers = [_merge_layers(layer, room) for layer in zip(*(s.cache.layers for s in streams))]
    mask = torch.cat([F.pad(s.mask, (length - s.mask.shape[1], 0)) for s in streams])
    position = torch.cat([s.position for s in streams], dim=-2)
    return Streams(streams[0].lm, Cache(layers=layers), F.pad(mask, (0, room), value=True), position)


def _merge_layers(layers: Sequence[Any], room: int) -> Any:
    first = layers[0]
    if first.keys is None:  # a layer that borrows another's keys
        return first
    length = max(x.keys.shape[-2] for x in layers)
    keys, values = (
        torch.cat([F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in columns])
        for columns in zip(*((x.keys, x.values) for x in layers))
    )
    if not isinstance(first, DynamicSlidingWindowLayer):
        return RoomLayer(keys, values, room)
    # A window keeps the last columns, and those are aligned on the right like everything else.
    layer = DynamicSlidingWindowLayer(sliding_window=first.sliding_window)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    layer.cumulative_length = max(x.cumulative_length for x in layers)
    return layer
