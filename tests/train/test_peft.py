"""What PEFT trains of an adapter is trained, saved, resumed, planned and evaluated: its biases, saved modules, single tokens."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from synpo import SynPOConfig, SynPOTrainer
from synpo.config import Config, ConfigError, ModelConfig
from synpo.data.collate import PairCollator
from synpo.model.adapter import CaptionModel, load
from synpo.model.peft_kinds import base_is_kept
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.records import Pair, write_records
from synpo.train.lora import make_trainable
from synpo.train.objective import PairObjective
from synpo.train.plan import plan, skeleton
from synpo.train.reference import fingerprint
from synpo.train.run import train
from synpo_kernels import OBJECTIVES, SequenceStats, sequence_stats

TOKENS = sorted(set(byte_tokenizer()("Describe ABC.", add_special_tokens=False).input_ids))
KINDS: dict[str, dict[str, Any]] = {
    "all biases": {"bias": "all"},
    "biases of LoRA's layers": {"bias": "lora_only"},
    "biases in LoRA": {"lora_bias": True},
    "the head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "single tokens": {"trainable_token_indices": TOKENS[:3]},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoRA on embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "everything": {
        "bias": "all", "modules_to_save": ["lm_head", "norm"], "trainable_token_indices": TOKENS[:1], "use_dora": True,
    },
}  # fmt: skip
TIED = ("single tokens", "all biases")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of models with biases: one with a head of its own, one whose head is its embeddings."""
    root = tmp_path_factory.mktemp("bases")
    tokenizer = byte_tokenizer()
    found = {}
    for name in ("own", "tied"):
        torch.manual_seed(0)
        model: Any = tiny_text_model(tokenizer, "qwen2")
        if name == "tied":
            model.config.tie_word_embeddings = True
            torch.manual_seed(0)
            model = type(model)(model.config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.1)
        found[name] = save(model, tokenizer, root / name)
    return found


@pytest.fixture
def adapter_for(bases: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """adapter_for(base, kind): the folder of an adapter, as another program trained it; nothing in it is what it began with."""

    def build(base: str, kind: str) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(
                AutoModelForCausalLM.from_pretrained(bases[base]),
                LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **KINDS[kind]}),
            )
            shake(model)
            model.save_pretrained(tmp_path / "given", save_embedding_layers=False)
        return tmp_path / "given"

    return build


