"""Configuration: defaults, files, overrides, and errors that name the key."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synpo.config import (
    LOSS_PARAMETERS,
    Config,
    ConfigError,
    ModelConfig,
    build,
    load_config,
    parse_override,
    preset_names,
    preset_text,
    suggest,
)
from synpo.train.objective import parameters_of
from synpo.train.run import settings
from synpo_kernels import OBJECTIVES


def test_the_defaults_are_the_papers() -> None:
    config = load_config()
    assert config == Config()
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (128, 64, 0.05)
    assert (config.frames.fps, config.frames.minimum, config.frames.maximum) == (0.5, 8, 16)
    assert (config.pairs.candidates, config.pairs.margin) == (10, 4.0)
    sampling = config.pairs.candidate_sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.9, 0.95, 32)


def test_flags_go_over_overrides_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\nmodel: {path: a, dtype: float32}\ntrain: {learning_rate: 5e-6, beta: 0.1}\n")
    config = load_config(path, ["model.path=b", "train.beta=0.3", "pairs.contrast.alpha=1"], {"model": {"path": "c"}})
    assert config.seed == 1
    assert config.model == ModelConfig(path="c", dtype="float32")
    assert config.train == {
        "learning_rate": "5e-6",
        "beta": 0.3,
    }  # YAML 1.1 reads 5e-6 as text; the trainer converts it
    assert config.pairs.contrast.alpha == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, r"config: unknown key 'modle'; did you mean 'model'"),
        ({"lora": {"rank": 4}}, r"config\.lora: unknown key 'rank'"),
        ({"lora": {"r": "many"}}, r"config\.lora\.r: expected int, got 'many'"),
        ({"lora": {"r": 2.5}}, r"config\.lora\.r: expected int, got 2\.5"),
        ({"lora": {"r": True}}, r"config\.lora\.r: expected int, got True"),
        ({"lora": 3}, r"config\.lora: expected a mapping, got int 3"),
        ({"model": {"trust_remote_code": "perhaps"}}, r"trust_remote_code: expected bool"),
        ({"model": {"path": None}}, r"config\.model\.path: expected str, got None"),
        ({"frames": {"minimum": 9, "maximum": 4}}, r"config\.frames: .*minimum <= maximum"),
        ({"pairs": {"contrast": {"alhpa": 1}}}, r"config\.pairs\.contrast: unknown key 'alhpa'; did you mean 'alpha'"),
        ({"pairs": {"margin": float("nan")}}, r"config\.pairs\.margin: expected float, got nan"),
        ({"pairs": {"candidates": float("inf")}}, r"config\.pairs\.candidates: expected int, got inf"),
        (
            {"pairs": {"candidate_sampling": {"temperature": -1}}},
            r"config\.pairs\.candidate_sampling: temperature: expected at least 0",
        ),
        ({"eval": {"sampling": {"max_new_tokens": 0}}}, r"config\.eval\.sampling: max_new_tokens: .* 1, got 0"),
        ({"eval": {"sampling": {"top_p": 0}}}, r"config\.eval\.sampling: top_p: .*, got 0"),
        ([], r"config: expected a mapping, got list"),
    ],
)
def test_errors_name_the_key(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Config, values)


def test_values_are_converted_to_their_type() -> None:
    config = build(
        Config, {"lora": {"r": "8", "dropout": "5e-2"}, "model": {"trust_remote_code": "True", "adapter": None}}
    )
    assert (config.lora.r, config.lora.dropout) == (8, 0.05)
    assert config.model.trust_remote_code is True
    assert config.model.adapter is None
    assert load_config(overrides=["lora=null"], preset="smoke").lora is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", "is not YAML"),
        ("- 1", "expected sections, got list"),
        ("sede: 1", "did you mean 'seed'"),
        ("1: 2", "unknown key 1"),
        ("seed: 2024-13-45", "seed: expected int, got '2024-13-45'"),
        (f"seed: {'9' * 5000}", "is not YAML: Exceeds the limit"),
        ("train: &a {x: *a}", "expected numbers, texts, lists and mappings: nested"),
        ("model: {template_variables: {a: !!binary aGk=}}", "expected numbers, texts, lists and mappings: Object of"),
        (
            "model: {template_variables: {a: !!set {x}}}",
            "expected numbers, texts, lists and mappings: Object of type set",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_words_that_mean_no_reach_settings_of_words_and_of_truth(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "train: {guard: off, save_strategy: no, bf16: no}\nmodel: {trust_remote_code: yes}\n"
    )
    config = load_config(tmp_path / "c.yaml")
    args = settings(replace(config, model=replace(config.model, device="cpu")), tmp_path)
    assert (args.guard, args.save_strategy, args.bf16) == ("off", "no", False)
    assert config.model.trust_remote_code is True


def test_an_empty_file_is_the_defaults_and_a_missing_one_an_error(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == Config()
    with pytest.raises(ConfigError, match=r"nope\.yaml does not exist"):
        load_config(tmp_path / "nope.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", {"seed": 3}),
        ("a.b.c=x=y", {"a": {"b": {"c": "x=y"}}}),
        ("a.b=", {"a": {"b": None}}),
        ("a=[1, 2]", {"a": [1, 2]}),
        ("a.b=false", {"a": {"b": False}}),
        ("a.date=2024-07-26", {"a": {"date": "2024-07-26"}}),
        ("train.guard=off", {"train": {"guard": "off"}}),
        ("train.save_strategy=no", {"train": {"save_strategy": "no"}}),
    ],
)
def test_overrides_are_read_as_yaml(text: str, expected: Any) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3"])
def test_an_override_needs_key_and_value(text: str) -> None:
    with pytest.raises(ConfigError, match=r"takes section\.key=value"):
        parse_override(text)


@pytest.mark.parametrize("value", ["[1", "9" * 5000, "{a: 1, a: 2}", "&a [*a]", "!!timestamp 2024-13-45", "!!set {x}"])
def test_an_override_that_is_not_yaml_is_a_configuration_error(value: str) -> None:
    with pytest.raises(ConfigError, match="--set seed: "):
        parse_override(f"seed={value}")


LLAMA = "llama3-lora"


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        ("", ["train.loss_type=dpo"], {}),
        ("", ["train.loss_type=dpo", "train.beta=0.3"], {"beta": 0.3}),
        ("", ["train.beta=0.3", "train.loss_type=dpo"], {"beta": 0.3}),
        ("train: {loss_type: dpo}", [], {}),
        ("train: {loss_type: dpo}", ["train.beta=0.3"], {"beta": 0.3}),
        ("train: {loss_type: dpo, beta: 0.3}", [], {"beta": 0.3}),
        ("train: {loss_type: dpo, beta: 0.3}", ["train.loss_type=simpo"], {}),
        ("train: {beta: 0.3}", ["train.loss_type=dpo"], {}),
        ("train: {beta: 0.3}", ["train.loss_type=synpo"], {"alpha": 30.0, "beta": 0.3}),
        ("train: {beta: 0.3}", [], {"alpha": 30.0, "beta": 0.3}),
    ],
)
def test_parameters_of_a_loss_belong_to_it(
    file: str, overrides: list[str], expected: dict[str, float], tmp_path: Path
) -> None:
    """A preset's alpha and beta are SynPO's: another objective starts from its own."""
    (tmp_path / "c.yaml").write_text(file)
    config = load_config(tmp_path / "c.yaml", overrides, preset=LLAMA)
    assert {k: v for k, v in config.train.items() if k in LOSS_PARAMETERS} == expected
    assert config.train["learning_rate"] == load_config(preset=LLAMA).train["learning_rate"]
    args = settings(replace(config, model=replace(config.model, device="cpu")), tmp_path)
    assert parameters_of(args.loss_type, args.loss_parameters) == OBJECTIVES_OWN[args.loss_type] | expected


OBJECTIVES_OWN = {
    "synpo": {"alpha": 30.0, "beta": 0.2},
    "dpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
}


@pytest.mark.parametrize("loss", sorted(OBJECTIVES))
@pytest.mark.parametrize("name", preset_names())
def test_every_preset_goes_with_every_objective(name: str, loss: str, tmp_path: Path) -> None:
    config = load_config(preset=name, overrides=[f"train.loss_type={loss}", "model.device=cpu"])
    args = settings(config, tmp_path)
    defaults = parameters_of(loss, {})
    assert parameters_of(loss, args.loss_parameters) == defaults


def test_suggestions() -> None:
    assert suggest("lerning_rate", ["learning_rate", "seed"]) == "did you mean 'learning_rate'?"
    assert suggest("zzz", ["b", "a"]) == "known: a, b"


@pytest.mark.parametrize("name", ["auroracap-lora", "qwen2.5-vl-lora", "llama3-lora"])
def test_presets_are_the_papers_and_leave_the_vision_tower_alone(name: str, tmp_path: Path) -> None:
    config = load_config(preset=name)
    args = settings(replace(config, model=replace(config.model, device="cpu")), tmp_path)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    assert (args.learning_rate, args.num_train_epochs, args.alpha, args.beta) == (5e-6, 5, 30.0, 0.2)
    assert getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (128, 64, 0.05)
    prefix = "model.language_model.layers.0" if "qwen" in name else "model.layers.0"
    assert re.fullmatch(config.lora.target_modules, f"{prefix}.self_attn.q_proj")
    if "qwen" in name:
        assert not re.fullmatch(config.lora.target_modules, "model.visual.blocks.0.mlp.gate_proj")


def test_every_preset_says_what_it_is_for() -> None:
    assert preset_names() == ["auroracap-lora", "llama3-lora", "qwen2.5-vl-lora", "smoke"]
    assert all(preset_text(name).startswith("# ") for name in preset_names())
    with pytest.raises(ConfigError, match="did you mean 'llama3-lora'"):
        load_config(preset="llama-lora")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", r"config: seed: expected from 0 to 4294967295, got -1"),
        ("model.dtype=float33", r"config\.model: dtype: expected one of auto, float32"),
        ("model.device=cudaa", r"config\.model: device: expected auto, cpu, cuda"),
        ("pairs.contrast.alpha=-1", r"config\.pairs\.contrast: alpha: expected at least 0"),
        ("pairs.contrast.alpha=.inf", r"config\.pairs\.contrast: alpha"),
        (
            "pairs.contrast.plausibility=2",
            r"config\.pairs\.contrast: plausibility: expected from 0 \(off\) to 1, got 2",
        ),
        ("frames.fps=.inf", r"config\.frames: .*finite"),
    ],
)
def test_figures_out_of_range_are_refused_before_anything_is_loaded(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "xpu:0", "mps"])
def test_devices(device: str) -> None:
    assert load_config(overrides=[f"model.device={device}"]).model.device == device


def test_a_key_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\npairs: {margin: 1}\nlora: {r: 2}\npairs: {candidates: 3}\n")
    with pytest.raises(ConfigError, match=r"(?s)'pairs' is there twice.*line 2"):
        load_config(path)
    path.write_text("seed: 1\nlora: {r: 2}\nmodel: &m {path: x}\n")
    assert load_config(path).lora.r == 2  # type: ignore[union-attr]
