"""Captions of videos and of clips: a first description, then self-retrospective passes over the same frames.

Clip captions are one contrastive description a clip; candidates are N plain samples a video. Both are `describe`:

    frames ─→ draft ─→ second look at the same frames with the draft ─→ text
       └ every third frame: the amateur of contrastive decoding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from synpo.config import ContrastConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, Prompt
from synpo.pipeline.decode import generate
from synpo.pipeline.reader import Reader
from synpo.pipeline.retrospect import second_looks
from synpo.video import amateur_frames


@dataclass(frozen=True)
class Description:
    """`text`, the first `draft` it came from, the mean log-probability of its tokens, and whether it ended by itself."""

    text: str
    draft: str
    logp: float
    finished: bool


def describe(
    lm: CaptionModel,
    views: Sequence[Tensor],
    keys: Sequence[Sequence[str]],
    prompt: str,
    sampling: SamplingConfig,
    *,
    contrast: ContrastConfig | None = None,
    refinements: int = 1,
    seconds: Sequence[float] | None = None,
) -> list[list[Description]]:
    """Describe every view as often as it has keys.

    Args:
        views: frames, uint8 (F, 3, H, W) each; the numbers of frames may differ.
        keys: for every view the seeds of its samples. All samples of a view share one reading of its frames.
        contrast: decode contrastively, with every third frame of the view as the amateur's.
        refinements: self-retrospective passes over each sample.
        seconds: for every view how long the stretch is that its frames are spread over; see `CaptionModel.prompt`.

    Returns:
        For every view its descriptions, in the order of its keys.
    """
    readers = Reader(lm, remember=refinements > 0), Reader(lm, remember=refinements > 0)
    lasts = list(seconds) if seconds is not None else [None] * len(views)
    experts = _show(lm, views, prompt, lasts)
    fewer = [amateur_frames(v) for v in views] if contrast is not None else []
    amateurs = _show(lm, fewer, prompt, lasts)
    rows = [i for i, row in enumerate(keys) for _ in row]  # the view of every sample
    seeds = [key for row in keys for key in row]
    count, sides = len(rows), 1 if contrast is None else 2
    shown = [side[i] for side in (experts, amateurs) if side for i in rows]  # experts, then amateurs
    frames = [side[i] for side in (views, fewer) if side for i in rows]
    spread = [lasts[i] for i in rows] * sides
    weak = shown[count:] if contrast is not None else None
    answers = generate(lm, shown[:count], sampling, keys=seeds, amateurs=weak, contrast=contrast, readers=readers)
    drafts = [a.text for a in answers]
    for number in range(1, refinements + 1):
        for reader in readers:
            reader.remember = number < refinements
        looks = second_looks(lm, shown, frames, prompt, [a.text for a in answers] * sides, spread)
        answers = generate(
            lm,
            looks[:count],
            sampling,
            keys=[f"{seed} look {number}" for seed in seeds],
            amateurs=looks[count:] if contrast is not None else None,
            contrast=contrast,
            readers=readers,
            drafts=[a.tokens for a in answers],
        )
    done = iter(Description(a.text, draft, a.logp, a.finished) for a, draft in zip(answers, drafts))
    return [[next(done) for _ in row] for row in keys]


def _show(lm: CaptionModel, views: Sequence[Tensor], prompt: str, seconds: Sequence[float | None]) -> list[Prompt]:
    """The first question about every view, its frames through the vision tower once."""
    prompts = [lm.prompt(prompt, v, seconds=s) for v, s in zip(views, seconds)]
    return [replace(p, vision=v) for p, v in zip(prompts, lm.encode_vision([p.vision for p in prompts]))]
