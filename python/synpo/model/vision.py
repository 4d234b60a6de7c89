"""From video frames to what a model reads: pixels for the vision tower, placeholder tokens, and visual features.

One class a way of doing it; `vision_for(model)` picks, and says why when it cannot:

    OneVision   LLaVA-OneVision, in plain torch (its Hugging Face video processor needs torchvision, which CPU builds lack)
    Processor   any other video model, through its own AutoProcessor (needs torchvision)
    None        a text model

Shape legend: F frames, S input side in pixels, n visual tokens of one video, D hidden size, L row length, B rows.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Vision = Mapping[str, Tensor]
"""The visual part of one prompt; empty for text alone."""

MODALITIES = {"pixel_values_videos": "video", "pixel_values": "image"}
"""What a model calls the pixels of a video; InternVL and SmolVLM read one as images."""

TOWER = ("features", "deepstack")
"""What the vision tower makes of pixels, and its deeper layers that Qwen3-VL adds inside the language model."""

FRAMES_OF_A_ROW = {"pixel_values": 5, "pixel_attention_mask": 4}
"""Dimensions of what SmolVLM stacks by row, (1, frames, …): here all frames are one row's, videos after one another."""

VIDEO_TOKEN_HINT = "the chat template must place exactly one video placeholder for a message that shows a video"


class FramesRefused(ValueError):
    """Frames that a model's processor does not take, too small or too few ones say."""


