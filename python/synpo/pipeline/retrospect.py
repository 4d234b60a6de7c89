"""The self-retrospective pass: the model sees the video again with its own earlier caption and writes a better one.

Self-retrospective sampling is from SynPO (arXiv 2506.00835, section 3); the wording is ours.
"""

from __future__ import annotations

from torch import Tensor

from synpo.model.adapter import CaptionModel, Prompt

INSTRUCTION = (
    "Write a better description: correct mistakes, add missing details and the order of events, "
    "leave out what is uncertain."
)


def retrospective_prompt(prompt: str, draft: str) -> str:
    """The question of the second pass about the answer `draft` to `prompt`.

    It begins with `prompt` itself, so that video and question form a common prefix with the first pass.
    """
    return f"{prompt}\nEarlier description: {draft.strip()}\n{INSTRUCTION}"


def second_look(lm: CaptionModel, shown: Prompt, frames: Tensor, prompt: str, draft: str) -> Prompt:
    """The encoded question of the second pass; it shares what `shown`, the first question, already knows of the video.

    A draft is data: whatever in it would read as a special token of the chat is taken out.

    Args:
        shown: the encoded prompt of the first pass, its video through the vision tower.
        frames: what it showed, uint8 (F, 3, H, W).
    """
    for special in lm.tokenizer.get_added_vocab():
        draft = draft.replace(special, " ")
    return lm.prompt(retrospective_prompt(prompt, draft), frames, shown.vision)
