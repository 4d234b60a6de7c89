"""The self-retrospective pass: the model sees the video again with its own earlier caption and writes a better one.

Self-retrospective sampling is from SynPO (arXiv 2506.00835, section 3); the wording is ours.
"""

from __future__ import annotations

INSTRUCTION = (
    "Write a better description: correct mistakes, add missing details and the order of events, "
    "leave out what is uncertain."
)


def retrospective_prompt(prompt: str, draft: str) -> str:
    """The question of the second pass about the answer `draft` to `prompt`.

    It begins with `prompt` itself, so that video and question form a common prefix with the first pass.
    """
    return f"{prompt}\nEarlier description: {draft.strip()}\n{INSTRUCTION}"
