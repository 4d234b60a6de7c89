"""Everything a run can be told, as dataclasses: one section a stage, read from YAML, overridden from the command line.

    model:   {path: ./captioner, dtype: auto}
    frames:  {fps: 0.5, minimum: 8, maximum: 16}
    pairs:   {candidates: 10, margin: 4.0}
    train:   {loss_type: synpo, learning_rate: 5.0e-6}

A preset (presets/*.yaml) may lie under the file.
An unknown section or key is an error that names the near ones. Defaults are the paper's (arXiv 2506.00835) unless said.
The `train` section is checked by `synpo.train.arguments.checked` against SynPOConfig, a transformers.TrainingArguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
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

from synpo.nicknames import NICKNAMES
from synpo.setting import Range, above, at_least, check, one_of, setting
from synpo.text import cleaned
from synpo.video import FrameSampling


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names section, key and what was expected."""


DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DEFAULT_LOSS = "synpo"
WORDS = Range(lambda text: bool(text.strip()), "some words")
LOSS_PARAMETERS = ("alpha", "beta", "gamma", "weight")
"""Keys of the section `train` that are parameters of an objective (`train.loss_type`), and mean nothing to another."""


class Section:
    """Dataclasses of settings: a value that is out of its range is a ValueError that names it."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ModelConfig(Section):
    """Which model, and how it is loaded."""

    path: str = setting("", "checkpoint folder or hub id (--model)")
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    adapter: str | None = setting(None, "folder of a PEFT adapter to put on the model (--adapter)")
    dtype: str = setting("auto", f"{', '.join(DTYPES)}; auto is what the checkpoint says", one_of(*DTYPES))
    device: str = setting(
        "auto",
        "cpu, cuda, cuda:1 …; auto takes CUDA where there is one (--device)",
        Range(
            lambda name: bool(re.fullmatch(r"auto|cpu|(cuda|xpu|mps|npu)(:\d+)?", name)),
            "auto, cpu, cuda or one of several such as cuda:1",
        ),
    )
    attention: str = setting("auto", "auto, sdpa, eager, flash_attention_2 …; auto takes flash-attn where it can serve")
    quantization: str = setting(
        "none", "none; nf4 (QLoRA, CUDA) or int8: weights of the language model in 4 or 8 bits (extra qlora)"
    )
    trust_remote_code: bool = setting(False, "run Python code that comes with the checkpoint: only from who you trust")
    chat_template: str | None = setting(None, "a file, or Jinja text, in place of the tokenizer's chat template")
    template_variables: dict[str, Any] = setting(dict, "given to the chat template, e.g. {enable_thinking: false}")
    answer_prefix: str = setting("", "stands between prompt and answer: given, neither trained nor generated")


@dataclass(frozen=True)
class LoraSection(Section):
    """LoRA on the language model; `lora: null` trains the language model and its head themselves."""

    r: int = setting(128, "rank", at_least(1))
    alpha: int = setting(64, "what LoRA adds is scaled by alpha / r", at_least(1))
    dropout: float = setting(0.05, "dropout before LoRA", Range(lambda v: 0 <= v < 1, "from 0 (off) to less than 1"))
    target_modules: str = setting(
        r".*\.(q|k|v|o|gate|up|down)_proj",
        "regular expression over names of modules of the language model and its head",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(f"(?:{self.target_modules})")
        except re.error as error:
            raise ValueError(f"target_modules: {self.target_modules!r} is not a regular expression: {error}") from error


@dataclass(frozen=True)
class SamplingConfig(Section):
    """How tokens are drawn."""

    temperature: float = setting(0.9, "0 is greedy", at_least(0, "0 is greedy"))
    top_k: int = setting(32, "draw among so many of the likeliest tokens; 0 is off", at_least(0, "0 is off"))
    top_p: float = setting(
        0.95,
        "draw among the likeliest that together have this probability; 1 is off",
        Range(lambda value: 0 < value <= 1, "above 0 and at most 1 (1 is off)"),
    )
    min_p: float = setting(
        0.0,
        "leave out what is less likely than this share of the likeliest; 0 is off",
        Range(lambda value: 0 <= value <= 1, "from 0 (off) to 1"),
    )
    repetition_penalty: float = setting(1.0, "above 1: against tokens that were there; 1 is off", above(0, "1 is off"))
    max_new_tokens: int = setting(256, "longest answer", at_least(1))


@dataclass(frozen=True)
class ContrastConfig(Section):
    """Contrastive decoding of clip captions: mixed = (1 + alpha)·expert − alpha·amateur."""

    alpha: float = setting(0.5, "weight of the contrast; 0 is plain sampling", at_least(0, "0 is plain sampling"))
    plausibility: float = setting(
        0.0,
        "leave out what the expert finds less likely than this share of its likeliest; 0 is off",
        Range(lambda value: 0 <= value <= 1, "from 0 (off) to 1"),
    )


@dataclass(frozen=True)
class PairsConfig(Section):
    """From videos to preference pairs: candidates are sampled and refined, the best and the worst of a video become a pair."""

    prompt: str = setting(
        "Describe the video in detail.", "what the model is asked, and the prompt of the pairs", WORDS
    )
    candidates: int = setting(10, "captions sampled of a video, held in memory together", at_least(2))
    refinements: int = setting(1, "second looks of the model at its own caption", at_least(0))
    margin: float = setting(4.0, "least difference between the scores of the two captions of a pair", at_least(0))
    clip_seconds: float = setting(10.0, "a video gives ⌊seconds / clip_seconds⌋ + 1 clips, two at least", above(0))
    max_clips: int = setting(16, "and no more than these", at_least(2))
    batch_size: int = setting(
        8, "captions written together; all candidates of a video always are (vllm: some hundreds)", at_least(1)
    )
    engine: str = setting("hf", "what samples the candidates: hf (our decoder) or vllm (extra vllm)")
    candidate_sampling: SamplingConfig = setting(SamplingConfig, "of candidates")
    clip_sampling: SamplingConfig = setting(lambda: SamplingConfig(temperature=0.5, top_p=0.9), "of clip captions")
    contrast: ContrastConfig = setting(ContrastConfig, "of clip captions")


@dataclass(frozen=True)
class JudgeConfig(Section):
    """Who scores candidates. The key of an endpoint is read from the environment when it is needed, and never stored."""

    kind: str = setting(
        "offline", "offline (no language model), openai (any compatible endpoint), local (a chat model)"
    )
    model: str = setting("", "name at the endpoint; local: checkpoint folder or hub id")
    base_url: str | None = setting(
        None, "address of the endpoint, with its /v1; null: $OPENAI_BASE_URL, or OpenAI's own"
    )
    key_env: str = setting("OPENAI_API_KEY", "environment variable that holds the key")
    requests_per_minute: float = setting(60.0, "requests are spread evenly", above(0))
    max_requests: int | None = setting(None, "budget of requests of one run; null: none", at_least(1))
    orders: int = setting(2, "orders in which the candidates are shown; scores are averaged", at_least(1))
    concurrency: int = setting(8, "questions asked at once", at_least(1))
    structured: bool = setting(True, "ask the endpoint to enforce the JSON schema of an answer")
    system_role: bool = setting(True, "false: all in one user message, as some chat templates want")
    temperature: float | None = setting(0.0, "of the judge; null: the endpoint's own", at_least(0))
    max_tokens: int | None = setting(
        None, "longest answer with its reasoning; null: no limit of ours (local: room for scores alone)", at_least(1)
    )
    timeout: float = setting(120.0, "seconds to wait for an answer", above(0))


@dataclass(frozen=True)
class EvalConfig(Section):
    """Captions of held-out videos, or likelihoods and answers of held-out pairs, and their scores."""

    prompt: str = setting("Describe the video in detail.", "what the model is asked", WORDS)
    sampling: SamplingConfig = setting(
        lambda: SamplingConfig(temperature=0.0, top_k=0, top_p=1.0), "of captions and answers, greedy by default"
    )
    batch_size: int = setting(8, "videos captioned, or pairs looked at, together", at_least(1))
    bootstrap: int = setting(1000, "resamples behind the intervals", at_least(1))


@dataclass(frozen=True)
class Config(Section):
    """A whole run. `train` holds keyword arguments of SynPOConfig; `load_config` checks them, whatever the command."""

    seed: int = setting(
        0,
        "seed of everything random",
        Range(lambda seed: 0 <= seed < 2**32, f"from 0 to {2**32 - 1}"),  # what NumPy takes
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    frames: FrameSampling = field(default_factory=FrameSampling)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lora: LoraSection | None = field(default_factory=LoraSection)
    train: dict[str, Any] = field(default_factory=dict)
    eval: EvalConfig = field(default_factory=EvalConfig)


Kind = TypeVar("Kind")
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SHOWN = 20  # names that an error lists


def suggest(name: Any, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    if near or len(names) > SHOWN:
        return f"did you mean {near[0]!r}?" if near else "`synpo config` lists all"
    return f"known: {', '.join(names)}"


def _of_key(name: str, known: Iterable[str]) -> str:
    """`suggest` for a key of a configuration, which may be what other tools call a setting."""
    meant = NICKNAMES.get(name.lower().replace("-", "_"))
    return f"did you mean {meant!r}?" if meant else suggest(name, known)


def build(kind: type[Kind], values: Any, where: str = "config") -> Kind:
    """Build the dataclass `kind` from a mapping, section by section. Raises ConfigError with the dotted name of the key."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {type(values).__name__} {values!r}")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}; {_of_key(str(name), known)}")
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
        if kind is bool and isinstance(value, str) and value.lower() in BOOLS:
            return BOOLS[value.lower()]
        if kind in (bool, str, dict, list) and isinstance(value, kind):
            return cleaned(value)
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{where}: expected {names}, got {value!r}")


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` laid over `base`, mapping by mapping."""
    merged = dict(base)
    for name, value in extra.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _lay_over(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`_merge`, but parameters belong to the objective they were set for: one that `extra` names instead starts from its own."""
    under, over = base.get("train"), extra.get("train")
    if isinstance(under, dict) and isinstance(over, Mapping):
        before = under.get("loss_type", DEFAULT_LOSS)
        if over.get("loss_type", before) != before:
            base = {**base, "train": {key: value for key, value in under.items() if key not in LOSS_PARAMETERS}}
    return _merge(base, extra)


def parse_override(text: str) -> dict[str, Any]:
    """`train.learning_rate=1e-5` as a nested mapping; the value is read as YAML. Raises ConfigError when there is no `=`."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set takes section.key=value, got {text!r}")
    parsed = _load(value, f"--set {name}: {value[:80]!r}")
    for part in reversed(name.split(".")):
        parsed = {part: parsed}
    return parsed


def _in_a_line(error: yaml.YAMLError) -> str:
    """What PyYAML says in several lines."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem}{f' in line {mark.line + 1}, column {mark.column + 1}' if mark else ''}"


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
    """As YAML 1.2 has it, a key that is there twice is an error, where PyYAML would forget the first; a date is text, `no` and
    `off` are words."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if not tag.endswith((":timestamp", ":bool"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and names.count(name.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name.value!r} is there twice", name.start_mark)
        return super().construct_mapping(node, deep)


def _load(text: str, where: str) -> Any:
    """A YAML document. Raises ConfigError for one that is none, or holds what JSON, in which a run is noted, has no form for."""
    try:
        loaded = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {_in_a_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    try:
        json.dumps(cleaned(loaded))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: expected numbers, texts, lists and mappings: {error}") from error
    return loaded


def _read(text: str, where: str) -> dict[str, Any]:
    loaded = _load(text, where)
    if not isinstance(loaded or {}, Mapping):
        raise ConfigError(f"{where}: expected sections, got {type(loaded).__name__}")
    return dict(loaded or {})


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> Config:
    """A preset, a YAML file over it, `--set` overrides over that, then command-line flags; every key is checked.

    A layer that names another `train.loss_type` than those below it takes none of their LOSS_PARAMETERS.

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
        values = _lay_over(values, _read(text, f"config file {path}"))
    told: dict[str, Any] = {}
    for override in overrides:
        told = _merge(told, parse_override(override))
    config = build(Config, _lay_over(values, _merge(told, flags or {})))
    if config.train:
        from synpo.train.arguments import checked

        checked(config.train)
    return config