def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def trained_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def by_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [Pair(f"{i}", None, "Describe ABC.", f"A red circle, {i}.", f"Nothing at all {i}.") for i in range(4)]
    write_records(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


def settings(base: Path, adapter: Path | None, **given: Any) -> Config:
    own = {
        "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 0,
        "learning_rate": 0.01, "disable_tqdm": True,
    }  # fmt: skip
    model = ModelConfig(path=str(base), adapter=adapter and str(adapter), device="cpu")
    return Config(model=model, train={**own, **given})


@pytest.mark.parametrize(("base", "kind"), [*(("own", kind) for kind in KINDS), *(("tied", kind) for kind in TIED)])
def test_all_that_peft_trains_is_trained(
    base: str, kind: str, bases: dict[str, Path], adapter_for: Callable[..., Path]
) -> None:
    given = adapter_for(base, kind)
    expected = trained_of(by_peft(bases[base], given)).keys()
    config = settings(bases[base], given)
    for lm in (load(config.model), skeleton(config.model)):
        make_trainable(lm, config)
        assert {name for name, p in lm.model.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ("own", "everything"),
        ("own", "LoRA on embeddings and head"),
        ("own", "biases in LoRA"),
        ("tied", "single tokens"),
    ],
)
def test_all_of_it_changes_and_is_saved_and_used(
    base: str, kind: str, bases: dict[str, Path], adapter_for: Callable[..., Path], pairs: Path, tmp_path: Path
) -> None:
    given = adapter_for(base, kind)
    config = settings(bases[base], given)
    before = trained_of(by_peft(bases[base], given))
    planned = plan(config, None, pairs, ["24GB"])
    result = train(config, None, pairs, tmp_path / "run")
    after = trained_of(by_peft(bases[base], result.adapter))
    assert after.keys() == before.keys() and not [name for name in before if torch.equal(before[name], after[name])]
    assert result.metrics["trainable_parameters"] == planned.trained == sum(p.numel() for p in after.values())
    lm = load(replace(config.model, adapter=str(result.adapter)))
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        logits = by_peft(bases[base], result.adapter).eval()(ids).logits
        torch.testing.assert_close(lm.model(ids).logits, logits)
        torch.testing.assert_close(lm.head().logits(lm.hidden_states({"input_ids": ids})), logits)
        assert (by_peft(bases[base], given).eval()(ids).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("base", "kind", "loss_type"),
    [
        ("own", "everything", "synpo"),
        ("own", "everything", "simpo"),
        ("own", "biases in LoRA", "dpo"),
        ("tied", "single tokens", "synpo"),
        ("tied", "single tokens", "dpo"),
    ],
)
def test_gradients_are_those_of_full_logits(
    base: str, kind: str, loss_type: str, bases: dict[str, Path], adapter_for: Callable[..., Path], pairs_for: Any
) -> None:
    config = settings(bases[base], adapter_for(base, kind))
    lm = load(config.model)
    make_trainable(lm, config)
    pairs = pairs_for(lm)
    objective = PairObjective(lm, loss_type, {})
    batch = PairCollator(lm.pad_token_id)(pairs)

    def naive() -> SequenceStats:
        rows = []
        for prompt, answer in [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]:
            logps = lm.model(input_ids=torch.cat([prompt, answer])[None]).logits[0].log_softmax(-1)
            rows.append(logps[len(prompt) - 1 : -1].gather(1, answer[:, None])[:, 0])
        return sequence_stats(torch.cat(rows), cu_seqlens=torch.tensor([0, *map(len, rows)]).cumsum(0))

    reference = []
    if objective.reference == "base":
        with torch.no_grad(), lm.model.disable_adapter():
            reference = [naive()]
    outcome = objective(lm.model, batch)
    outcome.loss.backward()
    found = {n: p.grad for n, p in lm.model.named_parameters() if p.grad is not None}
    lm.model.zero_grad()
    loss = OBJECTIVES[loss_type](naive(), *reference)
    loss.backward()
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-4, atol=1e-5)
    for name, expected in ((n, p.grad) for n, p in lm.model.named_parameters() if p.requires_grad):
        assert (found[name] - expected).norm() <= 2e-3 * expected.norm() + 1e-8, name


@pytest.mark.parametrize("kind", ["everything"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    kind: str, bases: dict[str, Path], adapter_for: Callable[..., Path], pairs: Path, tmp_path: Path
) -> None:
    config = settings(bases["own"], adapter_for("own", kind), loss_type="dpo")
    whole = train(config, None, pairs, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("adapter", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "metrics.json").unlink()
    resumed = train(config, None, pairs, tmp_path / "run")
    expected = trained_of(by_peft(bases["own"], whole.adapter))
    for name, value in trained_of(by_peft(bases["own"], resumed.adapter)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_under_an_adapter_is_a_reference_unless_it_is_changed(
    kind: str, bases: dict[str, Path], adapter_for: Callable[..., Path]
) -> None:
    config = settings(bases["own"], adapter_for("own", kind))
    lm, plain = load(config.model), load(replace(config.model, adapter=None))
    make_trainable(lm, config)
    kept = not {"bias", "init_lora_weights"} & KINDS[kind].keys()
    assert base_is_kept(lm.model) == kept
    assert (fingerprint(lm) == fingerprint(plain)) == kept
    before = fingerprint(lm, adapters=True)
    with torch.no_grad(), lm.model.disable_adapter():
        assert torch.equal(lm.model(torch.arange(8)[None]).logits, plain.model(torch.arange(8)[None]).logits) == kept
    if kept:
        assert PairObjective(lm, "dpo", {}).reference == "base"
    else:
        assert PairObjective(lm, "dpo", {}).reference == "start"
        with pytest.raises(
            ConfigError, match=r"train\.reference: base .* of biases that an adapter trains no copy is kept"
        ):
            PairObjective(lm, "dpo", {}, reference="base")
    shake(lm.model)
    assert fingerprint(lm, adapters=True) != before
    if kept:
        assert fingerprint(lm) == fingerprint(plain)


def test_an_adapter_that_was_loaded_to_be_used_is_trained_as_well(
    bases: dict[str, Path], adapter_for: Callable[..., Path]
) -> None:
    given = adapter_for("own", "everything")
    used = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["own"]), given)
    lm = CaptionModel(used, byte_tokenizer(), None)
    make_trainable(lm, Config())
    assert trained_of(by_peft(bases["own"], given)).keys() <= trained_of(lm.model).keys()


def test_an_adapter_may_train_the_vision_tower(tiny_captioner_path: Path, tmp_path: Path, pairs_for: Any) -> None:
    plain = load(ModelConfig(path=str(tiny_captioner_path), device="cpu")).model
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"))
    shake(model)
    model.save_pretrained(tmp_path / "given")
    lm = load(ModelConfig(path=str(tiny_captioner_path), adapter=str(tmp_path / "given"), device="cpu"))
    names = make_trainable(lm, Config())
    assert any("vision_tower" in name for name in names) and not lm.vision_frozen
    outcome = PairObjective(lm, "synpo", {})(lm.model, PairCollator(lm.pad_token_id)(pairs_for(lm)))
    outcome.loss.backward()
    unseen = [n for n, p in lm.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert all("vision_tower" in name and ("head" in name or "post_layernorm" in name) for name in unseen), unseen


BESIDE_LAYERS: dict[str, Any] = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "AdaLoRA": AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=9),
}


