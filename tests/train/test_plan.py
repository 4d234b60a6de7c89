"""`synpo plan`: its memory estimate against what real training steps hold, its token counts, and the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from synpo.cli import main
from synpo.config import Config, ConfigError, LoraSection, ModelConfig, build
from synpo.data.collate import PairCollator
from synpo.data.tokenize import EncodedPair, Lengths, PairEncoder
from synpo.model import packing
from synpo.model.adapter import CaptionModel, load
from synpo.model.meant import meant_for
from synpo.model.tiny import byte_tokenizer, save, tiny_captioner, tiny_text_model
from synpo.records import Pair, write_records
from synpo.train.lora import apply_lora, make_trainable
from synpo.train.memory import RESERVE, Batch, MemoryModel, SavedBytes, saved_by_decoder
from synpo.train.objective import PairObjective
from synpo.train.plan import gpu_bytes, largest_batch, plan, show, skeleton

PROMPT, CHOSEN, REJECTED = 150, 60, 40
FRAMES = 24  # of four visual tokens each, and one newline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a Llama and a LLaVA-OneVision wide enough for activations to outweigh everything else."""
    tokenizer, root = byte_tokenizer(), tmp_path_factory.mktemp("models")
    llama = tiny_text_model(tokenizer, width=128, layers=3)
    onevision = tiny_captioner(tokenizer, text_width=128, text_layers=3)
    return {
        "llama": save(llama, tokenizer, root / "llama"),
        "onevision": save(onevision, tokenizer, root / "onevision"),
    }


def lora(lm: CaptionModel) -> CaptionModel:
    apply_lora(lm, LoraSection(r=8, alpha=8, dropout=0.05))
    return lm


def whole(lm: CaptionModel) -> CaptionModel:
    make_trainable(lm, replace(Config(), lora=None))
    return lm


def pair_for(lm: CaptionModel) -> EncodedPair:
    generator = torch.Generator().manual_seed(0)
    if lm.sees_video:
        frames = torch.randint(0, 256, (FRAMES, 3, 48, 48), dtype=torch.uint8, generator=generator)
        prompt = lm.prompt("Describe. " * 10, frames)
    else:
        prompt = lm.prompt("Describe. " * 15)
    chosen, rejected = (torch.randint(10, 200, (n,), generator=generator) for n in (CHOSEN, REJECTED))
    return EncodedPair("p", prompt.input_ids, chosen, rejected, prompt.vision)


def lengths_of(lm: CaptionModel, pair: EncodedPair) -> Lengths:
    visual = int((pair.prompt == getattr(lm.base.config, "video_token_id", -1)).sum())
    return Lengths(visual, len(pair.prompt) - visual, CHOSEN, REJECTED)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("family", ["llama", "onevision", "llama-whole"])
def test_the_estimate_is_within_15_percent_of_what_a_real_step_holds(
    family: str, layout: str, checkpointing: bool, folders: dict[str, Path]
) -> None:
    config = ModelConfig(path=str(folders[family.removesuffix("-whole")]), device="cpu")
    trainable = whole if family.endswith("whole") else lora
    lm = trainable(load(config))
    pair = pair_for(lm)
    batch = PairCollator(lm.pad_token_id, prefix_sharing=layout == "shared")([pair, pair])
    assert (batch["lengths"] is None) == (layout == "padded")
    objective = PairObjective(lm, "synpo", {}, "chunked")
    lm.model.train()
    if checkpointing:
        lm.base.gradient_checkpointing_enable({"use_reentrant": False})
    objective(lm.model, batch).loss.backward()

    planned = skeleton(config)
    with torch.device("meta"):
        trainable(planned)
    lengths = lengths_of(lm, pair)
    estimate = MemoryModel(planned.model, device="cpu").step(Batch(2, lengths, layout), checkpointing)

    counter = SavedBytes(lm.base)
    with counter.counting():
        kept = objective(lm.model, batch)
    saved = sum(counter.by_layer.values())
    if checkpointing:  # the layer that is run again in the backward pass is on top
        layer = trainable(load(config)).base.get_decoder()
        layer.train()
        parts = saved_by_decoder(planned.base, Batch(2, lengths, layout), device="cpu")
        again = SavedBytes(layer)
        with again.counting():
            hidden = torch.randn(*Batch(2, lengths, layout).shape, 128, requires_grad=True)
            positions = torch.arange(hidden.shape[1])[None].expand(len(hidden), -1)
            mask = batch_mask(batch, Batch(2, lengths, layout))
            out = layer.layers[1](
                hidden,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=layer.rotary_emb(hidden, positions),
            )
        assert sum(parts.inputs) <= saved
        saved += sum(again.by_layer.values())
        del out
    del kept
    assert estimate.activations == pytest.approx(saved, rel=0.15)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        objective(lm.model, batch).loss.backward()
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    held = peak = 0
    for _, size in events:
        held += size
        peak = max(peak, held)
    total = estimate.total - estimate.weights - estimate.trained - RESERVE
    assert total == pytest.approx(peak, rel=0.15)


