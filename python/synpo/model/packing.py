"""Prefix sharing: a pair as one stretch of a row, its prompt computed once, exact against two separate sequences.

    tokens     [ prompt P | chosen C | rejected R ][ next pair … ]           all pairs of a batch, one row, no padding
    attention  chosen: causal over prompt and chosen;  rejected: causal over prompt and rejected;  pairs: apart
    position   0 … P+C−1 for prompt and chosen, P … P+R−1 for rejected       (mrope: as in the separate sequences)
    predict    state P−1 predicts the first token of BOTH completions

Attention is not one masked L×L product but two calls of the model's own kernel a pair: [P|C] against itself, causal, and R
against [P|R]. Nothing is computed that a mask would throw away, no mask of L×L exists, and flash kernels serve both calls.
On a GPU the second is computed again for the backward pass: else each layer would hold the prompt's keys and values twice, and
where a mask keeps grouped heads from the kernel, repeated for every query head.
The lengths (B, 3) travel through the model where a 4-D attention mask would: transformers passes those on unchanged.

Prior art: Wang & Hegde, arXiv 2410.20305 (one masked row a pair).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from synpo.model.adapter import CaptionModel
from synpo.model.vision import Vision

MASKED = {"sdpa": True, "flash_attention_2": False, "flash_attention_3": False}
"""Implementations that serve, and whether they need a mask to align the ends of fewer queries and more keys."""

WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of layers that see only so many tokens, and the setting that says how many."""

AGAIN = {"cuda"}
"""Where rejected answers attend a second time in the backward pass: a GPU's memory is scarcer than its products; on a CPU this
would cost a twentieth of the step."""

_installed: dict[str, Callable[..., Any]] = {}
_lengths: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
        _lengths[mask] = lengths.tolist()
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
    if lengths not in _lengths:  # one look at the device a forward pass, not one a layer
        _lengths[lengths] = lengths.flatten(0, -2).tolist()
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    again = learns and query.device.type in AGAIN
    parts = []
    start = 0
    for prompt, chosen, rejected in _lengths[lengths]:
        answer, other, end = start + prompt, start + prompt + chosen, start + prompt + chosen + rejected
        first = slice(start, other)
        parts.append(inner(module, query[:, :, first], key[:, :, first], value[:, :, first], None, **options)[0])

        def second(query: Tensor, *pieces: Tensor) -> Tensor:
            keys, values = torch.cat(pieces[:2], dim=2), torch.cat(pieces[2:], dim=2)
            rows, columns = query.shape[2], keys.shape[2]
            mask = query.new_ones(1, 1, rows, columns, dtype=torch.bool).tril(columns - rows) if masked else None
            return inner(module, query, keys, values, mask, **options)[0]

        pieces = [x[:, :, part] for x in (key, value) for part in (slice(start, answer), slice(other, end))]
        if again:
            drawn = options.get("dropout", 0.0) > 0
            second = partial(checkpoint, second, use_reentrant=False, preserve_rng_state=drawn)
        parts.append(second(query[:, :, other:end], *pieces))
        start = end
    return torch.cat(parts, dim=1)
