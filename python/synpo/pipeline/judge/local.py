"""A judge that is a Hugging Face chat model on this machine: the same question, the same reading of the answer."""

from __future__ import annotations

from synpo.config import ConfigError, JudgeConfig, ModelConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, load
from synpo.model.fingerprint import fingerprint
from synpo.pipeline.decode import generate
from synpo.pipeline.judge.base import Verdict
from synpo.pipeline.judge.chat import VERSION, ChatJudge, InvalidAnswer, Messages, read_answer
from synpo.pipeline.retrospect import without_specials
from synpo.records import record_id

TOKENS_A_CANDIDATE = 64
TOKENS_BESIDES = 64


class LocalJudge(ChatJudge):
    """Asks a chat model, greedily. It is loaded at the first question. Raises ConfigError when no model is named."""

    def __init__(self, config: JudgeConfig, seed: int = 0, lm: CaptionModel | None = None) -> None:
        if not config.model:
            raise ConfigError("judge.model: the local judge needs a checkpoint folder or hub id")
        super().__init__(config.orders, seed)
        self.model = ModelConfig(path=config.model)
        self.name = config.model
        self.identity = f"local/{record_id(VERSION, fingerprint(self.model), config.orders, seed)}"
        self._lm = lm

    def ask(self, messages: Messages, attempt: int, count: int) -> list[Verdict]:
        if self._lm is None:
            self._lm = load(self.model)
        text = "\n\n".join(m["content"] for m in messages)
        prompt = self._lm.prompt(without_specials(self._lm.tokenizer, text))  # a caption must not end the turn
        limit = TOKENS_A_CANDIDATE * count + TOKENS_BESIDES
        greedy = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=limit)
        (answer,) = generate(self._lm, [prompt], greedy, keys=[self.identity])
        if not answer.finished:
            raise InvalidAnswer("it was cut off before its end")
        return read_answer(answer.text, count)

    def stop(self) -> None:
        """There is one worker: nothing is asked that nobody waits for."""
