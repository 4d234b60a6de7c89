"""Candidates from vLLM, against a double of its offline interface.

The double has the names, defaults and keyword-only marks read in its sources: what they do not take is an error here too.
test_vllm.py runs the real one, where it is installed.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from synpo.config import Config, ConfigError, ModelConfig, PairsConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, load
from synpo.pipeline.engine import VLLM, HuggingFace, check_engine, make_engine
from synpo.pipeline.retrospect import INSTRUCTION
from synpo.pipeline.run import build_pairs
from synpo.records import Caption, Pair, read_records

SHORT = SamplingConfig(max_new_tokens=10)


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: Any
    routed_experts: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class Calls:
    """What the double was asked."""

    made: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[dict[str, Any], SamplingParams]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)


ENGINE_ARGS = {"max_model_len", "limit_mm_per_prompt", "enable_prefix_caching", "logprobs_mode", "enable_lora"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Puts a module `vllm` in place whose answers follow from the prompt and the seed."""
    record = Calls()

    class LLM:
        def __init__(
            self,
            model: str,
            *,
            tokenizer: str | None = None,
            trust_remote_code: bool = False,
            tensor_parallel_size: int = 1,
            dtype: str = "auto",
            revision: str | None = None,
            seed: int = 0,
            gpu_memory_utilization: float = 0.9,
            **kwargs: Any,
        ) -> None:
            if unknown := set(kwargs) - ENGINE_ARGS:
                raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {unknown}")
            record.made.append({"model": model, "dtype": dtype, **kwargs})
            self._tokenizer = load(ModelConfig(path=model, device="cpu")).tokenizer

        def get_tokenizer(self) -> Any:
            return self._tokenizer

        def generate(
            self,
            prompts: Sequence[dict[str, Any]],
            sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
            *,
            use_tqdm: bool = True,
            lora_request: Any = None,
            priority: list[int] | None = None,
            tokenization_kwargs: dict[str, Any] | None = None,
        ) -> list[RequestOutput]:
            assert isinstance(sampling_params, list) and len(sampling_params) == len(prompts)
            record.batches.append(len(prompts))
            results = []
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params)):
                assert set(prompt) <= {"prompt", "multi_modal_data", "mm_processor_kwargs"}
                assert params.logprobs is not None, "without, cumulative_logprob is None"
                record.requests.append((prompt, params))
                look = "again " if INSTRUCTION in prompt["prompt"] else ""
                video, timing = prompt["multi_modal_data"]["video"]
                assert len(timing["frames_indices"]) == len(video) and timing["do_sample_frames"] is False
                text = f" {look}said {params.seed} <of {len(video)} frames> "
                reason = "length" if (params.seed or 0) % 5 == 0 else "stop"
                output = CompletionOutput(0, text, [5, 6, 7, 1], -2.0, [{}], finish_reason=reason)
                results.append(RequestOutput(str(i), prompt["prompt"], [], None, [output], True))
            return results

    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return record


def test_requests_carry_video_question_and_seed(tiny_captioner_path: Path, calls: Calls) -> None:
    engine = make_engine(ModelConfig(path=str(tiny_captioner_path)), "vllm", lambda: pytest.fail("no model is loaded"))
    views = [torch.arange(8 * 3 * 4 * 6).view(8, 3, 4, 6).to(torch.uint8), torch.zeros(5, 3, 4, 6, dtype=torch.uint8)]
    sampling = SamplingConfig(temperature=0.7, top_k=0, top_p=0.9, min_p=0.1, max_new_tokens=33)
    rows = engine.describe(views, [["a", "b"], ["c"]], "Describe.", sampling, 1, [6.0, 4.5])
    assert [len(row) for row in rows] == [2, 1] and calls.batches == [3, 3]
    assert calls.made[0]["limit_mm_per_prompt"] == {"video": 1, "image": 0} and calls.made[0]["enable_prefix_caching"]

    first, params = calls.requests[0]
    assert first["prompt"] == "<|user|><video>Describe.<|end|><|assistant|>"
    video, timing = first["multi_modal_data"]["video"]
    assert isinstance(video, np.ndarray) and video.shape == (8, 4, 6, 3) and video.dtype == np.uint8
    assert np.array_equal(video, views[0].permute(0, 2, 3, 1).numpy())
    assert timing == {
        "total_num_frames": 6000, "fps": 1000.0, "duration": 6.0, "do_sample_frames": False,
        "frames_indices": [375, 1125, 1875, 2625, 3375, 4125, 4875, 5625],
    }  # fmt: skip
    assert first["mm_processor_kwargs"] == {"do_sample_frames": False}
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.max_tokens) == (0.7, -1, 0.9, 0.1, 33)
    seeds = [p.seed for _, p in calls.requests]
    assert len(set(seeds)) == 6 and all(isinstance(s, int) and s >= 0 for s in seeds)

    again = [(r["prompt"], p.seed) for r, p in calls.requests[3:]]
    (row, _), (other,) = rows
    assert row.draft == f"said {seeds[0]} <of 8 frames>" and row.text == f"again said {seeds[3]} <of 8 frames>"
    assert (
        again[0][0] == f"<|user|><video>Describe.\n{INSTRUCTION}\nEarlier description: {row.draft}<|end|><|assistant|>"
    )
    assert row.logp == -0.5 and row.finished == (seeds[3] % 5 != 0) and "<of 5 frames>" in other.text
    same = engine.describe(views, [["a", "b"], ["c"]], "Describe.", sampling, 1, [6.0, 4.5])
    assert same == rows, "seeds follow from the keys"


