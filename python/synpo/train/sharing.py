"""Whether a model can share the prefix of a pair, found out before training on a made-up row of two pairs.

Reading its configuration tells what cannot work; a few forward passes tell whether what is left does. They compare packed
hidden states with those of separate sequences, and look for leaks: other tokens in one answer, or in the other pair, must
not change a state at all.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from synpo.data.collate import PairCollator
from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel, evaluating
from synpo.model.gather import gathering
from synpo.model.meant import computes_in
from synpo.model.packing import MASKED, implementation, packed_inputs, window

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error of hidden states, relative in norm; a leak is anything beyond a tenth of it."""

LONGEST = 8  # tokens of the longest made-up answer


def collator_for(lm: CaptionModel, prefix_sharing: bool = True) -> PairCollator:
    """Batches in the layout that `lm` can be trained with. Warns with the reason where it cannot share prefixes."""
    if not prefix_sharing:
        return PairCollator(lm.pad_token_id, prefix_sharing=False)
    if (reason := why_not(lm)) is not None:
        warnings.warn(f"every prompt is computed twice: {reason}", stacklevel=2)
        return PairCollator(lm.pad_token_id, prefix_sharing=False)
    return PairCollator(lm.pad_token_id, longest=window(lm))


def why_not(lm: CaptionModel) -> str | None:
    """Why the pairs of `lm` have to be laid out as separate rows; None where they can share their prefix.

    Whatever the model raises on a packed row becomes the reason: it is unknown code, and padded rows will do.
    """
    name = implementation(lm)
    if name not in MASKED:
        return f"its attention is {name}, which takes no packed rows (model.attention = {' or '.join(MASKED)})"
    try:
        with torch.no_grad(), evaluating(lm.model), gathering(lm.model):
            return _differences(lm)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(lm.base).__name__}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _differences(lm: CaptionModel) -> str | None:
    first, second, other = _made_up(lm)
    seen, most = window(lm), max(len(p.prompt) for p in (first, second)) + LONGEST
    if seen is not None and seen < most:
        return f"{type(lm.base).__name__} has layers that see {seen} tokens, fewer than a short pair has"
    tolerance = TOLERANCE.get(computes_in(lm.head().weight), TOLERANCE[torch.float32])
    packed, separate = _states(lm, [first, second], True), _states(lm, [first, second], False)
    if (error := _error(packed, separate)) > tolerance:
        return f"{type(lm.base).__name__} gives other states for packed rows than for separate ones (by {error:.1e})"
    answers = [len(first.chosen), len(second.chosen), len(first.rejected), len(second.rejected)]
    changed = _states(lm, [other, second], True)
    for state, now in list(zip(packed.split(answers), changed.split(answers)))[1:]:
        if (error := _error(now, state)) > tolerance / 10:
            return f"{type(lm.base).__name__} lets packed answers see one another (states change by {error:.1e})"
    return None


def _made_up(lm: CaptionModel) -> list[EncodedPair]:
    """Two pairs with answers of 8 and 5, 3 and 6 tokens, about 4 and 2 frames of 64×64 noise; the first with another chosen."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(len(lm.tokenizer), 1 << 15), (22 + LONGEST,), generator=generator)
    for place in (*lm.eos_token_ids, lm.pad_token_id, *lm.placeholder_ids):
        ids[ids == place] = lm.completion("a")[0]
    answers = ids.split([LONGEST, 5, 3, 6, LONGEST])
    pairs = []
    for i, text in enumerate(("Describe the video in detail.", "What happens?")):
        frames = None
        if lm.sees_video:
            frames = torch.randint(0, 256, (4 - 2 * i, 3, 64, 64), dtype=torch.uint8, generator=generator)
        prompt = lm.prompt(text, frames, seconds=None if frames is None else 40.0 - 30 * i)
        pairs.append(EncodedPair(str(i), prompt.input_ids, answers[2 * i], answers[2 * i + 1], prompt.vision))
    return [*pairs, replace(pairs[0], chosen=answers[4])]


def _states(lm: CaptionModel, pairs: list[EncodedPair], packed: bool) -> Tensor:
    """Hidden states (N, D) that predict the answers, sequence by sequence, the chosen ones first."""
    batch = PairCollator(lm.pad_token_id, packed)(pairs)
    ids, mask, places = (batch[name].to(lm.device) for name in ("input_ids", "attention_mask", "sequences"))
    visions = lm.encode_vision([{k: v.to(lm.device) for k, v in vision.items()} for vision in batch["vision"]])
    if batch["lengths"] is None:
        inputs = lm.forward_kwargs(ids, mask, [*visions, *visions])
    else:
        inputs = packed_inputs(lm, ids, batch["lengths"].to(lm.device), places, visions)
    return lm.hidden_states(inputs).flatten(0, 1)[batch["rows"].to(lm.device)].float()


def _error(states: Tensor, expected: Tensor) -> float:
    error = float((states - expected).norm() / expected.norm())
    return error if error == error else float("inf")  # not a number: as far off as can be
