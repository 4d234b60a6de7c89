"""Layers made otherwise than the model's own code makes them: the same training, and runs that go on bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_with_dropout_goes_on_where_it_was(
    checkpointing: bool, text_lm: Any, pairs_for: Any, trainer_for: Any
) -> None:
    """Bit by bit, under autocast; and it learns what PEFT's layers learn, whose random numbers are the same."""
    lm = text_lm
    for module in lm.model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = nn.Dropout(0.2)
    data = pairs_for(lm, 4)
    start = {n: p.detach().clone() for n, p in lm.model.named_parameters() if p.requires_grad}
    shared = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "bf16": True}
    rows: dict[str, list[Any]] = {}
    for name, fused, resume in (("peft", False, None), ("ours", True, None), ("again", True, "checkpoint-2")):
        with torch.no_grad():
            for parameter, value in lm.model.named_parameters():
                if parameter in start:
                    value.copy_(start[parameter])
        trainer = trainer_for(
            lm,
            data,
            "run",
            fused_lora=fused,
            activation_checkpointing=checkpointing,
            **shared,
        )
        folder = Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
        lines = (folder / "train_log.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines][:-1]
    for name in ("loss", "grad_norm", "synpo/chosen_logp"):
        ours, again, peft = ([row[name] for row in rows[run]] for run in ("ours", "again", "peft"))
        assert ours == again and len(set(ours)) == 4
        assert ours == pytest.approx(peft, rel=5e-2) and ours != peft
