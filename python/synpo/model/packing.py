"""Prefix sharing: a pair as one stretch of a row, its prompt computed once, exact against two separate sequences.

    tokens     [ prompt P | chosen C | rejected R ][ next pair … ]           all pairs of a batch, one row, no padding
    attention  chosen: causal over prompt and chosen;  rejected: causal over prompt and rejected;  pairs: apart
    position   0 … P+C−1 for prompt and chosen, P … P+R−1 for rejected       (mrope: as in the separate sequences)
    predict    state P−1 predicts the first token of BOTH completions

Attention is not one masked L×L product: [P|C] attends to itself, causal, and R to [P|R], each to the end of its own keys. Nothing
is computed that a mask would throw away, and no mask of L×L exists. Two ways:

    one call a layer     a flash kernel over 2B runs of unequal length (flash-attn's, or torch's own on a GPU in half precision)
                         with keys and values gathered as [P|C][P|R][P|C]…
    two calls a pair     of the model's own kernel, where that does not serve. On a GPU the second is computed again for the
                         backward pass: else each layer would hold the prompt's keys and values twice, and where a mask keeps
                         grouped heads from the kernel, repeated for every query head.

The lengths (B, 3) travel through the model where a 4-D attention mask would: transformers passes those on unchanged.

Prior art: Wang & Hegde, arXiv 2410.20305 (one masked row a pair).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from synpo.model.adapter import CaptionModel
from synpo.model.meant import computes_in, device_of
from synpo.model.vision import Vision

MASKED = {"sdpa": True, "flash_attention_2": False, "flash_attention_3": False}
"""Implementations that serve, and whether they need a mask to align the ends of fewer queries and more keys, a call a run."""

WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of layers that see only so many tokens, and the setting that says how many."""

AGAIN = {"cuda"}
"""Where rejected answers attend a second time in the backward pass: a GPU's memory is scarcer than its products; on a CPU this
would cost a twentieth of the step."""

HALVES = (torch.float16, torch.bfloat16)
PLAIN = ("softcap", "s_aux")
"""What changes a score or a sum, and only the model's own kernel knows."""

TAKES = frozenset(inspect.signature(varlen.varlen_attn).parameters)
"""The arguments of torch's kernel for runs of unequal length; releases differ in them."""

_installed: dict[str, Callable[..., Any]] = {}
_rows: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Runs:
    """The 2B stretches of queries of a packed row and their keys: where they begin and end, (2B + 1,) int32, and the longest.

    Keys are those at `places` (K,) int64 of the row, K = Σ 2P + C + R.
    """

    queries: Tensor
    keys: Tensor
    places: Tensor
    longest: tuple[int, int]


@dataclass
class _Row:
    """(prompt, chosen, rejected) of every pair of a row, on the host."""

    pairs: list[list[int]]
    _runs: dict[torch.device, Runs] = field(default_factory=dict)

    def runs(self, lengths: Tensor, device: torch.device) -> Runs:
        """Made once a forward pass, of lengths (B, 3) on the device: the host neither copies nor waits."""
        if device not in self._runs:
            prompt, chosen, rejected = lengths.reshape(-1, 3).to(device).unbind(1)
            answered = prompt + chosen
            begin = (answered + rejected).cumsum(0) - answered - rejected
            starts = torch.stack([begin, begin, begin + answered], 1).flatten()  # of [P|C], P and R
            sizes = torch.stack([answered, prompt, rejected], 1).flatten()
            total = sum(2 * p + c + r for p, c, r in self.pairs)
            shift = (starts - sizes.cumsum(0) + sizes).repeat_interleave(sizes, output_size=total)
            self._runs[device] = Runs(
                _bounds(answered, rejected),
                _bounds(answered, prompt + rejected),
                torch.arange(total, device=device) + shift,
                (max(max(p + c, r) for p, c, r in self.pairs), max(p + max(c, r) for p, c, r in self.pairs)),
            )
        return self._runs[device]


def _bounds(first: Tensor, second: Tensor) -> Tensor:
    return F.pad(torch.stack([first, second], 1).flatten().cumsum(0), (1, 0)).int()


def implementation(lm: CaptionModel) -> str:
    """The attention of the language model, by its name in transformers."""
    return str(lm.base.config.get_text_config()._attn_implementation)


def window(lm: CaptionModel) -> int | None:
    """Longest sequence every layer sees as a whole; None where no layer is limited.

    Raises ValueError when a layer is not attention: a state that runs through the row would carry one answer into the other.
    """
    config = lm.base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {"full_attention", *WINDOWS}:
        raise ValueError(f"it has {', '.join(sorted(unknown))} layers, which read a row from end to end")
    if not kinds:
        kinds = set(WINDOWS)
    sizes = [getattr(config, setting, None) for kind, setting in WINDOWS.items() if kind in kinds]
    return min((size for size in sizes if size), default=None)


