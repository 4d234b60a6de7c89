"""The judge on this machine: its question through chat templates, and what it cannot do."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from judge_endpoint import GOOD, TASK
from synpo.config import ConfigError, JudgeConfig, SamplingConfig
from synpo.model.adapter import CaptionModel
from synpo.pipeline.decode import Generation
from synpo.pipeline.judge import Failure, Task, Verdict, make_judge
from synpo.pipeline.judge import local as local_module
from synpo.pipeline.judge.chat import InvalidAnswer, orders_of, question
from synpo.pipeline.judge.local import LocalJudge

JUST_A_FEW = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=4)


def test_local_judge_asks_the_model_the_same_question(
    captioner: CaptionModel, tiny_captioner_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JudgeConfig(kind="local", model=str(tiny_captioner_path))
    judge = LocalJudge(config, lm=captioner)
    asked: list[str] = []
    real = local_module.generate

    def parrot(lm: CaptionModel, prompts: Any, sampling: Any, **options: Any) -> Any:
        asked.append(lm.text(prompts[0].input_ids))
        assert sampling.temperature == 0 and sampling.max_new_tokens == 64 * 3 + 64
        (answer,) = real(lm, prompts, JUST_A_FEW, **options)
        text = answer.text if len(asked) == 1 else GOOD
        return [type(answer)(text, answer.tokens, answer.logp, True)]

    monkeypatch.setattr(local_module, "generate", parrot)
    outcome = judge.score(TASK)
    assert all(isinstance(v, Verdict) for v in outcome) and len(asked) == 3, "one answer of a random model is no answer"
    first = question(TASK, orders_of(TASK, 1, 0)[0])
    assert first[1]["content"] in asked[0] and "cannot be used" in asked[1]


def test_a_caption_cannot_end_the_turn_of_a_local_judge(
    captioner: CaptionModel, tiny_captioner_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specials = list(captioner.tokenizer.get_added_vocab())
    assert len(specials) > 2
    asked: list[list[int]] = []

    def record(lm: CaptionModel, prompts: Any, sampling: Any, **options: Any) -> Any:
        asked.append(prompts[0].input_ids.tolist())
        raise InvalidAnswer("enough")

    monkeypatch.setattr(local_module, "generate", record)
    judge = LocalJudge(JudgeConfig(kind="local", model=str(tiny_captioner_path), orders=1), lm=captioner)
    judge.score(Task("a.mp4", ("clip",), ("x", "y"), (0.0, 0.0)))
    judge.score(Task("b.mp4", ("".join(specials),), ("x" + "".join(specials), "y"), (0.0, 0.0)))
    counts = [sum(i in captioner.tokenizer.get_added_vocab().values() for i in ids) for ids in asked]
    assert len(counts) == 6 and len(set(counts)) == 1, "no more special tokens than a harmless caption has"


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|user|>{{ m.content if m.content is string else m.content[0].text }}<|end|>{% endfor %}<|assistant|>"
)
FAMILIES = {  # how chat templates differ where a judge feels it
    "Gemma, Mistral": STRICT,
    "Qwen3": STRICT
    + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_judge_takes_the_templates_of_many_families(
    captioner: CaptionModel, tiny_captioner_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    asked: list[str] = []

    def parrot(lm: CaptionModel, prompts: Any, sampling: Any, **options: Any) -> Any:
        asked.append(lm.text(prompts[0].input_ids))
        assert sampling.max_new_tokens == 700
        return [Generation(GOOD if len(asked) > 1 else "what?", (), 0.0, True)]

    monkeypatch.setattr(local_module, "generate", parrot)
    monkeypatch.setattr(captioner.tokenizer, "chat_template", FAMILIES[family])
    judge = LocalJudge(
        JudgeConfig(kind="local", model=str(tiny_captioner_path), orders=1, max_tokens=700), lm=captioner
    )
    assert all(isinstance(v, Verdict) for v in judge.score(TASK)) and len(asked) == 2
    assert asked[0].endswith("</think>") == (family == "Qwen3"), "it is told to leave reasoning out"


def test_what_a_local_judge_cannot_do_is_said(
    captioner: CaptionModel, tiny_captioner_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JudgeConfig(kind="local", model=str(tiny_captioner_path), orders=1)
    judge = LocalJudge(config, lm=captioner)
    (first, *_) = judge.score(Task("a.mp4", ("a very long caption " * 1000,), ("x", "y"), (0.0, 0.0)))
    assert isinstance(first, Failure) and re.match(
        r"a question of \d+ tokens and an answer of 192 do not fit the judge's context of 4096: lower pairs\.cand",
        first.reason,
    )
    monkeypatch.setattr(captioner.tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match=r"judge\.model: .* has no chat template"):
        judge.score(TASK)
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        LocalJudge(dataclasses.replace(config, model="./nowhere"))


def test_a_model_without_a_chat_template_is_known_before_it_is_loaded(
    tiny_captioner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "load", None)
    config = JudgeConfig(kind="local", model=str(tiny_captioner_path))
    LocalJudge(config).check()
    shutil.copytree(tiny_captioner_path, tmp_path / "model", ignore=shutil.ignore_patterns("*.jinja", "*.safetensors"))
    with pytest.raises(ConfigError, match=r"judge\.model: .* has no chat template"):
        LocalJudge(dataclasses.replace(config, model=str(tmp_path / "model"))).check()
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"judge\.model: .* cannot be loaded"):
        LocalJudge(dataclasses.replace(config, model=str(tmp_path / "model"))).check()


def test_a_random_local_judge_fails_and_says_so(captioner: CaptionModel, tiny_captioner_path: Path) -> None:
    judge = LocalJudge(JudgeConfig(kind="local", model=str(tiny_captioner_path)), lm=captioner)
    outcome = judge.score(Task("a.mp4", ("clip",), ("x", "y"), (0.0, 0.0)))
    said = "it was cut off before its end, at 192 tokens (judge.max_tokens allows more)"
    assert outcome == [Failure(f"no valid answer in 3 attempts; the last: {said}")] * 2


def test_a_local_judge_runs_on_the_device_of_the_captioner(
    captioner: CaptionModel, tiny_captioner_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(local_module, "load", lambda model: loaded.append(model.device) or captioner)  # type: ignore[func-returns-value]
    config = JudgeConfig(kind="local", model=str(tiny_captioner_path), orders=1)
    judges = [make_judge(config, tmp_path, 0, device) for device in ("cuda:1", "cpu")]
    for judge in judges:
        judge.score(TASK)
    assert loaded == ["cuda:1", "cpu"]
    assert judges[0].identity == judges[1].identity, "where it runs is no part of what it is"