def batch_mask(batch: Any, shape: Batch) -> torch.Tensor:
    if batch["lengths"] is not None:
        return batch["lengths"][None, None]
    rows, length = shape.shape
    return torch.ones(rows, 1, length, length, dtype=torch.bool).tril()


def test_one_call_for_all_pairs_keeps_what_it_is_given_and_gives() -> None:
    """On a GPU and in half precision: queries (L, 8, 64), the keys and values of both runs of a pair, (Σ 2P + C + R, 2, 64)."""
    packing.install("sdpa")
    query, key, value = (
        torch.empty(1, heads, 33, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 2, 2)
    )
    lengths = torch.tensor([[[[9, 3, 4], [12, 1, 4]]]])
    counter = SavedBytes(torch.nn.Module())
    with meant_for("cuda"), counter.counting():
        attended = packing._attend(packing._installed["sdpa"], True, None, query, key, value, lengths, {})
    keys = 2 * 9 + 3 + 4 + 2 * 12 + 1 + 4
    numbers = 33 * 8 * 64 + 2 * keys * 2 * 64 + 33 * 8 * 64
    bounds, places = 2 * 5 * 4, keys * 8
    assert attended.shape == (1, 33, 8, 64)
    found = counter.by_layer[-1]
    assert 2 * numbers + 4 * 33 * 8 + bounds <= found <= 2 * numbers + 4 * 33 * 8 + bounds + places + 64


def test_activations_grow_evenly_with_the_micro_batch(folders: dict[str, Path]) -> None:
    planned = skeleton(ModelConfig(path=str(folders["llama"])))
    with torch.device("meta"):
        lora(planned)
    model = MemoryModel(planned.model)
    for layout in ("padded", "shared"):
        five = Batch(5, Lengths(0, PROMPT, CHOSEN, REJECTED), layout)
        counted = saved_by_decoder(planned.base, five, device="cuda")
        for checkpointing in (False, True):
            assert model.saved(five, checkpointing) == pytest.approx(counted.total(checkpointing), rel=1e-3)


def test_weights_gradients_and_optimizer_are_what_they_are(folders: dict[str, Path]) -> None:
    real = lora(load(ModelConfig(path=str(folders["onevision"]), device="cpu", dtype="bfloat16")))
    planned = skeleton(ModelConfig(path=str(folders["onevision"]), dtype="bfloat16"))
    with torch.device("meta"):
        lora(planned)
    assert all(p.is_meta for p in planned.model.parameters())
    shapes = [{n: (p.shape, p.dtype) for n, p in lm.model.named_parameters()} for lm in (real, planned)]
    assert shapes[0] == shapes[1]
    trained = [p for p in real.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = sum(s.nbytes for state in optimizer.state.values() for s in state.values() if s.dim())
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert MemoryModel(planned.model).trained == gradients + states
    weights = sum(t.nbytes for t in [*real.model.parameters(), *real.model.buffers()])
    assert MemoryModel(planned.model).weights == pytest.approx(weights, rel=1e-3)
    assert (
        MemoryModel(planned.model, optimizer="adamw_8bit").trained == gradients + states
    )  # so small ones stay in 32 bits
    assert MemoryModel(planned.model, optimizer="sgd").trained == gradients


def test_the_largest_micro_batch_fits_and_one_more_does_not(folders: dict[str, Path]) -> None:
    planned = skeleton(ModelConfig(path=str(folders["llama"])))
    with torch.device("meta"):
        lora(planned)
    model, lengths = MemoryModel(planned.model), Lengths(0, 3000, 300, 300)
    for size in (2 * 10**9, 3 * 10**9, 8 * 10**9):
        best = largest_batch(model, lengths, "shared", False, size)
        assert best >= 1
        assert model.step(Batch(best, lengths, "shared")).total <= size
        assert model.step(Batch(best + 1, lengths, "shared")).total > size
    assert largest_batch(model, lengths, "shared", False, 10**9) == 0


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "qwen3"])
def test_visual_tokens_are_counted_in_every_family(family: str, family_lm: Any) -> None:
    """Also where a video is read as images."""
    lm = family_lm(family)
    frames = torch.zeros(4, 3, 48, 48, dtype=torch.uint8) if lm.sees_video else None
    prompt = lm.prompt("Describe.", frames)
    found = PairEncoder(lm).lengths(EncodedPair("p", prompt.input_ids, torch.ones(3), torch.ones(2), prompt.vision))
    visual = {"llava_onevision": 17, "qwen2_5_vl": 8, "qwen3_vl": 8, "qwen3": 0}.get(family, 16)
    assert found == Lengths(visual, len(prompt.input_ids) - visual, 3, 2)
    if visual:
        model = MemoryModel(lm.model.to("meta"), device="cpu")
        batches = [Batch(1, replace(found, visual=n), "shared") for n in (visual, 2 * visual)]
        assert 0 < model.step(batches[0]).vision < model.step(batches[1]).vision


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [Pair(f"p{i}", None, "Why? " * (i + 1), "Because. " * (i + 1), "No.") for i in range(9)]
    rows += [Pair("same", None, "Why?", "No.", "No."), Pair("long", None, "Why?", "word " * 200, "No.")]
    write_records(tmp_path / "pairs.jsonl", rows)
    return tmp_path / "pairs.jsonl"


