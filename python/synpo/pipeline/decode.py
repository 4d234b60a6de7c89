"""Plain and contrastive decoding of many prompts at once.

    answers = generate(lm, prompts, sampling, keys=ids, amateurs=fewer_frames, contrast=ContrastConfig())

Expert and amateur are read separately, each at its own length, then written as one batch of twice the rows: one forward
pass a token. Mixing and sampling are one fused op (`synpo_kernels.contrast`); rows that are finished leave the batch.

What a row draws follows from its key alone, so neither the other rows nor a restart change its text (up to rounding).

Shape legend: R rows, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synpo.config import ContrastConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, Prompt
from synpo.pipeline.streams import merge, read
from synpo_kernels.contrast import contrastive_sample

SHRINK = 8  # finished rows leave once they are an eighth of the batch: leaving copies the cache of those that stay


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: its words.
        tokens: its token ids, without the end-of-sequence token.
        logp: mean log-probability of its tokens (the end included) under the distribution they were drawn from.
        finished: whether it ended by itself; False means it was stopped at `max_new_tokens`.
    """

    text: str
    tokens: tuple[int, ...]
    logp: float
    finished: bool


def uniforms(keys: Sequence[str], count: int) -> Tensor:
    """Numbers in [0, 1) for each key: (len(keys), count) fp32. A key's row depends on nothing but the key."""
    rows = [
        np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(k.encode()).digest()[:16], "little")))
        for k in keys
    ]
    return torch.from_numpy(np.stack([r.random(count, dtype=np.float32) for r in rows]))


@torch.inference_mode()
def generate(
    lm: CaptionModel,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    keys: Sequence[str],
    amateurs: Sequence[Prompt] | None = None,
    contrast: ContrastConfig | None = None,
    check_every: int | None = None,
) -> list[Generation]:
    """Answer every prompt.

    Prompts whose `vision` is the same object (N samples of one video, or N questions about it) are read together once.

    Args:
        lm: the model.
        prompts: R encoded prompts.
        sampling: how tokens are drawn; temperature 0 is greedy.
        keys: R strings that seed the rows, such as "<seed> <record id>".
        amateurs: R prompts with the same text and fewer frames, for contrastive decoding.
        contrast: how expert and amateur are mixed; with `amateurs` only.
        check_every: steps between looks at which rows are finished, each a wait for the device (None: 1 on a CPU, else 8).

    Returns:
        R answers, in order.

    Raises:
        ValueError: the lengths do not match, the model is in training mode, a prompt and its answer would not fit its context,
            or its layers keep a past that cannot be merged.
        FloatingPointError: the model gave NaN logits.
    """
    if len(keys) != len(prompts) or (amateurs is not None and len(amateurs) != len(prompts)):
        raise ValueError(
            f"expected a key and, if any, an amateur for each of {len(prompts)} prompts, got {len(keys)} keys and "
            f"{len(amateurs or ())} amateurs"
        )
    if (amateurs is None) != (contrast is None):
        raise ValueError("contrastive decoding takes both amateurs and contrast; plain decoding neither")
    if lm.model.training:
        raise ValueError("the model is in training mode, with dropout on: call model.eval() before decoding")
    if not prompts:
        return []
    device = lm.device
    limit = sampling.max_new_tokens
    longest = max(len(p.input_ids) for p in (*prompts, *(amateurs or ())))
    context = getattr(lm.base.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest + limit > context:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of {limit} do not fit the model's context of {context}: lower "
            "frames.maximum or max_new_tokens"
        )
    check_every = check_every or (1 if device.type == "cpu" else 8)
    ends = torch.tensor(lm.eos_token_ids, device=device)
    draws = uniforms(keys, limit).to(device) if sampling.temperature > 0 else None

    count = len(prompts)
    stream, expert = read(lm, prompts)
    if amateurs is None:
        amateur = None
        streams = merge([stream], room=limit)
    else:
        weak, amateur = read(lm, amateurs)
        streams = merge([stream, weak], room=limit)

    tokens = torch.full((count, limit), lm.pad_token_id, device=device)  # (R, T)
    logps = torch.zeros(count, limit, device=device)
    lengths = torch.full((count,), limit, device=device)  # tokens written, the end included
    rows = torch.arange(count, device=device)  # which answers the batch still writes
    done = torch.zeros(count, dtype=torch.bool, device=device)
    for step in range(limit):
        token, logp = contrastive_sample(
            expert,
            amateur,
            alpha=contrast.alpha if contrast else 0.0,
            plausibility=contrast.plausibility if contrast else 0.0,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            history=tokens[rows, :step] if sampling.repetition_penalty != 1 else None,
            uniform=None if draws is None else draws[rows, step],
        )
        tokens[rows, step] = token
        logps[rows, step] = logp
        ended = torch.isin(token, ends) & ~done
        lengths[rows] = lengths[rows].masked_fill(ended, step + 1)
        done = done | ended
        if step + 1 == limit:
            break
        if (step + 1) % check_every == 0:
            left = len(done) - int(done.sum())
            if left == 0:
                break
            if (len(done) - left) * SHRINK >= len(done):
                alive = (~done).nonzero()[:, 0]
                streams.keep(alive if amateur is None else torch.cat([alive, alive + len(done)]))
                rows, token, done = rows[alive], token[alive], done[alive]
        logits = streams.step(token if amateur is None else token.repeat(2))
        expert = logits[: len(rows)]
        amateur = None if amateur is None else logits[len(rows) :]
    return _answers(lm, tokens, logps, lengths)


def _answers(lm: CaptionModel, tokens: Tensor, logps: Tensor, lengths: Tensor) -> list[Generation]:
    written = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    means = (logps * written).sum(1) / lengths
    if bool(means.isnan().any()):
        raise FloatingPointError(
            f"{type(lm.base).__name__} gave NaN logits for {int(means.isnan().sum())} of {len(means)} rows; its weights are "
            "broken or its dtype is too narrow (try model.dtype float32)"
        )
    answers = []
    for row, mean, length in zip(tokens.tolist(), means.tolist(), lengths.tolist()):
        finished = row[length - 1] in lm.eos_token_ids
        ids = row[: length - 1] if finished else row[:length]
        answers.append(Generation(lm.text(ids), tuple(ids), mean, finished))
    return answers
