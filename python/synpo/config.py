"""Everything a run can be told, as dataclasses: one section a stage, read from YAML, overridden from the command line.

    model:   {path: ./captioner, dtype: auto}
    frames:  {fps: 0.5, minimum: 8, maximum: 16}
    pairs:   {candidates: 10, margin: 4.0}
    train:   {loss_type: synpo, learning_rate: 5.0e-6}

A preset (presets/*.yaml) may lie under the file.
An unknown section or key is an error that names the near ones. Defaults are the paper's (arXiv 2506.00835) unless said.
The `train` section is validated against `synpo.train.trainer.SynPOConfig`, a transformers.TrainingArguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from synpo.video import FrameSampling


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names section, key and what was expected."""


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded. `adapter` is a PEFT folder; `device` auto takes CUDA when there is one.

    `quantization` nf4 or int8 holds the language model's weights in 4 or 8 bits (needs bitsandbytes, extra `qlora`).
    `chat_template`, a file or the Jinja text itself, takes the place of the tokenizer's; `template_variables` are given to it
    (`{enable_thinking: false}`, say); `answer_prefix` stands between its prompt and an answer: given, not trained or generated.
    """

    path: str = ""
    revision: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "auto"
    quantization: str = "none"
    trust_remote_code: bool = False
    chat_template: str | None = None
    template_variables: dict[str, Any] = field(default_factory=dict)
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not re.fullmatch(r"auto|cpu|(cuda|xpu|mps|npu)(:\d+)?", self.device):
            raise ValueError(f"device: expected auto, cpu, cuda or one of several such as cuda:1, got {self.device!r}")


@dataclass(frozen=True)
class LoraSection:
    """LoRA on the language model's projections; the regular expression must not reach the vision tower.

    `lora: null` trains the language model and its head themselves.
    """

    r: int = 128
    alpha: int = 64
    dropout: float = 0.05
    target_modules: str = r".*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 mean no cut-off."""

    temperature: float = 0.9
    top_k: int = 32
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        ):
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class ContrastConfig:
    """Contrastive decoding: mixed = (1 + alpha)·expert − alpha·amateur; plausibility 0 is off, as in the paper's code."""

    alpha: float = 0.5
    plausibility: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha: expected at least 0 (0 is plain sampling), got {self.alpha}")
        if not 0 <= self.plausibility <= 1:
            raise ValueError(f"plausibility: expected from 0 (off) to 1, got {self.plausibility}")


@dataclass(frozen=True)
class PairsConfig:
    """From videos to preference pairs.

    `candidates` samples a video, each refined by `refinements` self-retrospective passes; the best and the worst become a
    pair when their totals differ by `margin` or more. `clip_seconds` and `max_clips` cut a video into clips:
    n = clamp(⌊duration / clip_seconds⌋ + 1, 2, max_clips). `batch_size` answers are written together; all candidates of a
    video always are, so memory is needed for `candidates` of them at least. `engine` samples the candidates: `hf`, our
    decoder over the Hugging Face model, or `vllm` where that is installed (with a `batch_size` of some hundreds).
    """

    prompt: str = "Describe the video in detail."
    candidates: int = 10
    refinements: int = 1
    margin: float = 4.0
    clip_seconds: float = 10.0
    max_clips: int = 16
    batch_size: int = 8
    engine: str = "hf"
    candidate_sampling: SamplingConfig = field(default_factory=SamplingConfig)
    clip_sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.5, top_p=0.9))
    contrast: ContrastConfig = field(default_factory=ContrastConfig)


@dataclass(frozen=True)
class JudgeConfig:
    """Who scores candidates: `offline` (no language model), `openai` (any compatible endpoint) or `local` (a chat model).

    The key of an endpoint is read from the environment variable `key_env` when it is needed; it is never stored.
    A language model sees the candidates in `orders` different orders, and its scores are averaged. `structured` asks the
    endpoint to enforce the JSON schema of an answer, `system_role` false puts all into one user message (some chat templates
    know no other), `temperature` null leaves the endpoint's own, `timeout` is in seconds. `max_tokens` limits an answer with its
    reasoning; null is no limit of ours (openai), or room for the scores alone (local).
    """

    kind: str = "offline"
    model: str = ""
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    requests_per_minute: float = 60.0
    max_requests: int | None = None
    orders: int = 2
    concurrency: int = 8
    structured: bool = True
    system_role: bool = True
    temperature: float | None = 0.0
    max_tokens: int | None = None
    timeout: float = 120.0