@pytest.mark.parametrize("kind", BESIDE_LAYERS)
def test_adapters_that_do_more_than_change_layers_are_refused(
    kind: str, bases: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    given = copy.deepcopy(BESIDE_LAYERS[kind])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["own"]), given)
    model.save_pretrained(tmp_path / "given")
    message = rf"model\.adapter: an adapter of kind {type(given).__name__} does more than change layers"
    with pytest.raises(ConfigError, match=message):
        train(settings(bases["own"], tmp_path / "given"), None, pairs, tmp_path / "run")
    args, rows = (
        SynPOConfig(str(tmp_path / "run"), use_cpu=True),
        [json.loads(x) for x in pairs.read_text().splitlines()],
    )
    for peft in (given, None):
        plain = AutoModelForCausalLM.from_pretrained(bases["own"]) if peft else model
        with pytest.raises(ConfigError, match=message):
            SynPOTrainer(plain, args, rows, processing_class=byte_tokenizer(), peft_config=peft)


def test_an_adapter_whose_beginning_cannot_be_told_any_more_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT draws another part of the base at random, and loads another model than was saved."""
    given = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa_niter_2", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(bases["own"]), given)
    model.save_pretrained(tmp_path / "given")
    with pytest.raises(
        ConfigError, match="given was begun by pissa_niter_2, .* path_initial_model_for_weight_conversion"
    ):
        load(ModelConfig(path=str(bases["own"]), adapter=str(tmp_path / "given"), device="cpu"))
    assert not base_is_kept(model)


def test_an_adapter_that_cannot_be_put_on_the_model_is_named(
    bases: dict[str, Path], adapter_for: Callable[..., Path], tmp_path: Path
) -> None:
    given = adapter_for("own", "norms")
    whole = (given / "adapter_model.safetensors").read_bytes()
    settings_of = json.loads((given / "adapter_config.json").read_text())
    config = ModelConfig(path=str(bases["own"]), adapter=str(given), device="cpu")
    for name, data in {
        "adapter_model.safetensors": whole[: len(whole) // 2],
        "adapter_config.json": json.dumps(settings_of | {"r": 3}).encode(),  # other shapes
    }.items():
        kept = (given / name).read_bytes()
        (given / name).write_bytes(data)
        with pytest.raises(ConfigError, match=r"model\.adapter: .*given cannot be put on the model: "):
            load(config)
        (given / name).write_bytes(kept)
    for data in (b"{", b"[]", json.dumps(settings_of | {"peft_type": "NEW"}).encode(), b"\xff"):
        (given / "adapter_config.json").write_bytes(data)
        with pytest.raises(ConfigError, match=r"model\.adapter: .*given cannot be put on the model: "):
            load(config)


def test_an_activated_lora_is_refused(bases: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases["own"])
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[66], task_type="CAUSAL_LM")
    )
    with pytest.raises(ConfigError, match=r"model\.adapter: an activated LoRA"):
        make_trainable(CaptionModel(peft, byte_tokenizer(), None), Config())