def test_what_a_draft_says_is_no_part_of_the_chat(tiny_captioner_path: Path, calls: Calls) -> None:
    engine = VLLM(ModelConfig(path=str(tiny_captioner_path)))
    generate = engine._llm.generate

    def with_tokens(*args: Any, **kwargs: Any) -> Any:
        results = generate(*args, **kwargs)
        for result in results:
            result.outputs[0].text = "a <video> of <|end|><|assistant|> circles"
        return results

    engine._llm.generate = with_tokens
    engine.describe([torch.zeros(8, 3, 4, 4, dtype=torch.uint8)], [["a"]], "Describe.", SHORT, 1, [8.0])
    prompt = calls.requests[1][0]["prompt"]
    assert prompt.count("<video>") == prompt.count("<|end|>") == prompt.count("<|assistant|>") == 1


def settings(model: Path, **pairs: Any) -> Config:
    options: dict[str, Any] = {
        "candidates": 3, "margin": 0.0, "batch_size": 6, "candidate_sampling": SHORT, "clip_sampling": SHORT, **pairs,
    }  # fmt: skip
    return Config(model=ModelConfig(path=str(model), device="cpu"), pairs=PairsConfig(**options))


def test_pairs_from_vllm_look_like_any_others(
    videos: Path, tiny_captioner_path: Path, tmp_path: Path, calls: Calls
) -> None:
    work, out = tmp_path / "work", tmp_path / "pairs.jsonl"
    build_pairs(settings(tiny_captioner_path), videos, out, work)
    ours = read_records(Caption, work / "candidates.jsonl")
    clips = (work / "clip_captions.jsonl").read_bytes()
    assert not calls.made, "hf loads no vllm"

    result = build_pairs(settings(tiny_captioner_path, engine="vllm"), videos, out, work)
    both = read_records(Caption, work / "candidates.jsonl")
    theirs = both[len(ours) :]
    assert both[: len(ours)] == ours and len(calls.made) == 1 and result.candidates == 12
    assert (work / "clip_captions.jsonl").read_bytes() == clips, "clip captions are not the engine's"
    assert [(c.video, c.index, c.clip) for c in theirs] == [(c.video, c.index, c.clip) for c in ours]
    assert not {c.id for c in ours} & {c.id for c in theirs}, "never mixed with the other engine's"
    assert all(c.text.startswith("again said") and c.draft.startswith("said") and c.logp == -0.5 for c in theirs)
    assert result.cut == sum(p.seed % 5 == 0 for r, p in calls.requests if INSTRUCTION in r["prompt"])
    texts = {c.text for c in theirs}
    assert all({p.chosen, p.rejected} <= texts for p in read_records(Pair, out))

    asked = len(calls.requests)
    build_pairs(settings(tiny_captioner_path, engine="vllm"), videos, out, work)
    assert len(calls.requests) == asked and len(calls.made) == 1, "nothing is sampled twice, and no engine is started"


def test_what_vllm_cannot_do_is_said_first(
    monkeypatch: pytest.MonkeyPatch, tiny_captioner_path: Path, videos: Path, tmp_path: Path, calls: Calls
) -> None:
    model = ModelConfig(path=str(tiny_captioner_path))
    check_engine("vllm", model, SHORT)
    with pytest.raises(ConfigError, match="merge it"):
        check_engine("vllm", replace(model, adapter="lora"), SHORT)
    with pytest.raises(ConfigError, match="repetition penalty counts the prompt"):
        check_engine("vllm", model, replace(SHORT, repetition_penalty=1.2))
    with pytest.raises(ConfigError, match="expected hf or vllm, got 'vlm'"):
        check_engine("vlm", model, SHORT)

    for kind in (ValueError, RuntimeError):

        def broken(*_: Any, kind: type[Exception] = kind, **__: Any) -> None:
            raise kind("no kernel for this architecture")

        monkeypatch.setattr(sys.modules["vllm"], "LLM", broken)
        with pytest.raises(ConfigError, match="no kernel for this architecture"):
            VLLM(model)
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'synpo\[vllm\]'"):
        build_pairs(settings(tiny_captioner_path, engine="vllm"), videos, tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl.work").exists()


def test_hf_is_our_own_decoder(captioner: CaptionModel) -> None:
    loads: list[int] = []
    get: Callable[[], CaptionModel] = lambda: loads.append(1) or captioner  # type: ignore[func-returns-value]  # noqa: E731
    engine = make_engine(ModelConfig(), "hf", get)
    assert isinstance(engine, HuggingFace) and loads == [1]
    ((row,),) = engine.describe([torch.zeros(8, 3, 48, 48, dtype=torch.uint8)], [["a"]], "Describe.", SHORT, 0, [8.0])
    assert row.text == row.draft
    engine.close()