class OneVision:
    """LLaVA-OneVision: square frames → SigLIP → projector → 2×2 pooling → n = F·⌈S/2p⌉² + 1 tokens (the last a newline).

    A prompt's vision is {"pixels": (F, 3, S, S)} until `encode` turns it into {"features": (n, D)}, which any number of
    rows may share: the tower runs once a video.
    """

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        config = model.config
        self.core = model.model
        self.tokenizer = tokenizer
        self.token_id: int = config.video_token_id
        self.token: str = tokenizer.convert_ids_to_tokens(self.token_id)
        self.side: int = config.vision_config.image_size
        self.per_frame = math.ceil(self.side // config.vision_config.patch_size / 2) ** 2
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.std = torch.tensor(std).view(1, 3, 1, 1)

    takes_features = True

    @property
    def settings(self) -> dict[str, Any]:
        """How frames become pixels."""
        return {"side": self.side, "mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}

    def prepare(
        self, text: str, frames: Tensor, vision: Vision | None = None, seconds: float | None = None
    ) -> tuple[Tensor, Vision]:
        """Token ids (P,) of `text` with its placeholder expanded, and normalised pixels of uint8 frames (F, 3, H, W).

        Where the frames' `vision` is known already, it is passed on as it is. This model is not told the time.
        """
        if text.count(self.token) != 1:
            raise ValueError(f"found {text.count(self.token)} {self.token} in the prompt; {VIDEO_TOKEN_HINT}")
        text = text.replace(self.token, self.token * (len(frames) * self.per_frame + 1))
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if vision is not None:
            return ids, vision
        pixels = frames.float()
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).clamp_(0, 255)
        return ids, {"pixels": (pixels / 255 - self.mean) / self.std}

    def encode(self, visions: Sequence[Vision]) -> list[Vision]:
        """Run the tower once over all videos that still are pixels, equal frame counts together."""
        done = list(visions)
        lengths = {len(v["pixels"]) for v in visions if "pixels" in v}
        weight = next(self.core.vision_tower.parameters())
        for length in sorted(lengths):
            rows = [i for i, v in enumerate(visions) if "pixels" in v and len(v["pixels"]) == length]
            pixels = torch.stack([visions[i]["pixels"] for i in rows]).to(weight.device, weight.dtype)
            features = self.core.get_video_features(pixels, return_dict=True).pooler_output
            if features.shape[1] == length * self.per_frame:  # older releases add the newline later on
                newline = self.core.image_newline.to(features).expand(len(rows), 1, -1)
                features = torch.cat([features, newline], dim=1)  # (rows, n, D)
            for i, feature in zip(rows, features):
                done[i] = {"features": feature}
        return done

    def inputs(self, input_ids: Tensor, visions: Sequence[Vision]) -> dict[str, Tensor]:
        """Embeddings (B, L, D) of token ids (B, L) with every video's features in its placeholders' places."""
        embeds = self.core.get_input_embeddings()(input_ids)
        features = [v["features"] for v in self.encode(visions) if v]
        if not features:
            return {"inputs_embeds": embeds}
        places = input_ids == self.token_id
        flat = torch.cat(features).to(embeds.dtype)
        if int(places.sum()) != len(flat):
            raise ValueError(
                f"{int(places.sum())} video placeholders in the batch but {len(flat)} visual features; "
                "a prompt was cut, or frames and text do not belong together"
            )
        return {"inputs_embeds": embeds.masked_scatter(places[..., None], flat)}

    def positions(self, input_ids: Tensor, mask: Tensor, visions: Sequence[Vision]) -> Tensor:
        return sequential_positions(mask)


class Processor:
    """Any other video model, through its Hugging Face processor.

    Where the model takes features, the tower runs once a video (`encode`); else pixels travel with every forward pass.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.core = model.model
        self.processor = processor
        # InternVL and SmolVLM read a video as images
        self.modality = "video" if hasattr(self.core, "get_video_features") else "image"

    def prepare(
        self, text: str, frames: Tensor, vision: Vision | None = None, seconds: float | None = None
    ) -> tuple[Tensor, Vision]:
        """As `OneVision.prepare`; `seconds`: what the frames are spread over. Qwen2.5-VL's positions, and what others write
        between the frames, follow from it. Raises FramesRefused where the processor does."""
        timing = {} if seconds is None else {"video_metadata": [[timing_of(len(frames), seconds)]]}
        try:
            batch = self.processor(
                text=[text],
                videos=[[frames]],
                return_tensors="pt",
                do_sample_frames=False,
                add_special_tokens=False,
                **timing,
            )
        except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            count, _, height, width = frames.shape
            raise FramesRefused(
                f"{type(self.processor).__name__} refuses {count} frames of {width}×{height}: {error}"
            ) from error
        rows = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        ids = rows.pop("input_ids")[0]
        rows.pop("attention_mask", None)
        rows.pop("mm_token_type_ids", None)  # follows from the ids, row by row
        return ids, rows if vision is None else vision

    @property
    def settings(self) -> dict[str, Any]:
        """How frames become pixels."""
        return self.processor.to_dict()

    @property
    def takes_features(self) -> bool:
        """Whether this model's forward accepts visual features in place of pixels; releases before 5.18 or so do not."""
        return "mm_encoder_outputs" in inspect.signature(self.core.forward).parameters

    def encode(self, visions: Sequence[Vision]) -> list[Vision]:
        """Run the tower over every video that still is pixels, if the model takes features.

        Pixels become "features", (n, D), or (images, n, D) where the model wants one tensor of them, and for Qwen3-VL
        "deepstack" (layers, n, D) as well; grids stay.
        """
        if not self.takes_features:
            return list(visions)
        return [self._encode(vision) if MODALITIES.keys() & vision.keys() else vision for vision in visions]

    def _encode(self, vision: Vision) -> Vision:
        key = next(k for k in MODALITIES if k in vision)
        function = getattr(self.core, f"get_{MODALITIES[key]}_features")
        accepted = inspect.signature(function).parameters
        given = {k: v.to(self.core.device) for k, v in vision.items() if k in accepted}
        output = function(**given, return_dict=True)
        pooled = output.pooler_output
        features = {"features": pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))}
        if getattr(output, "deepstack_features", None) is not None:
            layers = [x if isinstance(x, Tensor) else torch.cat(list(x)) for x in output.deepstack_features]
            features["deepstack"] = torch.stack(layers)
        return {**{k: v for k, v in vision.items() if "pixel" not in k}, **features}

    def _stack(self, visions: Sequence[Vision]) -> dict[str, Any]:
        """Pixels, grids and features of all videos, in the order of their placeholders, as the model's forward takes them."""
        found: dict[str, list[Tensor]] = {}
        for vision in visions:
            for key, value in vision.items():
                found.setdefault(key, []).append(value)
        stacked: dict[str, Any] = {
            k: torch.cat(v, dim=int(v[0].dim() == FRAMES_OF_A_ROW.get(k)))
            for k, v in sorted(found.items())
            if k not in TOWER
        }
        if features := found.get("features"):
            joined = torch.cat(features)
            deepstack = [[layer] for layer in torch.cat(found["deepstack"], dim=1)] if "deepstack" in found else None
            output = SimpleNamespace(
                pooler_output=[joined] if joined.dim() == 2 else joined, deepstack_features=deepstack
            )
            stacked["mm_encoder_outputs"] = {self.modality: output}
        return stacked

    def _types(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Qwen-VL marks the modality of every token: 0 text, 2 video."""
        if "mm_token_type_ids" not in self.processor.model_input_names:
            return {}
        return {"mm_token_type_ids": 2 * (input_ids == self.core.config.video_token_id).int()}

    def inputs(self, input_ids: Tensor, visions: Sequence[Vision]) -> dict[str, Any]:
        seen = self._stack([{k: v.to(input_ids.device) for k, v in vision.items()} for vision in visions])
        return {"input_ids": input_ids, **self._types(input_ids), **seen}

    def positions(self, input_ids: Tensor, mask: Tensor, visions: Sequence[Vision]) -> Tensor:
        """Qwen-VL numbers its visual tokens in three dimensions: (3, B, L). Everyone else counts: (B, L)."""
        if not hasattr(self.core, "get_rope_index"):
            return sequential_positions(mask)
        grids = {k: v for k, v in self._stack(visions).items() if "grid" in k}
        return self.core.get_rope_index(input_ids, attention_mask=mask, **self._types(input_ids), **grids)[0]


def timing_of(frames: int, seconds: float) -> dict[str, Any]:
    """What processors and vLLM ask of a video of which they see `frames` frames, the middles of equal parts of `seconds`.

    It is told in milliseconds, as a video of a thousand frames a second.
    """
    places = [round((i + 0.5) * seconds * 1000 / frames) for i in range(frames)]
    total = max(round(seconds * 1000), places[-1] + 1)
    return {"total_num_frames": total, "fps": 1000.0, "duration": seconds, "frames_indices": places}


def sequential_positions(mask: Tensor) -> Tensor:
    """Positions (B, L) that count the tokens a mask (B, L) keeps: padding on either side does not shift them."""
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)


PREPROCESSING = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
"""Files of a checkpoint that say how frames become pixels."""


def processor_template(path: str, revision: str | None) -> str | None:
    """The chat template that a checkpoint has for its processor alone, in files of releases before `chat_template.jinja`."""
    from transformers.utils import cached_file

    for name in ("chat_template.json", "processor_config.json"):
        file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            found = json.loads(Path(file).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                return found
    return None


def copy_preprocessing(path: str, revision: str | None, folder: Path) -> None:
    """Copy what a checkpoint says of preprocessing into another checkpoint's folder."""
    from transformers.utils import cached_file

    for name in (*PREPROCESSING, "chat_template.json"):
        file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, folder / name)


