"""A judge that is a Hugging Face chat model on this machine: the same question, the same reading of the answer.

The question is one user message, which every chat template takes. Templates that can (Qwen3's) are told to leave reasoning out;
a model that reasons all the same needs `judge.max_tokens`.
"""

from __future__ import annotations

import os

from synpo.config import ConfigError, JudgeConfig, ModelConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, check_paths, load, not_loaded
from synpo.model.fingerprint import fingerprint
from synpo.model.vision import processor_template
from synpo.pipeline.decode import generate
from synpo.pipeline.judge.base import Verdict
from synpo.pipeline.judge.chat import (
    VERSION,
    ChatJudge,
    GaveUp,
    InvalidAnswer,
    Messages,
    one_message,
    read_answer,
)
from synpo.pipeline.retrospect import without_specials
from synpo.records import record_id

TOKENS_A_CANDIDATE = 64
TOKENS_BESIDES = 64


class LocalJudge(ChatJudge):
    """Asks a chat model, greedily. It is loaded at the first question.

    Raises:
        ConfigError: no model is named, a folder that is named is missing, or (at the first question) it has no chat template.
    """

    def __init__(
        self, config: JudgeConfig, seed: int = 0, device: str = "auto", lm: CaptionModel | None = None
    ) -> None:
        if not config.model:
            raise ConfigError("judge.model: the local judge needs a checkpoint folder or hub id")
        super().__init__(config.orders, seed)
        self.model = ModelConfig(path=config.model, device=device)
        check_paths(self.model)
        self.name = config.model
        self.max_tokens = config.max_tokens
        limit = [] if config.max_tokens is None else [config.max_tokens]
        self.identity = f"local/{record_id(VERSION, fingerprint(self.model), config.orders, seed, *limit)}"
        self._lm = lm

    def check(self) -> None:
        """Read the tokenizer, which must have a chat template, before other models are loaded."""
        if self._lm is None:
            from transformers import AutoTokenizer

            path = os.path.expanduser(self.model.path)
            try:
                template = AutoTokenizer.from_pretrained(path).chat_template or processor_template(path, None)
            except (OSError, ValueError, KeyError) as error:
                raise ConfigError(f"judge.model: {not_loaded(self.model.path, error)}") from error
            self._check_template(template)

    def ask(self, messages: Messages, attempt: int, count: int) -> list[Verdict]:
        lm = self._loaded()
        (message,) = one_message(messages)
        text = without_specials(lm.tokenizer, message["content"])  # a caption must not end the turn
        prompt = lm.prompt(text, enable_thinking=False)
        limit = self.max_tokens or TOKENS_A_CANDIDATE * count + TOKENS_BESIDES
        context = getattr(lm.base.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and len(prompt.input_ids) + limit > context:
            raise GaveUp(
                f"a question of {len(prompt.input_ids)} tokens and an answer of {limit} do not fit the judge's context of "
                f"{context}: lower pairs.candidates or pairs.max_clips, or take a judge with a longer one"
            )
        greedy = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=limit)
        (answer,) = generate(lm, [prompt], greedy, keys=[self.identity])
        if not answer.finished:
            raise InvalidAnswer(f"it was cut off before its end, at {limit} tokens (judge.max_tokens allows more)")
        return read_answer(answer.text, count)

    def _loaded(self) -> CaptionModel:
        if self._lm is None:
            self._lm = load(self.model)
        self._check_template(self._lm.tokenizer.chat_template)
        return self._lm

    def _check_template(self, template: str | None) -> None:
        if not template:
            raise ConfigError(
                f"judge.model: {self.model.path} has no chat template; take a model that was tuned to follow instructions"
            )

    def stop(self) -> None:
        """There is one worker: nothing is asked that nobody waits for."""