def test_tokens_and_what_is_dropped_are_counted(folders: dict[str, Path], pairs: Path) -> None:
    values = {"model": {"path": str(folders["llama"])}, "lora": {"r": 4}, "train": {"max_completion_length": 120}}
    values["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    part = {**values, "train": values["train"] | {"num_train_epochs": 0.5, "held_out": 2}}
    assert plan(build(Config, part), None, pairs, ["24GB"]).steps == 1  # 7 pairs in 2 steps, half of them
    full = part["train"] | {"num_train_epochs": 3, "gradient_accumulation_steps": 1}
    assert plan(build(Config, part | {"train": full}), None, pairs, ["24GB"]).steps == 3 * 4
    assert (
        plan(build(Config, part | {"train": full | {"dataloader_drop_last": True}}), None, pairs, ["24GB"]).steps
        == 3 * 3
    )
    part["train"]["num_train_epochs"] = 0.6
    assert plan(build(Config, part), None, pairs, ["24GB"]).steps == 2
    found = plan(build(Config, values), None, pairs, ["24GB", "1GB"])
    assert (found.pairs, found.used, found.steps) == (11, 9, 6)
    assert {reason: row["count"] for reason, row in found.dropped.items()} == {
        "chosen equals rejected": 1,
        "answer too long": 1,
    }
    lm = load(ModelConfig(path=str(folders["llama"]), device="cpu"))
    sizes = [len(lm.completion("Because. " * (i + 1))) for i in range(9)]
    assert found.tokens["chosen"] == {"min": sizes[0], "median": sizes[4], "p95": sizes[8], "max": sizes[8]}
    assert found.tokens["visual"]["max"] == 0
    assert found.longest["id"] == "p8"
    assert found.trained == sum(p.numel() for p in lora_of(lm, 4) if p.requires_grad)
    assert [e.largest["1GB"] for e in found.estimates] == [0, 0, 0, 0]
    assert all(e.largest["24GB"] > 10 for e in found.estimates)
    (configured,) = (e for e in found.estimates if e.configured)
    assert (configured.micro_batch, configured.checkpointing) == (2, False)


def test_of_many_pairs_a_sample_is_read_and_the_longest(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("synpo.train.plan.DRAWN", 20)
    monkeypatch.setattr("synpo.train.plan.LONGEST", 3)
    rows = [Pair(f"p{i}", None, "Why?", "Because. " * (1 + i % 4), "No.") for i in range(200)]
    rows[77] = replace(rows[77], rejected="Never. " * 40)
    rows[11:191:20] = [replace(row, rejected=row.chosen) for row in rows[11:191:20]]  # 9 that are dropped
    write_records(tmp_path / "pairs.jsonl", rows)
    config = build(Config, {"model": {"path": str(folders["llama"])}, "lora": {"r": 4}})
    some, every = (plan(config, None, tmp_path / "pairs.jsonl", ["24GB"], every=every) for every in (False, True))
    assert every.sample is None and every.used == 191
    assert some.sample is not None and 20 <= some.sample <= 23
    assert some.longest == every.longest and some.longest["id"] == "p77"
    assert some.tokens["pair, shared"]["max"] == every.tokens["pair, shared"]["max"]
    assert some.tokens["chosen"]["median"] <= every.tokens["chosen"]["max"]
    assert some.steps == pytest.approx(every.steps, rel=0.1)
    show(some)
    assert f"of {some.sample} that were read: some by chance" in capsys.readouterr().out


def test_a_budget_of_tokens_is_counted_in_its_batches(folders: dict[str, Path], pairs: Path) -> None:
    train = {"max_completion_length": 120, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    values = {"model": {"path": str(folders["llama"])}, "lora": {"r": 4}, "train": train}
    longest = plan(build(Config, values), None, pairs, ["24GB"]).tokens["pair, shared"]["max"]
    values["train"] = train | {"tokens_per_batch": 2 * longest}
    found = plan(build(Config, values), None, pairs, ["24GB"])
    assert all(e.micro_batch == 2 for e in found.estimates)
    assert found.steps in (6, 9)  # nine pairs of up to half a batch: three to five batches, two a step
    values["train"] = train | {"tokens_per_batch": longest - 1}
    with pytest.raises(ConfigError, match=r"train\.tokens_per_batch: a pair has \d+ tokens, more than the"):
        plan(build(Config, values), None, pairs, ["24GB"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, None),
        ({"train": {"loss_type": "dpo"}}, "its adapter off, run again in every step"),
        ({"train": {"loss_type": "ipo", "precompute_reference": True}}, "its adapter off, run once over 9 pairs"),
        ({"train": {"loss_type": "ipo", "held_out": 2}, "lora": None}, "before the first step, run once over 9 pairs"),
        ({"train": {"loss_type": "dpo"}, "adapter": True}, "before the first step, run once over 9 pairs"),
    ],
)
def test_the_reference_is_told(
    values: dict[str, Any], words: str | None, folders: dict[str, Path], pairs: Path, tmp_path: Path, capsys: Any
) -> None:
    model = {"path": str(folders["llama"]), "device": "cpu"}
    if "adapter" in values:
        lm = load(ModelConfig(**model))
        lora_of(lm, 2)
        lm.model.save_pretrained(tmp_path / "adapter")
        model["adapter"] = str(tmp_path / "adapter")
    train = {"max_completion_length": 120} | values.get("train", {})
    config = {"model": model, "train": train} | ({"lora": None} if "lora" in values else {})
    found = plan(build(Config, config), None, pairs, ["24GB"])
    show(found)
    if words is None:
        assert found.reference == "" and "reference:" not in capsys.readouterr().out
    else:
        assert words in found.reference and found.reference in capsys.readouterr().out
    if "lora" in values:
        with pytest.raises(ConfigError, match=r"train\.reference: base is the model with its adapter off"):
            plan(build(Config, config | {"train": train | {"reference": "base"}}), None, pairs, ["24GB"])


def lora_of(lm: CaptionModel, r: int) -> list[torch.nn.Parameter]:
    apply_lora(lm, LoraSection(r=r))
    return list(lm.model.parameters())


def test_the_command_prints_tables_or_json_and_loads_no_weights(
    folders: dict[str, Path], pairs: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"  # the model's description without its weights
    bare.mkdir()
    for file in folders["llama"].iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    command = ["plan", "--model", str(bare), "--pairs", str(pairs), "--gpu", "24GB"]
    monkeypatch.setenv("COLUMNS", "80")
    assert main(command) == 0
    shown = capsys.readouterr().out
    memory = shown[shown.index("Memory in GiB") : shown.index("longest pair")].splitlines()
    assert max(map(len, memory)) <= 80
    assert "…" not in "".join(memory)
    for words in ("11 preference pairs", "dropped: chosen equals rejected", "activations", "largest micro-batch, 24GB"):
        assert words in shown
    assert main([*command, "--json", "--set", "train.bf16=true"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["used"] == 10
    assert document["estimates"][0]["memory"]["activations"] > 0
    assert main([*command[:-1], "large"]) == 2
    assert "--gpu takes a size like 24GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("48", 48 * 10**9), ("512MiB", 2**29)]
)
def test_sizes(text: str, size: int) -> None:
    assert gpu_bytes(text) == size


def test_a_model_that_cannot_be_described_is_a_config_error(tmp_path: Path, pairs: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        plan(replace(Config(), model=ModelConfig(path=str(tmp_path))), None, pairs)
