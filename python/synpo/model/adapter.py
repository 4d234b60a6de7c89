"""One face for every model the system drives: prompts in, hidden states and an output head out.

    lm = load(ModelConfig(path="./captioner"))
    prompt = lm.prompt("Describe the video.", frames)            # frames uint8 (F, 3, H, W), or None
    vision = lm.encode_vision([prompt.vision])                   # the tower runs once a video
    ids, mask = pad_rows([prompt.input_ids], lm.pad_token_id, side="left")
    out = lm.model(**lm.forward_kwargs(ids, mask, vision))

Decoding (pipeline/decode.py) and training (train/objective.py) both stand on these methods; neither knows a model's family.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from synpo.config import ConfigError, ModelConfig
from synpo.model import quantize
from synpo.model.chat import Chat, Message, conversation, read_template
from synpo.model.gather import gathering
from synpo.model.peft_kinds import load_adapter
from synpo.model.vision import OneVision, Processor, Vision, processor_template, sequential_positions, vision_for
from synpo_kernels import Head, hidden_states_and_head
from synpo_kernels.model import base_of, check_logits, head_of
from synpo_kernels.ops.parallel import gathered

PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index", "video_token_index")
"""What configurations call the tokens that stand for what a model sees or hears."""


@dataclass(frozen=True)
class Prompt:
    """One encoded prompt, no batch axis: token ids (P,) int64 with visual placeholders expanded, and its visual part."""

    input_ids: Tensor
    vision: Vision


def pad_rows(rows: Sequence[Tensor], pad: int, side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Rows of ids (L_i,) as one batch: ids (B, L) filled with `pad`, and a mask (B, L) int64 that is 1 on the tokens."""
    length = max(len(r) for r in rows)
    ids = rows[0].new_full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=ids.device)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return ids, mask


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class CaptionModel:
    """A causal language model that may see videos.

    Attributes:
        model: the Hugging Face model (wrapped by PEFT or not).
        tokenizer: its tokenizer, with a chat template.
        vision: how it takes video, or None.
        chat: what a conversation reads like to it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        vision: OneVision | Processor | None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        answer_prefix: str = "",
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.vision = vision
        stops = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.chat = Chat(
            tokenizer,
            [] if stops is None else torch.as_tensor(stops, device="cpu").reshape(-1).tolist(),
            parts=vision is not None,
            variables=template_variables,
            answer_prefix=answer_prefix,
        )

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer; the first is the one that the chat template closes a turn with."""
        return self.chat.ends

    @cached_property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.eos_token_ids[0]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def sees_video(self) -> bool:
        return self.vision is not None

    @property
    def placeholder_ids(self) -> frozenset[int]:
        """Ids of the tokens that the model replaces by what it sees; none in a text model."""
        found = (getattr(self.base.config, name, None) for name in PLACEHOLDERS)
        return frozenset(place for place in found if isinstance(place, int))

    def prompt(
        self,
        text: str | Sequence[Message],
        frames: Tensor | None = None,
        vision: Vision | None = None,
        *,
        seconds: float | None = None,
        **template: Any,
    ) -> Prompt:
        """Encode a question through the chat template, up to where the answer begins.

        Args:
            text: one user turn, or a conversation that ends with one.
            frames: uint8 (F, 3, H, W), evenly spaced; the first user turn shows them.
            vision: of an earlier prompt about the same frames: the new one shares it, and pixels are not prepared again.
            seconds: how long the stretch of video is that the frames are spread over. Models that are told the time (Qwen-VL
                from 2.5 on, SmolVLM) need it; None leaves them to their own assumption, 24 frames a second.
            template: variables of the chat template, `enable_thinking` say; one that it does not know is ignored.

        Raises:
            ValueError: frames are given and the model cannot see, or the chat template refuses the conversation.
        """
        if frames is not None and self.vision is None:
            raise ValueError(f"{type(self.model).__name__} takes no video; use a video model or pairs without videos")
        rendered = self.chat.prompt(conversation(text), frames is not None, **template)
        if frames is not None and self.vision is not None:
            return Prompt(*self.vision.prepare(rendered, frames, vision, seconds))
        return Prompt(self.tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids[0].long(), {})

    def completion(self, text: str, prompt: str | Sequence[Message] = "Say.") -> Tensor:
        """Token ids (T,) of an answer to `prompt` as the chat template writes it, up to and with the token that ends the turn.

        Raises ValueError for an answer that is empty, holds the end of a turn, or is not written as it stands.
        """
        return torch.tensor(self.chat.answer(conversation(prompt), text))

    def text(self, ids: Tensor | Sequence[int]) -> str:
        """The words of an answer's ids, without special tokens and without what the template puts around them."""
        return self.chat.text(ids)

    def encode_vision(self, visions: Sequence[Vision]) -> list[Vision]:
        """Run the vision tower, without gradients, over every video that has not been through it."""
        if self.vision is None:
            return list(visions)
        with torch.no_grad(), gathered(*self.vision.core.parameters(recurse=False)):
            return self._in_forward(self.vision.encode, visions)

    @property
    def vision_frozen(self) -> bool:
        """Whether nothing but the language model and its head is trained."""
        return not any(p.requires_grad for _, p in self.vision_parameters())

    def vision_parameters(self) -> list[tuple[str, Tensor]]:
        """Parameters, by name, of all that is not the language model or its head."""
        parts = (self.base.get_decoder(), self.base.get_output_embeddings())
        language = {id(p) for part in parts for p in part.parameters()}
        return [(name, p) for name, p in self.base.named_parameters() if id(p) not in language]

    def forward_kwargs(self, input_ids: Tensor, attention_mask: Tensor, visions: Sequence[Vision]) -> dict[str, Any]:
        """Keyword arguments of the model's top-level forward for ids (B, L), mask (B, L) and one visual part a row.

        Includes explicit `position_ids`, so that padding on either side changes nothing: (B, L), or (3, B, L) for mrope.
        """
        return {
            **self.inputs(input_ids, visions),
            "attention_mask": attention_mask,
            "position_ids": self.positions(input_ids, attention_mask, visions),
        }

    def inputs(self, input_ids: Tensor, visions: Sequence[Vision]) -> dict[str, Any]:
        """The part of `forward_kwargs` that says what is read: ids (B, L) and what is seen, in the order of placeholders."""
        if self.vision is None:
            return {"input_ids": input_ids}
        return self._in_forward(self.vision.inputs, input_ids, visions)

    def positions(self, input_ids: Tensor, attention_mask: Tensor, visions: Sequence[Vision]) -> Tensor:
        """Positions (B, L), or (3, B, L) for mrope, of the tokens a mask (B, L) keeps."""
        if self.vision is None:
            return sequential_positions(attention_mask)
        return self.vision.positions(input_ids, attention_mask, visions)

    def _in_forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(*arguments), which runs parts of the model before its forward does.

        FSDP2 must see that as a forward pass of the whole model: it gathers what belongs to no layer, and knows its root.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

            model = self.model
            if issubclass(type(model), FSDPModule):
                if "in_forward" not in vars(model):
                    model.in_forward = lambda function, *arguments: function(*arguments)
                    register_fsdp_forward_method(model, "in_forward")
                return model.in_forward(function, *arguments)
        return function(*arguments)

    @property
    def base(self) -> Any:
        """The Hugging Face model under any PEFT wrapper."""
        return base_of(self.model)

    def head(self) -> Head:
        """The output head as it is now (PEFT's trained copy, or the original one while adapters are disabled).

        Raises ValueError where the fused loss does not support it, as `synpo_kernels.model.head_of`.
        """
        return head_of(self.model, self._look)

    def hidden_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """Hidden states (B, L, D) that enter the output head, without the logits; `inputs` is what `forward_kwargs` made."""
        return hidden_states_and_head(self.model, **inputs)[0]

    def _look(self) -> None:
        """Run the model on a few words, so that it is known what it does to its logits, and see whether they are then ours."""
        shown = self.placeholder_ids
        plain = [token for token in range(8 + len(shown)) if token not in shown]
        ids = torch.tensor([plain[:4], plain[4:8]], device=self.device)
        inputs = self.forward_kwargs(ids, torch.ones_like(ids), [{}, {}])
        with torch.no_grad(), evaluating(self.model), gathering(self.model):
            hidden, head = hidden_states_and_head(self.model, **inputs)
            logits = self.model(**inputs, use_cache=False).logits
            with gathered(head.weight, head.bias):
                what = f"the logits of {type(self.base).__name__} are not those of its output head"
                check_logits(logits, head.logits(hidden), what)


