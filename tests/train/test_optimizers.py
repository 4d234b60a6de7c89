"""Optimizers by name: what is counted of them is what they keep, they go on where they were, and absent ones are named early."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

from synpo.config import ConfigError
from synpo.model.adapter import CaptionModel
from synpo.train import optimizers
from synpo.train.arguments import SynPOConfig
from synpo.train.optimizers import of_bitsandbytes, state_bytes

BNB = ("adamw_8bit", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit")


def test_a_package_that_is_absent_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    for name in ("adamw_8bit", "paged_adamw_32bit", "lion_8bit"):
        with pytest.raises(ConfigError, match=rf"train\.optim: {name} needs bitsandbytes.*synpo\[qlora\]"):
            SynPOConfig(output_dir=str(tmp_path), optim=name)
    SynPOConfig(output_dir=str(tmp_path), optim="adafactor")


def test_they_are_those_that_transformers_takes_from_bitsandbytes() -> None:
    for name in OptimizerNames:
        handler = _OPTIMIZER_HANDLERS.get(name)
        assert of_bitsandbytes(name.value) == (handler is not None and "bitsandbytes" in handler.__name__), name


def kept(optimizer: Any, trained: list[Tensor]) -> int:
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tables = ("qmap1", "qmap2")  # one for all
    states = [s.items() for s in optimizer.state.values()]
    return sum(v.nbytes for items in states for k, v in items if isinstance(v, Tensor) and v.dim() and k not in tables)


def trained_for() -> list[Tensor]:
    return [torch.nn.Parameter(torch.randn(*shape)) for shape in ((300, 400), (50, 100), (70, 30), (90,))]


@pytest.mark.parametrize("name", BNB)
def test_what_bitsandbytes_keeps_is_what_is_counted(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'synpo[qlora]')")
    kind = {"adamw": "AdamW", "lion": "Lion", "ademamix": "AdEMAMix", "rmsprop": "RMSprop"}[name.split("_")[0]]
    trained = trained_for()
    optimizer = getattr(bnb.optim, kind)(trained, lr=1e-3, optim_bits=8 if "8bit" in name else 32)
    assert state_bytes(name, trained) == kept(optimizer, trained)


def test_factors_and_pages_are_what_is_counted() -> None:
    from transformers import Adafactor

    trained = trained_for()
    assert state_bytes("adafactor", trained) == kept(Adafactor(trained), trained)
    large, small = state_bytes("paged_adamw_32bit", trained[:1]), state_bytes("paged_adamw_32bit", trained[1:])
    assert (large, small) == (0, state_bytes("rmsprop_bnb", trained[1:]) * 2)


def test_packed_states_go_on_where_they_were(text_lm: CaptionModel, pairs_for: Any, trainer_for: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'synpo[qlora]')")
    data = pairs_for(text_lm, 4)
    start = {n: p.detach().clone() for n, p in text_lm.model.named_parameters() if p.requires_grad}
    shared = {"optim": "adamw_8bit", "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    rows = []
    for checkpoint in (None, "checkpoint-2"):
        with torch.no_grad():
            for name, parameter in text_lm.model.named_parameters():
                if name in start:
                    parameter.copy_(start[name])
        trainer = trainer_for(text_lm, data, "run", **shared)
        folder = Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=str(folder / checkpoint) if checkpoint else None)
        rows.append([json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()][:-1])
    assert [row["grad_norm"] for row in rows[0]] == [row["grad_norm"] for row in rows[1]]
    assert len(rows[0]) == 4 and len({row["loss"] for row in rows[0]}) == 4
