"""Who samples the candidates: our own decoder over the Hugging Face model, or vLLM.

    engine = make_engine(config.model, config.pairs.engine, hf)
    rows = engine.describe(views, keys, prompt, sampling, refinements)

Both take frames and seeds and give descriptions; records look the same. vLLM batches and schedules as it likes and keeps its own
prefix cache, in which a second look finds the video of the first. It has no second stream, so clip captions, which
are decoded contrastively, stay with our decoder. Its random numbers are its own: the same seeds give other candidates than ours.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from synpo.config import ConfigError, ModelConfig, SamplingConfig
from synpo.model.adapter import CaptionModel
from synpo.model.chat import Chat, conversation, read_template
from synpo.model.vision import processor_template, timing_of
from synpo.pipeline.caption import Description, describe
from synpo.pipeline.retrospect import retrospective_prompt, without_specials

ENGINES = ("hf", "vllm")


class Engine(Protocol):
    """Samples descriptions of videos, plainly."""

    def describe(
        self,
        views: Sequence[Tensor],
        keys: Sequence[Sequence[str]],
        prompt: str,
        sampling: SamplingConfig,
        refinements: int,
        seconds: Sequence[float],
    ) -> list[list[Description]]:
        """For every view, uint8 (F, 3, H, W), one description a key, each after `refinements` second looks.

        seconds: how long the stretch of video is that a view's frames are spread over.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def check_engine(name: str, model: ModelConfig, sampling: SamplingConfig) -> None:
    """Raise ConfigError for an engine that is unknown, not installed, or cannot do what is asked. Loads nothing."""
    if name not in ENGINES:
        raise ConfigError(f"pairs.engine: expected {' or '.join(ENGINES)}, got {name!r}")
    if name == "hf":
        return
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "pairs.engine: vllm is not installed; pip install 'synpo[vllm]' (Linux with a GPU), or use --engine hf"
        )
    if model.adapter:
        raise ConfigError("pairs.engine: vllm takes no model.adapter here; merge it into the model, or use --engine hf")
    if sampling.repetition_penalty != 1:
        raise ConfigError(
            "pairs.engine: vllm's repetition penalty counts the prompt too, ours the answer alone; set "
            "pairs.candidate_sampling.repetition_penalty to 1, or use --engine hf"
        )


def make_engine(model: ModelConfig, name: str, load: Callable[[], CaptionModel]) -> Engine:
    """The engine of that name; `load` gives the Hugging Face model, and is called only where that is the engine."""
    return HuggingFace(load()) if name == "hf" else VLLM(model)


def free_memory() -> None:
    """Give what nobody holds any more back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


class HuggingFace:
    """Our own decoder."""

    def __init__(self, lm: CaptionModel) -> None:
        self.lm = lm

    def describe(
        self,
        views: Sequence[Tensor],
        keys: Sequence[Sequence[str]],
        prompt: str,
        sampling: SamplingConfig,
        refinements: int,
        seconds: Sequence[float],
    ) -> list[list[Description]]:
        return describe(self.lm, views, keys, prompt, sampling, refinements=refinements, seconds=seconds)

    def close(self) -> None:
        pass


class VLLM:
    """vLLM's offline engine on this machine. Written for 0.11 and later; run with 0.32 on a CPU, not on a GPU."""

    def __init__(self, model: ModelConfig) -> None:
        import vllm

        self._sampling: Any = vllm.SamplingParams
        try:
            self._llm: Any = vllm.LLM(
                model=os.path.expanduser(model.path),
                revision=model.revision,
                dtype=model.dtype,
                trust_remote_code=model.trust_remote_code,
                limit_mm_per_prompt={"video": 1, "image": 0},
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",  # of the distribution a token was drawn from, as ours
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last: its worker process ended
            raise ConfigError(f"vllm cannot load {model.path}: {error}. Use --engine hf") from error
        self._tokenizer: Any = self._llm.get_tokenizer()
        path = os.path.expanduser(model.path)
        template = (
            read_template(model.chat_template) if model.chat_template else processor_template(path, model.revision)
        )
        if template is not None:
            self._tokenizer.chat_template = template
        self._chat = Chat(
            self._tokenizer, parts=True, variables=model.template_variables, answer_prefix=model.answer_prefix
        )

    def describe(
        self,
        views: Sequence[Tensor],
        keys: Sequence[Sequence[str]],
        prompt: str,
        sampling: SamplingConfig,
        refinements: int,
        seconds: Sequence[float],
    ) -> list[list[Description]]:
        videos = [  # frames (F, H, W, 3), and when they were taken
            (view.permute(0, 2, 3, 1).contiguous().numpy(), timing_of(len(view), s) | {"do_sample_frames": False})
            for view, s in zip(views, seconds)
        ]
        rows = [i for i, row in enumerate(keys) for _ in row]  # the view of every sample
        seeds = [key for row in keys for key in row]
        shown = [videos[i] for i in rows]
        answers = self._answer(shown, [prompt] * len(rows), sampling, seeds)
        drafts = [a.text for a in answers]
        for number in range(1, refinements + 1):
            asked = [retrospective_prompt(prompt, without_specials(self._tokenizer, a.text)) for a in answers]
            answers = self._answer(shown, asked, sampling, [f"{seed} look {number}" for seed in seeds])
        done = iter(Description(a.text, draft, a.logp, a.finished) for a, draft in zip(answers, drafts))
        return [[next(done) for _ in row] for row in keys]

    def _answer(
        self, videos: Sequence[Any], texts: Sequence[str], sampling: SamplingConfig, keys: Sequence[str]
    ) -> list[Description]:
        """One answer a text; its draft is itself."""
        requests = [
            {
                "prompt": self._chat.prompt(conversation(text), video=True),
                "multi_modal_data": {"video": video},
                "mm_processor_kwargs": {"do_sample_frames": False},  # the frames are sampled already
            }
            for video, text in zip(videos, texts)
        ]
        settings = [
            self._sampling(
                temperature=sampling.temperature,
                top_k=sampling.top_k or -1,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=list(self._chat.ends),
                seed=int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little"),
                logprobs=0,  # of the token drawn alone
            )
            for key in keys
        ]
        answers = []
        for result in self._llm.generate(requests, settings, use_tqdm=False):
            (out,) = result.outputs
            text = self._chat.without_lead(out.text, out.token_ids)
            logp = out.cumulative_logprob / max(1, len(out.token_ids))
            answers.append(Description(text, text, logp, out.finish_reason == "stop"))
        return answers

    def close(self) -> None:
        del self._llm
        free_memory()
