"""Prompts, read: those that show the same video share one pass over what they have in common, and so do later questions about it.

Each prompt then reads its own rest. A reader that remembers keeps the keys and values of the common beginnings, so that a
question about a video it knows needs neither pixels nor another pass over them.

Shape legend: R rows, G videos (groups of prompts), P columns of the prefixes, S new columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from synpo.model.adapter import CaptionModel, Prompt, pad_rows
from synpo.pipeline.attention import serves
from synpo.pipeline.lookahead import tokens_a_pass
from synpo.pipeline.streams import Streams, forward, merge, repeat, share, spread


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


def visual_tokens(lm: CaptionModel) -> Tensor:
    """Ids of the tokens that stand for parts of a video or image."""
    return torch.tensor(sorted(lm.placeholder_ids), dtype=torch.long)


def _shared_length(lm: CaptionModel, prompts: Sequence[Tensor], limit: int) -> int:
    """Leading tokens, `limit` at most, that prompts about one video have in common; 0 where visual ones are not all in them."""
    shortest = min(limit, *(len(p) for p in prompts))
    same = (torch.stack([p[:shortest] for p in prompts]) == prompts[0][:shortest]).all(0).long().cumprod(0)
    length = int(same.sum())
    visual = visual_tokens(lm)
    return 0 if any(torch.isin(p[length:], visual).any() for p in prompts) else length


@dataclass(frozen=True)
class _Prefixes:
    """What was read of G videos: tokens, caches, and the row of each. Holds the visions, so that their ids stay theirs."""

    streams: Streams
    tokens: list[Tensor]
    rows: dict[int, int]
    visions: list[Any]


@dataclass(frozen=True)
class _Known:
    """Of each of G groups of prompts the first `lengths[g]` tokens have been read: they are in row `places[g]` of `prefixes`."""

    prefixes: _Prefixes
    places: Sequence[int]
    lengths: Sequence[int]


class Reader:
    """Reads prompts and, where asked to, remembers their videos.

    Prompts whose `vision` is the same object show the same video: their common beginning is read once. A reader that
    remembers keeps the keys and values of that beginning (one row a video) until it reads other videos or is let go; a later
    question about the same videos that begins alike needs neither their pixels nor another pass over them. Told to remember
    no more (`remember`), it lets go of them with the next reading.

    Models with sliding-window attention read every prompt whole: a window counts columns, padding too, so nothing may stand
    between a prefix and its rest.
    """

    def __init__(self, lm: CaptionModel, remember: bool = False) -> None:
        self.lm = lm
        self.remember = remember
        self._prefixes: _Prefixes | None = None

    def read(self, prompts: Sequence[Prompt], room: int = 0) -> tuple[Streams, Tensor]:
        """Run the model over prompts, R rows, with room for `room` more tokens (0: to be merged). Equal prompts are read once.

        Returns the streams and the logits (R, V) of the first tokens to come.
        """
        places: dict[tuple[int, bytes], int] = {}
        order = [places.setdefault((id(p.vision), p.input_ids.numpy().tobytes()), len(places)) for p in prompts]
        if len(places) == len(prompts):
            return self._read(prompts, room)
        streams, logits = self._read([prompts[order.index(place)] for place in range(len(places))], 0)
        rows = torch.tensor(order, device=self.lm.device)
        return spread(streams, rows, room), logits[rows]

    def _read(self, prompts: Sequence[Prompt], room: int) -> tuple[Streams, Tensor]:
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(id(prompt.vision), []).append(row)
        texts = [[prompts[r].input_ids for r in rows] for rows in groups.values()]
        last = [min(len(p) for p in group) - 1 for group in texts]  # one token at least is left to give logits

        seen = self._prefixes
        if seen is not None and all(vision in seen.rows for vision in groups):
            places = [seen.rows[vision] for vision in groups]
            shared = [_shared_length(self.lm, [seen.tokens[p], *t], n) for p, t, n in zip(places, texts, last)]
            if min(shared) > 0:
                known = self._further(_Known(seen, places, shared), groups, prompts, last)
                if not self.remember:
                    self._prefixes = None
                del seen  # what `known` does not need is let go before more is read
                return self._rest(known, groups, prompts, room)

        self._prefixes = seen = None
        cache = _new_cache(self.lm)
        shared = [_shared_length(self.lm, group, n) for group, n in zip(texts, last)]
        alone = len(groups) == len(prompts)
        if alone or min(shared) == 0 or any(cache.is_sliding):
            streams, logits = _read_all(self.lm, cache, [p.input_ids for p in prompts], [p.vision for p in prompts])
            if self.remember and alone and not any(cache.is_sliding):
                self._prefixes = _remember(streams, prompts, [len(p.input_ids) for p in prompts])
            return (merge([streams], room) if room else streams), logits
        firsts = [prompts[rows[0]] for rows in groups.values()]
        heads = [p.input_ids[:n] for p, n in zip(firsts, shared)]
        seen = _remember(_read_all(self.lm, cache, heads, [p.vision for p in firsts])[0], firsts, shared)
        if self.remember:
            self._prefixes = seen
        return self._rest(_Known(seen, range(len(groups)), shared), groups, prompts, room)

    def _further(
        self, known: _Known, groups: dict[int, list[int]], prompts: Sequence[Prompt], last: Sequence[int]
    ) -> _Known:
        """Where the prompts of a group go on alike (an instruction, say), read that too once a group, if it saves a pass."""
        members = [[prompts[r].input_ids for r in rows] for rows in groups.values()]
        common = [_shared_length(self.lm, t, n) if len(t) > 1 else s for t, n, s in zip(members, last, known.lengths)]
        saved = sum((len(t) - 1) * (n - s) for t, n, s in zip(members, common, known.lengths))
        if saved <= tokens_a_pass(self.lm.device):
            return known
        firsts = [prompts[rows[0]] for rows in groups.values()]
        heads = [replace(p, input_ids=p.input_ids[:n]) for p, n in zip(firsts, common)]
        alone = {vision: [g] for g, vision in enumerate(groups)}
        seen = _remember(self._rest(known, alone, heads, 0)[0], firsts, common)
        if self.remember:
            self._prefixes = seen
        return _Known(seen, range(len(groups)), common)

    def _rest(
        self, known: _Known, groups: dict[int, list[int]], prompts: Sequence[Prompt], room: int
    ) -> tuple[Streams, Tensor]:
        """Read what follows what is known of every group."""
        lm, seen = self.lm, known.prefixes.streams
        device = lm.device
        of_row = {row: g for g, rows in enumerate(groups.values()) for row in rows}
        order = [of_row[r] for r in range(len(prompts))]
        group = torch.tensor(order, device=device)
        rows = torch.tensor(known.places, device=device)
        kept = torch.tensor(known.lengths, device=device)[:, None]
        unused = torch.tensor([len(known.prefixes.tokens[p]) for p in known.places], device=device)[:, None] - kept
        mask = seen.mask[rows]
        mask = mask & (mask.cumsum(1) <= kept)  # (G, P)
        width = 1 + int(mask.any(0).nonzero()[-1])
        mask = mask[:, :width]

        ids, new = pad_rows(
            [p.input_ids[known.lengths[g] :] for g, p in zip(order, prompts)], lm.pad_token_id, side="left"
        )
        given = new.bool()
        ids, new = ids.to(device), new.to(device)
        # What is left out of a prefix is text, which counts one position a token in every dimension.
        position = (seen.position[..., rows, :] - unused)[..., group, :]
        positions = position + (new.cumsum(-1) - 1).clamp_(min=0)  # (R, S) or (3, R, S)
        past = None
        if len(groups) < len(prompts) and serves(lm, seen.cache):
            everything = list(known.places) == list(range(len(seen.mask)))
            past = share(seen.cache, None if everything else rows, mask, group)
            width, mask = 0, mask[:, :0]
        cache = Cache(layers=[repeat(layer, rows[group], width, ids.shape[1] + room) for layer in seen.cache.layers])
        mask = F.pad(torch.cat([mask[group], new.bool()], dim=1), (0, room), value=True)
        streams = Streams(lm, cache, mask, position + new.sum(-1, keepdim=True), past)
        return streams, streams.read_rest(ids, positions, given)


def _remember(streams: Streams, prompts: Sequence[Prompt], lengths: Sequence[int]) -> _Prefixes:
    visions = [p.vision for p in prompts]
    tokens = [p.input_ids[:n] for p, n in zip(prompts, lengths)]
    return _Prefixes(streams, tokens, {id(v): row for row, v in enumerate(visions)}, visions)


def _read_all(lm: CaptionModel, cache: Cache, rows: Sequence[Tensor], visions: Sequence[Any]) -> tuple[Streams, Tensor]:
    ids, mask = pad_rows(rows, lm.pad_token_id, side="left")
    # (R, L + 1) or (3, R, L + 1): where the next token stands, only the model can say. It reads numbers one by one: on the CPU
    positions = lm.positions(F.pad(ids, (0, 1), value=lm.pad_token_id), F.pad(mask, (0, 1), value=1), visions)
    padded = not bool(mask.all())
    ids, mask, positions = (x.to(lm.device) for x in (ids, mask, positions))
    inputs: dict[str, Tensor | None] = {**lm.inputs(ids, visions), "position_ids": positions[..., :-1]}
    logits = forward(lm, cache, attention_mask=mask if padded else None, **inputs)[:, -1]  # type: ignore[arg-type]
    return Streams(lm, cache, mask.bool(), positions[..., -1:]), logits
