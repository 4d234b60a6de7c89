"""Which GPU trains what: the table against the estimates it is made of, and real sizes of models against what is published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.architectures import ARCHITECTURES
from synpo.cli import main
from synpo.config import Config, LoraSection
from synpo.data.tokenize import Lengths
from synpo.model.adapter import CaptionModel
from synpo.model.quantize import unpacked_bytes, weight_bytes
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.records import Pair, write_records
from synpo.train.fit import SIZES, ways
from synpo.train.lora import apply_lora, make_trainable
from synpo.train.memory import Batch, MemoryModel


@pytest.fixture
def planned() -> CaptionModel:
    tokenizer = byte_tokenizer()
    with torch.device("meta"):
        lm = CaptionModel(tiny_text_model(tokenizer, width=128, layers=3).bfloat16(), tokenizer, None)
        apply_lora(lm, LoraSection(r=8, alpha=8, dropout=0.0))
    return lm


def test_every_way_is_what_its_estimate_says(planned: CaptionModel) -> None:
    lengths = Lengths(0, 300, 60, 40)
    sizes = {"small": 2 * 10**9, "tiny": 10**9}
    found = ways(planned.model, lengths, sizes=sizes)
    assert [way.name for way in found] == ["LoRA", "LoRA, checkpointed", "QLoRA", "QLoRA, checkpointed"]
    for way in found:
        model = MemoryModel(planned.model, autocast=torch.bfloat16, quantization=way.quantization)
        assert way.one == model.step(Batch(1, lengths, "shared"), way.checkpointing).total
        assert way.largest["tiny"] == 0 < way.largest["small"]
        for pairs, fits in ((way.largest["small"], True), (way.largest["small"] + 1, False)):
            total = model.step(Batch(pairs, lengths, "shared"), way.checkpointing).total
            assert (total <= sizes["small"]) == fits
    plain, again, packed, packed_again = found
    assert again.largest["small"] > plain.largest["small"] and packed_again.largest["small"] > packed.largest["small"]


def test_a_model_that_is_trained_whole_has_no_weights_in_4_bits() -> None:
    tokenizer = byte_tokenizer()
    with torch.device("meta"):
        lm = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
        make_trainable(lm, Config(lora=None))
    assert [way.name for way in ways(lm.model, Lengths(0, 30, 6, 4))] == ["whole", "whole, checkpointed"]


def test_a_weight_in_4_bits_is_made_whole_for_its_product(planned: CaptionModel) -> None:
    largest = max(m.weight.nbytes for n, m in planned.base.named_modules() if n.endswith("proj.base_layer"))
    assert unpacked_bytes(planned.model, "nf4") == largest
    assert unpacked_bytes(planned.model, "none") == unpacked_bytes(planned.model, "int8") == 0
    assert weight_bytes(planned.model, "nf4") < weight_bytes(planned.model, "none")


def test_the_command_prints_it(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, tmp_path / "model")
    write_records(tmp_path / "pairs.jsonl", [Pair("a", None, "Why?", "Because.", "No.")])
    command = ["plan", "--model", str(tmp_path / "model"), "--pairs", str(tmp_path / "pairs.jsonl")]
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--fit"]) == 0
    shown = capsys.readouterr().out
    table = shown[shown.index("Which GPU trains what") : shown.index("longest pair")].splitlines()
    assert max(map(len, table)) <= 80 and "QLoRA, checkpointed" in "".join(table)
    assert all(size in table[2] for size in SIZES)
    assert main([*command, "--json", "--fit", "--gpu", "10GB"]) == 0
    assert [list(way["largest"]) for way in json.loads(capsys.readouterr().out)["ways"]] == [["10GB"]] * 4
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ways"] == []


@pytest.mark.parametrize("name", ["Qwen2.5-VL 3B", "Llama-3 8B", "LLaVA-OneVision 7B", "Qwen3-VL 4B"])
def test_architectures_have_the_parameters_that_are_published(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.skeleton()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(architecture.billions, rel=0.01)
    assert all(p.is_meta for p in model.parameters())
