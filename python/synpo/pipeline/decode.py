"""Plain and contrastive decoding of many prompts at once.

    answers = generate(lm, prompts, sampling, keys=ids, amateurs=fewer_frames, contrast=ContrastConfig())

Expert and amateur are read separately, each at its own length, then written as one batch of twice the rows: one forward
pass a token. Mixing and sampling are one fused op (`synpo_kernels.contrast`); rows that are finished leave the batch.

What a row draws follows from its key alone, so neither the other rows nor a restart change its text (up to rounding).
Where an earlier answer to nearly the same question is known, its tokens are guessed ahead (lookahead.py) and a pass writes
several tokens a row; rows then stand at different places of their answers.

Shape legend: R rows, T tokens of an answer, S tokens read in one pass (the last one and the guesses), V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from synpo.config import ContrastConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, Prompt
from synpo.pipeline.lookahead import MOST, Drafts, guesses
from synpo.pipeline.reader import Reader
from synpo.pipeline.streams import merge
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
    readers: tuple[Reader, Reader] | None = None,
    drafts: Sequence[Sequence[int]] | None = None,
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
        readers: of prompts and of amateurs, that remember videos from one call to the next (None: nothing is remembered).
        drafts: R earlier answers (token ids) that these may repeat in part. They change the time taken, never the answers.
        check_every: passes between looks at which rows are finished, each a wait for the device (None: 1 on a CPU, else 8).

    Returns:
        R answers, in order.

    Raises:
        ValueError: the lengths do not match, the model is in training mode, a prompt and its answer would not fit its context,
            or its layers keep a past that cannot be merged.
        FloatingPointError: the model gave NaN logits.
    """
    _check(lm, prompts, sampling, keys, amateurs, contrast, drafts)
    if not prompts:
        return []
    device = lm.device
    limit, count = sampling.max_new_tokens, len(prompts)
    check_every = check_every or (1 if device.type == "cpu" else 8)
    ends = torch.tensor(lm.eos_token_ids, device=device)
    draws: Tensor | None = None
    if sampling.temperature > 0:  # with columns that nobody reads, beyond the end
        draws = F.pad(uniforms(keys, limit).double(), (0, 1 + MOST)).flatten().to(device)

    both = 1 if amateurs is None else 2
    if sampling.repetition_penalty != 1 or guesses(count * both, device) == 0:
        drafts = None
    # A pass that guesses takes a column for each guess; guessing ends when only the room for single tokens is left.
    room = limit if drafts is None else 3 * limit
    reader, weak_reader = readers or (Reader(lm), Reader(lm))
    streams, expert = reader.read(prompts, room=room if amateurs is None else 0)
    amateur: Tensor | None = None
    if amateurs is not None:
        weak, amateur = weak_reader.read(amateurs)
        streams = merge([streams, weak], room=room)
        del weak
    ahead: Drafts | None = None
    if drafts is not None and not any(streams.cache.is_sliding):
        ahead = Drafts(drafts, lm.eos_token_ids[0], device, streams=both)

    page = Page(count, limit, lm.pad_token_id, ends)
    expert, amateur = expert[:, None], None if amateur is None else amateur[:, None]  # (R, S, V)
    guessed: Tensor | None = None  # (R, S - 1)
    for step in range(limit):
        size = expert.shape[1]
        places = page.places(size)
        token, logp = contrastive_sample(
            expert.flatten(0, 1),
            None if amateur is None else amateur.flatten(0, 1),
            alpha=contrast.alpha if contrast else 0.0,
            plausibility=contrast.plausibility if contrast else 0.0,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            history=page.tokens[page.rows, :step] if sampling.repetition_penalty != 1 else None,
            uniform=None if draws is None else draws[places],
        )
        token = token.view(-1, size)
        taken = page.write(token, logp, places, guessed)
        last = token[:, :1]
        if guessed is not None:
            streams.take_back(size, taken if amateur is None else taken.repeat(2))
            last = token.gather(1, taken[:, None] - 1)  # (R, 1)
        if step + 1 == limit:
            break
        if ahead is not None:
            ahead.follow(token, taken, guessed is not None)
        if (step + 1) % check_every == 0:
            left = len(page.done) - int(page.done.sum())
            if left == 0:
                break
            if (len(page.done) - left) * SHRINK >= len(page.done):
                alive = page.done.byte().argsort(stable=True)[:left]
                streams.keep(alive if amateur is None else torch.cat([alive, alive + len(page.done)]))
                page.keep(alive)
                last = last[alive]
                if ahead is not None:
                    ahead.keep(alive)
            if ahead is not None:
                ahead.judge()
        guessed = None
        room -= 1
        if ahead is not None and room - MOST >= limit - 2 - step:  # columns for the passes that may follow
            guessed = ahead.guess()
            if guessed is not None:
                room -= guessed.shape[1]
                last = torch.cat([last, guessed], dim=1)
        logits = streams.step(last if amateur is None else last.repeat(2, 1))
        expert = logits[: len(page.rows)]
        amateur = None if amateur is None else logits[len(page.rows) :]
    page.close()
    return _answers(lm, page)