def device_of(name: str) -> torch.device:
    """The device that `model.device` names. Raises ConfigError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"model.device: {name} is not there, torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices "
            "(`synpo doctor` says more); give --device another"
        )
    return device


HALVES = (torch.float16, torch.bfloat16)  # what flash-attn computes in


def _choose_attention(model: Any, name: str, device: torch.device) -> None:
    """What `auto` means: flash-attn where it is installed, the device is CUDA and it can serve the model, else torch's kernels.

    Raises ConfigError where flash-attn was asked for and cannot compute in the dtype of the weights.
    """
    from transformers.utils import is_flash_attn_2_available

    if name.startswith("flash_attention") and model.dtype not in HALVES:
        raise ConfigError(
            f"model.attention: {name} computes in float16 and bfloat16, the weights are {str(model.dtype).split('.')[1]}; "
            "set model.dtype = bfloat16, or model.attention = sdpa"
        )
    if name == "auto" and device.type == "cuda" and model.dtype in HALVES and is_flash_attn_2_available():
        with suppress(ValueError, ImportError):  # a model that flash-attn does not know
            model.set_attn_implementation("flash_attention_2")


def check_paths(config: ModelConfig) -> None:
    """Raise ConfigError when no model is named, or a folder that is named is missing or something else. Loads nothing."""
    if not config.path:
        raise ConfigError("no model: give --model a checkpoint folder or hub id (model.path in the config)")
    folder = Path(config.path).expanduser()
    if config.path.startswith((".", "/", "~")) and not folder.is_dir():
        raise ConfigError(f"model folder {config.path} {'is a file' if folder.exists() else 'does not exist'}")
    if folder.is_dir() and ((folder / "train_log.jsonl").exists() or not (folder / "config.json").is_file()):
        raise ConfigError(_what_else(folder))
    if (
        config.chat_template
        and "{" not in config.chat_template
        and not Path(config.chat_template).expanduser().is_file()
    ):
        raise ConfigError(
            f"model.chat_template: {config.chat_template} is neither a file nor a Jinja template (there is no brace in it)"
        )
    if config.adapter and not Path(config.adapter).is_dir():
        raise ConfigError(f"adapter folder {config.adapter} does not exist")
    if config.adapter and not (Path(config.adapter) / "adapter_config.json").is_file():
        raise ConfigError(
            f"{config.adapter} holds no adapter_config.json; --adapter takes the `adapter` folder in what training wrote"
        )


def not_loaded(path: str, error: Exception) -> str:
    """Why no model, or tokenizer, came of a path or hub id, in a line."""
    nowhere = "" if os.path.isdir(os.path.expanduser(path)) else "there is no such folder, and from the hub: "
    return f"model {path} cannot be loaded: {nowhere}{' '.join(str(error).split())}"


def _what_else(folder: Path) -> str:
    """What a folder is that was named as a model and holds none, in words that say what to write."""
    if (folder / "adapter_config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = None
        return f"{folder} is an adapter: write --model {base or 'THE_MODEL_IT_WAS_TRAINED_ON'} --adapter {folder}"
    for name, how in (("model", f"--model {folder / 'model'}"), ("adapter", f"--adapter {folder / 'adapter'}")):
        if (folder / name).is_dir():
            return f"{folder} is no model; what was trained lies in it: write {how}"
    return f"model folder {folder} holds no model; --model takes a checkpoint folder, with its config.json, or a hub id"


def tokenizer_of(config: ModelConfig, described: Any) -> Any:
    """The tokenizer of a checkpoint with its chat template: the one that the configuration sets, a video model's processor has
    (its tokenizer often has that of its language model, which knows no video), or its own. Raises OSError or ValueError.

    described: the checkpoint's Hugging Face configuration.
    """
    from transformers import AutoTokenizer

    path = os.path.expanduser(config.path)
    tokenizer: Any = AutoTokenizer.from_pretrained(
        path, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    template = None
    if config.chat_template is not None:
        template = read_template(config.chat_template)
    elif getattr(described, "vision_config", None) is not None:
        template = processor_template(path, config.revision)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def wrap(config: ModelConfig, model: Any, tokenizer: Any, vision: OneVision | Processor | None) -> CaptionModel:
    """A CaptionModel with what the configuration says about its chat template."""
    return CaptionModel(
        model,
        tokenizer,
        vision,
        template_variables=config.template_variables,
        answer_prefix=config.answer_prefix,
    )


def load(config: ModelConfig) -> CaptionModel:
    """Load a checkpoint folder or hub id for captioning or training.

    Raises:
        ConfigError: no model is named, the folder is missing, its files cannot be read, it cannot be quantized, or its adapter
            cannot be used; says which.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    check_paths(config)
    path = os.path.expanduser(config.path)
    shared: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    device = device_of(config.device)
    quantized = quantize.loading(config, device)
    try:
        settings = AutoConfig.from_pretrained(path, **shared)
        kind = AutoModelForImageTextToText if getattr(settings, "vision_config", None) else AutoModelForCausalLM
        model: Any = kind.from_pretrained(
            path,
            dtype=config.dtype,
            attn_implementation="sdpa" if config.attention == "auto" else config.attention,
            use_safetensors=True,
            **quantized,
            **shared,
        )
        tokenizer = tokenizer_of(config, settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(not_loaded(config.path, error)) from error
    quantize.check(model)
    _choose_attention(model, config.attention, device)
    vision = vision_for(model, tokenizer, path, config.revision, config.trust_remote_code)
    if config.adapter:
        model = load_adapter(model, config.adapter)
    if not quantized:  # else it is on its device already, and 8-bit weights refuse to move
        model = model.to(device)
    return wrap(config, model.eval(), tokenizer, vision)
