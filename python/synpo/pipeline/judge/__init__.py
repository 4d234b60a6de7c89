"""Judges: who scores candidate captions.

offline.py   counts over the pool; needs no language model
chat.py      what every language model is asked, and how its answer is read
openai.py    any OpenAI-compatible endpoint, through client.py; what it said is kept in cache.py
local.py     a Hugging Face chat model
parallel.py  many questions at once
audit.py     is a judge to be trusted: agreement with others and with itself
"""

from __future__ import annotations

from pathlib import Path

from synpo.config import ConfigError, JudgeConfig, suggest
from synpo.pipeline.judge.base import Failure, Judge, JudgeError, Task, Verdict

KINDS = ("offline", "openai", "local")


def make_judge(config: JudgeConfig, work: Path, seed: int = 0, device: str = "auto") -> Judge:
    """The judge a configuration names. `work` is where it may keep what it has been told; a local one runs on `device`.

    Raises:
        ConfigError: an unknown kind, or a kind without what it needs; says what.
    """
    if config.kind == "offline":
        from synpo.pipeline.judge.offline import OfflineJudge

        return OfflineJudge()
    if config.kind == "openai":
        from synpo.pipeline.judge.openai import OpenAIJudge

        return OpenAIJudge(config, work / "judge_cache.sqlite", seed)
    if config.kind == "local":
        from synpo.pipeline.judge.local import LocalJudge

        return LocalJudge(config, seed, device)
    raise ConfigError(f"judge.kind: unknown judge {config.kind!r}; {suggest(config.kind, KINDS)}")


__all__ = ["KINDS", "Failure", "Judge", "JudgeError", "Task", "Verdict", "make_judge"]
