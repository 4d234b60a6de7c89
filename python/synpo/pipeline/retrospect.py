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
MARK = "(the question)"


def retrospective_prompt(prompt: str, draft: str) -> str:
    """The question of the second pass about the answer `draft` to `prompt`.

    It begins with `prompt` itself, so that video and question form a common prefix with the first pass.
    """
    return f"{prompt}\n{INSTRUCTION}\nEarlier description: {draft.strip()}"


def without_specials(tokenizer: Any, draft: str) -> str:
    """The draft as plain data: a blank where it would read as a special token of the chat."""
    for special in tokenizer.get_added_vocab():
        draft = draft.replace(special, " ")
    return draft


def second_looks(
    lm: CaptionModel, shown: Sequence[Prompt], frames: Sequence[Tensor], prompt: str, drafts: Sequence[str]
) -> list[Prompt]:
    """The encoded questions of the second pass, one a draft; each shares what the first already knows of its video.

    Args:
        shown: the encoded questions of the first pass, their videos through the vision tower; R of them, experts and then
            amateurs, say.
        frames: what they showed, uint8 (F, 3, H, W) each.
        prompt: the text of the first question.
        drafts: R answers.
    """
    if not shown:
        return []
    questions = {draft: retrospective_prompt(prompt, without_specials(lm.tokenizer, draft)) for draft in drafts}
    heads = {id(first): _up_to_text(lm, first) for first in shown}
    endings = _endings(lm, shown[0], [prompt, *questions.values()])
    if endings is None or not torch.equal(torch.cat([heads[id(shown[0])], endings[0]]), shown[0].input_ids):
        return [lm.prompt(questions[draft], view, first.vision) for draft, view, first in zip(drafts, frames, shown)]
    ending = dict(zip(questions, endings[1:]))
    return [Prompt(torch.cat([heads[id(first)], ending[draft]]), first.vision) for draft, first in zip(drafts, shown)]


def _endings(lm: CaptionModel, shown: Prompt, questions: Sequence[str]) -> list[Tensor] | None:
    """Token ids of each question's chat turn from the last visual token on; None where the template hides that place.

    So neither pixels nor placeholders are prepared again for a text that changes behind them.
    """
    content = [{"type": "video"}, {"type": "text", "text": MARK}]
    turn = [{"role": "user", "content": content}]
    before, mark, after = lm.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False).partition(
        MARK
    )
    visual = shown.input_ids[torch.isin(shown.input_ids, visual_tokens(lm))]
    if not mark or not len(visual):
        return None
    token = lm.tokenizer.convert_ids_to_tokens(int(visual[-1]))
    _, placed, between = before.rpartition(token)
    if not placed:
        return None
    texts = [f"{token}{between}{question}{after}" for question in questions]
    return [torch.tensor(ids) for ids in lm.tokenizer(texts, add_special_tokens=False).input_ids]


def _up_to_text(lm: CaptionModel, shown: Prompt) -> Tensor:
    """Token ids of a question up to its last visual token, which `_endings` begin with."""
    visual = torch.isin(shown.input_ids, visual_tokens(lm)).nonzero()
    return shown.input_ids[: int(visual[-1])] if len(visual) else shown.input_ids
