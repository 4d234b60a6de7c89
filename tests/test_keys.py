"""The list of settings is complete and true, and the page of it is the one that the code writes."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from synpo.cli import main
from synpo.config import Config, ConfigError, build, load_config
from synpo.keys import keys, lines, named, page, values
from synpo.nicknames import NICKNAMES
from synpo.train.arguments import OWN, SynPOConfig

ROOT = Path(__file__).resolve().parent.parent


def test_every_setting_is_there_with_its_default_and_a_line_of_help() -> None:
    found = {key.name: key for key in keys()}
    mapping: dict = {}
    for key in found.values():
        assert key.help and "\n" not in key.help, key.name
        section = mapping
        *path, last = key.name.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = yaml.safe_load(key.default)
    train = mapping.pop("train")
    assert build(Config, mapping) == Config()
    wanted = {f.name: f for f in dataclasses.fields(SynPOConfig) if f.init and f.name not in OWN}
    assert train.keys() == wanted.keys()
    plain = (int, float, str, bool, type(None))
    assert all(train[n] == f.default for n, f in wanted.items() if type(f.default) in plain)


def test_the_page_is_the_one_the_code_writes() -> None:
    text = (ROOT / "python" / "synpo" / "CONFIG.md").read_text(encoding="utf-8")
    assert text == page(), "a setting changed: synpo config --markdown > python/synpo/CONFIG.md"


def test_nicknames_mean_settings() -> None:
    known = {key.name for key in keys()}
    assert set(NICKNAMES.values()) <= known
    assert not {key.rpartition(".")[2] for key in known} & NICKNAMES.keys()


def test_keys_are_picked_by_name_section_or_last_part() -> None:
    found = keys()
    assert [key.name for key in named(found, ["lora.r", "seed"])] == ["lora.r", "seed"]
    assert {key.section for key in named(found, ["judge"])} == {"judge"}
    assert len(named(found, ["top_k"])) == 3 and named(found, []) == found
    with pytest.raises(ConfigError, match=r"no setting lora\.rr; did you mean lora\.r\?"):
        named(found, ["lora.rr"])


def test_a_preset_is_shown_with_the_defaults_it_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--preset", "llama3-lora", "--set", "train.loss_type=dpo", "--set", "lora=null"]
    assert main(["config", *arguments, "train.loss_type", "train.max_length", "seed"]) == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert shown[0].startswith("train.loss_type dpo str") and shown[0].endswith("(default synpo)")
    assert shown[1].startswith("train.max_length 4096 ") and shown[1].endswith("(default null)")
    assert shown[2] == "seed 0 int seed of everything random"
    assert main(["config", *arguments, "train.num_train_epochs"]) == 0
    assert "(default" not in capsys.readouterr().out, "5 is 5.0"
    set_values = values(load_config(preset="smoke", overrides=["lora=null"]))
    assert set_values["lora"] == "null" and set_values["pairs.candidate_sampling.max_new_tokens"] == "16"
    assert set_values.keys() - {"lora"} <= {key.name for key in keys()}


def test_lines_are_one_a_setting() -> None:
    found = keys()
    shown = list(lines(found, {}))
    assert len(shown) == len(found) and all(line.startswith(key.name) for line, key in zip(shown, found))