def _normalisation(path: str, revision: str | None) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation a checkpoint's preprocessing states (SigLIP's 0.5 where it states none)."""
    from transformers.utils import cached_file

    for name in PREPROCESSING:
        file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        with open(file, encoding="utf-8") as stream:
            text = stream.read()
        if re.search(r'"image_mean"', text):
            found = json.loads(text)
            section = next(
                (s for s in (found, *(v for v in found.values() if isinstance(v, dict))) if "image_mean" in s), found
            )
            return section["image_mean"], section["image_std"]
    return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def vision_of(model: Any, processor: Any) -> OneVision | Processor | None:
    """How `model` takes video through a processor at hand; None if it takes none."""
    if getattr(model.config, "vision_config", None) is None:
        return None
    if model.config.model_type == "llava_onevision":
        pixels = getattr(processor, "video_processor", None) or processor.image_processor
        return OneVision(model, processor.tokenizer, pixels.image_mean, pixels.image_std)
    return Processor(model, processor)


def vision_for(
    model: Any, tokenizer: Any, path: str, revision: str | None = None, trust_remote_code: bool = False
) -> OneVision | Processor | None:
    """How `model` takes video; None if it takes none. Raises ValueError when its processor cannot be loaded."""
    config = model.config
    if getattr(config, "vision_config", None) is None:
        return None
    if config.model_type == "llava_onevision":
        return OneVision(model, tokenizer, *_normalisation(path, revision))
    from transformers import AutoProcessor

    try:
        return Processor(
            model, AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        )
    except ImportError as error:
        raise ValueError(
            f"the video processor of a {config.model_type} model cannot be loaded: {error}. Install torchvision for your "
            "torch build, or use a LLaVA-OneVision model, which needs none"
        ) from error
