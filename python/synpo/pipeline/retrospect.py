"""The self-retrospective pass: the model sees the video again with its own earlier caption and writes a better one.

Self-retrospective sampling is from SynPO (arXiv 2506.00835, section 3); the wording is ours. The question begins like the first
one, video and all, so that what the model read of the video in the first pass serves the second (reader.py); the earlier
caption comes last, so that all candidates of a video share the instruction too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from synpo.model.adapter import CaptionModel, Prompt
from synpo.pipeline.reader import visual_tokens

INSTRUCTION = (
    "Here is an earlier description. Write a better one: correct mistakes, add missing details and the order of events, "
    "leave out what is uncertain."
)
MARKS = frozenset("<>[]|")  # what tokens of a chat are written with


def retrospective_prompt(prompt: str, draft: str) -> str:
    """The question of the second pass about the answer `draft` to `prompt`.

    It begins with `prompt` itself, so that video and question form a common prefix with the first pass.
    """
    return f"{prompt}\n{INSTRUCTION}\nEarlier description: {draft.strip()}"


def without_specials(tokenizer: Any, draft: str) -> str:
    """The draft as plain data: a blank where it would read as a token of the chat's own. Words that were added stay."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special or not MARKS.isdisjoint(token.content):
            draft = draft.replace(token.content, " ")
    return draft


def second_looks(
    lm: CaptionModel,
    shown: Sequence[Prompt],
    frames: Sequence[Tensor],
    prompt: str,
    drafts: Sequence[str],
    seconds: Sequence[float | None] | None = None,
) -> list[Prompt]:
    """The encoded questions of the second pass, one a draft; each shares what the first already knows of its video.

    Args:
        shown: the encoded questions of the first pass, their videos through the vision tower; R of them, experts and then
            amateurs, say.
        frames: what they showed, uint8 (F, 3, H, W) each.
        prompt: the text of the first question.
        drafts: R answers.
        seconds: that the frames are spread over, as the first questions were told (None: they were not).
    """
    if not shown:
        return []
    questions = {draft: retrospective_prompt(prompt, without_specials(lm.tokenizer, draft)) for draft in drafts}
    parts = {id(first): _parts(lm, first) for first in shown}
    tails = {tuple(tail.tolist()): tail for _, tail in parts.values()}
    endings = None
    if len(tails) == 1:
        endings = _endings(lm, next(iter(tails.values())), prompt, list(questions.values()))
    if endings is None:
        asked = zip(drafts, frames, shown, seconds or [None] * len(shown))
        return [lm.prompt(questions[draft], view, first.vision, seconds=s) for draft, view, first, s in asked]
    ending = dict(zip(questions, endings))
    return [
        Prompt(torch.cat([parts[id(first)][0], ending[draft]]), first.vision) for draft, first in zip(drafts, shown)
    ]


def _parts(lm: CaptionModel, shown: Prompt) -> tuple[Tensor, Tensor]:
    """Token ids of a question up to its last visual token, and from there on: the same for all videos."""
    visual = torch.isin(shown.input_ids, visual_tokens(lm)).nonzero()
    last = int(visual[-1]) if len(visual) else len(shown.input_ids)
    return shown.input_ids[:last], shown.input_ids[last:]


def _endings(lm: CaptionModel, tail: Tensor, prompt: str, questions: Sequence[str]) -> list[Tensor] | None:
    """Token ids of `tail` with each of the questions in the place of `prompt`; None where that is not found in it.

    So neither pixels nor placeholders are prepared again for a text that changes behind them.
    """
    before, found, after = lm.tokenizer.decode(tail, skip_special_tokens=False).rpartition(prompt)
    if not found:
        return None
    texts = [f"{before}{question}{after}" for question in (prompt, *questions)]
    same, *endings = (torch.tensor(ids) for ids in lm.tokenizer(texts, add_special_tokens=False).input_ids)
    return endings if torch.equal(same, tail) else None
