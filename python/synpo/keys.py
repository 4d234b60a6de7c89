"""Every setting by its dotted key: what `synpo config` prints, CONFIG.md holds, and an unknown flag is answered with.

All of it is read off the dataclasses of config.py, `SynPOConfig` and, under that, transformers.TrainingArguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml

from synpo.config import LOSS_PARAMETERS, Config, ConfigError
from synpo.nicknames import NICKNAMES

SECTIONS = {
    "pairs": ("pairs", "judge", "model", "frames"),
    "train": ("train", "lora", "model", "frames"),
    "plan": ("train", "lora", "model", "frames"),
    "eval": ("eval", "model", "frames"),
}
"""command that takes --set → the sections that it reads, the nearest first."""


@dataclass(frozen=True)
class Key:
    """One setting. `inherited`: it is one of TrainingArguments, and described there."""

    name: str
    type: str
    default: str
    help: str
    inherited: bool = False

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]


def keys() -> list[Key]:
    """All settings, section by section; imports transformers."""
    return list(_of(Config, Config(), ""))


def _of(kind: Any, values: Any, prefix: str) -> Iterator[Key]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, value = prefix + field.name, getattr(values, field.name)
        if name == "train":
            yield from _training()
        elif dataclasses.is_dataclass(value):
            yield from _of(type(value), value, f"{name}.")
        else:
            yield Key(name, type_name(hints[field.name]), in_yaml(value), field.metadata["help"])


def _training() -> Iterator[Key]:
    """Those of the section train: first those that SynPOConfig describes itself, in its order."""
    from transformers import TrainingArguments

    from synpo.train.arguments import OWN, SynPOConfig

    hints = typing.get_type_hints(SynPOConfig)
    fields = {f.name: f for f in dataclasses.fields(SynPOConfig) if f.init and f.name not in OWN}
    theirs = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    own = [name for name in SynPOConfig.__annotations__ if name in fields and fields[name].metadata.get("help")]
    for name in [*own, *(name for name in fields if name not in own)]:
        field = fields[name]
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if name in own:
            help = field.metadata["help"].removesuffix(".") + _of_losses(name)
        else:
            help = " ".join(theirs[name].metadata.get("help", "").split()).partition(". ")[0].replace("%%", "%")
        yield Key(f"train.{name}", type_name(hints[name]), in_yaml(value), help.removesuffix("."), name not in own)


def _of_losses(name: str) -> str:
    """What a parameter of losses is where it is null."""
    from synpo.train.objective import parameters_of
    from synpo_kernels import OBJECTIVES

    if name not in LOSS_PARAMETERS:
        return ""
    own = {loss: parameters_of(loss, {}) for loss in OBJECTIVES}
    return "; null: " + ", ".join(f"{loss} {found[name]:g}" for loss, found in own.items() if name in found)


def values(config: Config) -> dict[str, str]:
    """Every setting of a configuration by its key, as YAML; of the section train those that are set."""

    def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
        if name != "train" and not dataclasses.is_dataclass(value):
            yield name, in_yaml(value)
            return
        inner = value if name == "train" else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        for key, one in inner.items():
            yield from flat(one, f"{name}.{key}".lstrip("."))

    return dict(flat(config, ""))


def named(found: Sequence[Key], wanted: Sequence[str]) -> list[Key]:
    """The settings that any of `wanted` names: a key, the beginning of keys, or the last part of one; all where it is empty.

    Raises ConfigError for one that names none.
    """
    chosen: list[Key] = []
    for name in wanted:
        here = [k for k in found if name == k.name or k.name.startswith(f"{name}.") or k.name.endswith(f".{name}")]
        if not here:
            near = difflib.get_close_matches(name, [key.name for key in found], n=1)
            raise ConfigError(
                f"there is no setting {name}; " + (f"did you mean {near[0]}?" if near else "`synpo config` lists all")
            )
        chosen += here
    return chosen or list(found)


def type_name(annotation: Any) -> str:
    """An annotation as people write it: "int or null"."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        names = [type_name(option) for option in typing.get_args(annotation)]
        return " or ".join(dict.fromkeys(sorted(names, key=lambda name: name == "null")))
    kind = typing.get_origin(annotation) or annotation
    if kind is type(None):
        return "null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "str"
    return getattr(kind, "__name__", str(kind))


def in_yaml(value: Any) -> str:
    """A value as it stands in a configuration file."""
    if isinstance(value, Enum):
        value = value.value
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 20).removesuffix("...\n").strip()
    )


def advice(flag: str, value: str | None, command: str) -> str:
    """What to write in place of an unknown flag of a command, in words."""
    name = flag.lstrip("-").replace("-", "_").lower()
    known = {key.name: key for key in keys()}
    sections = SECTIONS[command]
    found = [key for key in known if key == name or key.rpartition(".")[2] == name]
    found = [NICKNAMES[name]] if name in NICKNAMES else sorted(found, key=lambda key: _order(key, sections))
    if not found:
        names = {key.rpartition(".")[2]: key for key in reversed(known) if key.partition(".")[0] in sections}
        found = [names[near] for near in difflib.get_close_matches(name, names, n=1)]
    if not found or _order(found[0], sections) == len(sections):
        return f"there is no {flag}; `synpo {command} --help` lists the flags, `synpo config` every setting for --set"
    key = known[found[0]]
    return f"{flag}: write --set {key.name}={value or key.type.upper().replace(' ', '_')} ({key.help}; default {key.default})"


def _order(key: str, sections: Sequence[str]) -> int:
    section = key.partition(".")[0]
    return sections.index(section) if section in sections else len(sections)


def lines(found: Sequence[Key], values: Mapping[str, str]) -> Iterator[str]:
    """Settings as lines of text, one a setting: key, value (and the default where it is another), type, help."""
    shown = {key.name: values.get(key.name, key.default) for key in found}
    wide = max(map(len, shown))
    middle = min(28, max(map(len, shown.values())))
    kinds = max(len(key.type) for key in found)
    for key in found:
        value = shown[key.name]
        other = "" if yaml.safe_load(value) == yaml.safe_load(key.default) else f" (default {key.default})"
        yield f"{key.name:{wide}}  {value:{middle}}  {key.type:{kinds}}  {key.help}{other}"


def page() -> str:
    """CONFIG.md: a table a section; of TrainingArguments only what is described here."""
    docs = {field.name: type(getattr(Config(), field.name)).__doc__ for field in dataclasses.fields(Config)}
    text = [HEAD]
    section = ""
    for key in keys():
        if key.inherited:
            continue
        if key.section != section:
            section = key.section
            said = (
                TRAIN
                if section == "train"
                else ""
                if section == "seed"
                else f"{(docs[section] or '').splitlines()[0]}\n"
            )
            text += [
                f"\n## {section}\n\n{said}\n| key | default | type | |\n|---|---|---|---|".replace("\n\n\n", "\n\n")
            ]
        cells = (f"`{key.name}`", f"`{key.default}`", key.type, key.help)
        text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(text) + "\n"


HEAD = """# Settings

Written by `synpo config --markdown`; `synpo config` prints the same, with all of `transformers.TrainingArguments`.

Each has a default, a place in a YAML file (`--config`), and `--set key=value`; a value is read as YAML: `null`, `true`, `5e-6`,
`[a, b]`. Laid over each other: `--preset`, then `--config`, then `--set`, then flags."""

TRAIN = """Keyword arguments of `SynPOConfig`. Everything else of `transformers.TrainingArguments` may stand here too.
`alpha`, `beta`, `gamma` and `weight` belong to the objective: another `loss_type` laid over them starts from its own.
"""
