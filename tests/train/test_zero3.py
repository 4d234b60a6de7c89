"""Two processes (gloo) under DeepSpeed's ZeRO-3, where it is installed: the losses and the weights of one process.

accelerate and transformers start DeepSpeed on accelerators only; the worker lifts those two gates and nothing else, so that all
that follows (partitioning while loading, training, saving, going on) runs as on GPUs.

The file is its own worker: `python test_zero3.py RANK FOLDER PORT CASE`; rank -1 is one process alone, without DeepSpeed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synpo.config import Config, ConfigError, build
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.records import Pair, write_records
from synpo.train.arguments import SynPOConfig
from synpo.train.run import train
from synpo.train.trainer import SynPOTrainer
from workers import free_port, run_workers

CASES: dict[str, dict[str, Any]] = {
    "synpo": {"lora": {"r": 4, "dropout": 0.0}},
    "dpo": {"lora": {"r": 4, "dropout": 0.0}},
    "simpo": {"lora": None},
}
SHARDED = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}

UNCLIPPED = {name: value for name, value in SHARDED.items() if name != "gradient_clipping"}


def config(folder: Path, loss_type: str, lora: Any, alone: bool) -> Config:
    """4 steps of 4 pairs, every second one saved."""
    values = {"loss_type": loss_type, "learning_rate": 1e-2, "num_train_epochs": 2, "disable_tqdm": True}
    values |= {"per_device_train_batch_size": 4 if alone else 2, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    values |= {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0}
    if not alone:
        values["deepspeed"] = str(folder / "zero3.json")
    return build(Config, {"model": {"path": str(folder / "model"), "device": "cpu"}, "lora": lora, "train": values})


def start_on_cpus() -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    check = SynPOConfig.__post_init__

    def checked(self: Any) -> None:
        self.use_cpu = False
        check(self)

    SynPOConfig.__post_init__ = checked  # type: ignore[method-assign]
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)


def work(rank: int, folder: Path, port: str, name: str) -> None:
    torch.set_num_threads(1)
    alone = rank < 0
    pairs = folder / "pairs.jsonl"
    settings = config(folder, name, CASES[name]["lora"], alone)
    try:
        if not alone:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            start_on_cpus()
        train(settings, None, pairs, folder / ("one" if alone else "two") / name)
        if alone or name != "synpo":
            return
        unclipped = build(Config, {"model": {"path": str(folder / "model")}, "train": {"deepspeed": UNCLIPPED}})
        with pytest.raises(ConfigError, match=r"train\.max_grad_norm = 1\.0 would not count"):
            train(unclipped, None, pairs, folder / "refused")
        with pytest.raises(ConfigError, match="a model that ZeRO-3 has partitioned cannot be stored"):
            train(config(folder, "dpo", None, alone), None, pairs, folder / "refused")
        step = SynPOTrainer.training_step

        def until_three(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        SynPOTrainer.training_step = until_three  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            train(settings, None, pairs, folder / "two" / "again")
        SynPOTrainer.training_step = step  # type: ignore[method-assign]
        train(settings, None, pairs, folder / "two" / "again")
    except BaseException:
        (folder / f"error-{name}-{rank}.txt").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed (pip install deepspeed)")
    folder = tmp_path_factory.mktemp("zero3")
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, folder / "model")
    rows = [Pair(f"p{i}", None, f"Say {i}.", "Yes. " * (1 + i % 3), "No! " * (1 + i % 2)) for i in range(8)]
    write_records(folder / "pairs.jsonl", rows)
    (folder / "zero3.json").write_text(json.dumps(SHARDED))
    for name in CASES:
        ends = run_workers(__file__, (0, 1, -1), str(folder), free_port(), name, timeout=180, DS_ACCELERATOR="cpu")
        assert ends == [0, 0, 0], "\n".join(p.read_text() for p in folder.glob("error-*.txt"))
    return folder


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_one_process(name: str, runs: Path) -> None:
    one, two = runs / "one" / name, runs / "two" / name
    assert len(losses(two)) == 4 and losses(two) == pytest.approx(losses(one), rel=1e-4, abs=1e-5)
    file = "adapter/adapter_model.safetensors" if CASES[name]["lora"] else "model/model.safetensors"
    expected, found = load_file(one / file), load_file(two / file)
    assert expected.keys() == found.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.timeout(600)
def test_an_interrupted_run_goes_on(runs: Path) -> None:
    assert losses(runs / "two" / "again") == losses(runs / "two" / "synpo")
    found, expected = (
        load_file(runs / "two" / name / "adapter" / "adapter_model.safetensors") for name in ("again", "synpo")
    )
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