@dataclass(frozen=True)
class EvalConfig:
    """Captioning of held-out videos and its scoring."""

    prompt: str = "Describe the video in detail."
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0, top_k=0, top_p=1.0))
    batch_size: int = 8
    bootstrap: int = 1000


@dataclass(frozen=True)
class Config:
    """A whole run. `train` holds keyword arguments of SynPOConfig, checked when the trainer is built."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FrameSampling = field(default_factory=FrameSampling)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lora: LoraSection | None = field(default_factory=LoraSection)
    train: dict[str, Any] = field(default_factory=dict)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:  # what NumPy takes
            raise ValueError(f"seed: expected from 0 to {2**32 - 1}, got {self.seed}")


Section = TypeVar("Section")


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def build(kind: type[Section], values: Any, where: str = "config") -> Section:
    """Build the dataclass `kind` from a mapping, section by section. Raises ConfigError with the dotted name of the key."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(values).__name__} {values!r}")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}; {suggest(str(name), known)}")
    try:
        return kind(**{name: _coerce(hints[name], value, f"{where}.{name}") for name, value in values.items()})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _coerce(annotation: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type; numbers given as text ("5e-6" is text to YAML) are read as numbers."""
    options = (
        typing.get_args(annotation)
        if typing.get_origin(annotation) in (typing.Union, types.UnionType)
        else (annotation,)
    )
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return build(typing.cast(type, option), value, where)
        kind = typing.get_origin(option) or option
        if kind is float and not isinstance(value, bool):
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if math.isnan(number):  # is neither above nor below a bound, so no check would see it
                continue
            return number
        if kind is int and not isinstance(value, bool):
            try:
                if int(value) == float(value):
                    return int(value)
            except (TypeError, ValueError, OverflowError):
                continue
        if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind in (bool, str, dict, list) and isinstance(value, kind):
            return value
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{where}: expected {names}, got {value!r}")


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` laid over `base`, mapping by mapping."""
    merged = dict(base)
    for name, value in extra.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`train.learning_rate=1e-5` as a nested mapping; the value is read as YAML. Raises ConfigError when there is no `=`."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set takes section.key=value, got {text!r}")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {name}: {value!r} is not YAML: {error}") from error
    for part in reversed(name.split(".")):
        parsed = {part: parsed}
    return parsed


PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_text(name: str) -> str:
    """The YAML of a preset; its first line is a comment that says what it is for. Raises ConfigError for an unknown name."""
    if name not in preset_names():
        raise ConfigError(f"--preset: unknown preset {name!r}; {suggest(name, preset_names())}")
    return (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """As YAML 1.2 has it, a key that is there twice is an error; PyYAML would forget the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and names.count(name.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name.value!r} is there twice", name.start_mark)
        return super().construct_mapping(node, deep)


def _read(text: str, where: str) -> dict[str, Any]:
    try:
        loaded = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    if not isinstance(loaded or {}, Mapping):
        raise ConfigError(f"{where}: expected sections, got {type(loaded).__name__}")
    return dict(loaded or {})


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> Config:
    """A preset, a YAML file over it, `--set` overrides over that, then command-line flags; every key is checked.

    Raises:
        ConfigError: the file is missing or not YAML, the preset is unknown, or a key is unknown or of the wrong type.
    """
    values = {} if preset is None else _read(preset_text(preset), f"preset {preset}")
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ConfigError(f"config file {path} does not exist") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"config file {path} cannot be read: {error}") from error
        values = _merge(values, _read(text, f"config file {path}"))
    for override in overrides:
        values = _merge(values, parse_override(override))
    return build(Config, _merge(values, flags or {}))