class Page:
    """The answers so far. `rows` are those the batch still writes, `place` and `done` are theirs.

    Places count through the page, row after row: where a row's next token goes is `place`, where it would be full `full`.
    """

    def __init__(self, count: int, limit: int, pad: int, ends: Tensor) -> None:
        device, width = ends.device, limit + 1 + MOST  # T, then what was drawn beyond the end
        self.limit, self.ends = limit, ends
        self.steps = torch.arange(1 + MOST, device=device)
        self.tokens = torch.full((count, width), pad, device=device)  # (R, T)
        self.logps = torch.zeros(count, width, device=device)
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)  # tokens written, the end included
        self.rows = torch.arange(count, device=device)
        self.place = self.rows * width
        self.full = self.place + limit
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        self.one = torch.ones_like(self.rows)

    def places(self, size: int) -> Tensor:
        """Where the next tokens go: (R · S,)."""
        return self.place if size == 1 else (self.place[:, None] + self.steps[:size]).flatten()

    def write(self, token: Tensor, logp: Tensor, places: Tensor, guessed: Tensor | None) -> Tensor:
        """Take the tokens drawn for `places`, (R, S), up to the first after a wrong guess, (R, S - 1). Returns how many, (R,)."""
        self.tokens.view(-1).scatter_(0, places, token.flatten())
        self.logps.view(-1).scatter_(0, places, logp)
        ends = (token[..., None] == self.ends).any(-1)
        if guessed is None:
            self.place = self.place + ~self.done
            self.done = self.done | ends[:, 0] | (self.place == self.full)
            return self.one
        taken = 1 + (token[:, :-1] == guessed).long().cumprod(1).sum(1)
        ends &= self.steps[: token.shape[1]] < taken[:, None]
        ended = ends.any(1)
        after = self.place + torch.where(ended, ends.int().argmax(1) + 1, taken)
        self.place = torch.where(self.done, self.place, torch.minimum(after, self.full))
        self.done = self.done | ended | (self.place == self.full)
        return taken

    def keep(self, alive: Tensor) -> None:
        """Go on with these rows of the batch only; the others are as long as they are."""
        self.close()
        self.rows, self.place, self.full = self.rows[alive], self.place[alive], self.full[alive]
        self.done, self.one = self.done[alive], self.one[: len(alive)]

    def close(self) -> None:
        """Note how long the answers of the batch are."""
        self.lengths[self.rows] = self.place - self.full + self.limit


def _check(
    lm: CaptionModel,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    keys: Sequence[str],
    amateurs: Sequence[Prompt] | None,
    contrast: ContrastConfig | None,
    drafts: Sequence[Sequence[int]] | None,
) -> None:
    """Raise ValueError for a call that `generate` cannot take."""
    for name, given in (("key", keys), ("amateur", amateurs), ("draft", drafts)):
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"expected a {name} for each of {len(prompts)} prompts, got {len(given)}")
    if (amateurs is None) != (contrast is None):
        raise ValueError("contrastive decoding takes both amateurs and contrast; plain decoding neither")
    if lm.model.training:
        raise ValueError("the model is in training mode, with dropout on: call model.eval() before decoding")
    longest = max((len(p.input_ids) for p in (*prompts, *(amateurs or ()))), default=0)
    context = getattr(lm.base.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest + sampling.max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of {sampling.max_new_tokens} do not fit the model's context of "
            f"{context}: lower frames.maximum or max_new_tokens"
        )


def _answers(lm: CaptionModel, page: Page) -> list[Generation]:
    written = torch.arange(page.tokens.shape[1], device=page.tokens.device) < page.lengths[:, None]
    means = (page.logps.where(written, 0.0).sum(1) / page.lengths).tolist()
    if broken := sum(map(math.isnan, means)):
        raise FloatingPointError(
            f"{type(lm.base).__name__} gave NaN logits for {broken} of {len(means)} rows; its weights are "
            "broken or its dtype is too narrow (try model.dtype float32)"
        )
    answers = []
    for row, mean, length in zip(page.tokens.tolist(), means, page.lengths.tolist()):
        finished = row[length - 1] in lm.eos_token_ids
        ids = row[: length - 1] if finished else row[:length]
        answers.append(Generation(lm.text(ids), tuple(ids), mean, finished))
    return answers