def packed_inputs(
    lm: CaptionModel, input_ids: Tensor, lengths: Tensor, sequences: Tensor, visions: Sequence[Vision]
) -> dict[str, Any]:
    """Keyword arguments of the model's top-level forward for a packed row.

    Args:
        input_ids: (1, L). lengths: (B, 3) int64, tokens of prompt, chosen and rejected of every pair, L in all; on the host,
            or every forward pass waits for them once.
        sequences: (2B, S) int64, place in the row of every token of the separate sequences, chosen first, -1 behind the end.
        visions: B visual parts.
    """
    install(implementation(lm))
    there = sequences >= 0
    ids = input_ids.flatten()[sequences.clamp(min=0)].masked_fill(~there, lm.pad_token_id)  # (2B, S)
    separate = lm.positions(ids, there.long(), [*visions, *visions])  # (2B, S) or (3, 2B, S)
    width = input_ids.shape[1]
    positions = separate.new_zeros(*separate.shape[:-2], 1, width + 1)  # the last place for what stands nowhere
    positions[..., 0, sequences.where(there, width)] = separate
    mask = lengths[None, None].to(input_ids.device, non_blocking=lengths.is_pinned())
    if not lengths.is_cuda:
        _rows[mask] = _Row(lengths.tolist())
    return {**lm.inputs(input_ids, visions), "attention_mask": mask, "position_ids": positions[..., :width]}


def install(name: str) -> None:
    """Teach transformers' attention `name` to read lengths in place of a mask; with any other mask it is as it was."""
    if name in _installed:
        return
    if name not in MASKED:
        raise ValueError(f"{name} attention cannot share prefixes; load the model with model.attention = sdpa")
    inner = _installed[name] = ALL_ATTENTION_FUNCTIONS[name]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is None or attention_mask.dim() != 4 or attention_mask.dtype != torch.int64:
            return inner(module, query, key, value, attention_mask, **options)
        options.pop("position_ids", None)  # of the whole row: flash attention would look for sequences in them
        return _attend(inner, MASKED[name], module, query, key, value, attention_mask, options), None

    ALL_ATTENTION_FUNCTIONS.register(name, attention)


def _attend(
    inner: Callable[..., tuple[Tensor, Any]],
    masked: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """Attention (1, L, heads, head size) of packed pairs; query, key, value (1, heads, L, head size), lengths (1, 1, B, 3)."""
    if lengths not in _rows:  # one look at the device a forward pass, not one a layer
        _rows[lengths] = _Row(lengths.flatten(0, -2).tolist())
    row: _Row = _rows[lengths]
    if masked and not one_call(query, value, options):
        return _pair_by_pair(inner, module, query, key, value, row.pairs, options)
    runs = row.runs(lengths, query.device)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (1, L, heads, head size)
    key, value = (x.index_select(1, runs.places) for x in (key, value))
    if masked:
        half = computes_in(query)
        grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in TAKES else {}  # else it needs no word
        out: Any = varlen.varlen_attn(
            query[0].to(half),
            key[0].to(half),
            value[0].to(half),
            runs.queries,
            runs.keys,
            max_q=runs.longest[0],
            max_k=runs.longest[1],
            scale=options.get("scaling"),
            window_size=(-1, 0),  # causal, the ends of queries and keys aligned
            **grouped,
        )
        return out[None]
    bounds = {"cu_seq_lens_q": runs.queries, "cu_seq_lens_k": runs.keys}
    longest = dict(zip(("max_length_q", "max_length_k"), runs.longest))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return inner(module, query, key, value, None, **options, **bounds, **longest)[0]


def one_call(query: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether torch's kernel for runs of unequal length serves: flash attention on a GPU, in half precision, without dropout."""
    if device_of(query) != "cuda" or computes_in(query) not in HALVES or not {"scale", "window_size"} <= TAKES:
        return False
    if options.get("dropout", 0.0) > 0 or any(options.get(name) is not None for name in PLAIN):
        return False
    if not query.shape[-1] == value.shape[-1] <= 256 or query.shape[-1] % 8:
        return False
    return query.is_meta or (
        torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _pair_by_pair(
    inner: Callable[..., tuple[Tensor, Any]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: list[list[int]],
    options: dict[str, Any],
) -> Tensor:
    """As `_attend`, two calls a pair."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    again = learns and query.device.type in AGAIN
    parts = []
    start = 0
    for prompt, chosen, rejected in pairs:
        answer, other, end = start + prompt, start + prompt + chosen, start + prompt + chosen + rejected
        first = slice(start, other)
        parts.append(inner(module, query[:, :, first], key[:, :, first], value[:, :, first], None, **options)[0])

        def second(query: Tensor, *pieces: Tensor) -> Tensor:
            keys, values = torch.cat(pieces[:2], dim=2), torch.cat(pieces[2:], dim=2)
            rows, columns = query.shape[2], keys.shape[2]
            mask = query.new_ones(1, 1, rows, columns, dtype=torch.bool).tril(columns - rows)
            return inner(module, query, keys, values, mask, **options)[0]

        pieces = [x[:, :, part] for x in (key, value) for part in (slice(start, answer), slice(other, end))]
        if again:
            drawn = options.get("dropout", 0.0) > 0
            second = partial(checkpoint, second, use_reentrant=False, preserve_rng_state=drawn)
        parts.append(second(query[:, :, other:end], *pieces))
        start = end
    return torch.cat(parts, dim=1)
