"""Two processes (gloo) under FSDP2, through `train()`: a killed run goes on with the losses of one that was left alone.

accelerate shards models on accelerators only: `AcceleratorState` looks for FSDP nowhere else. Users are told so; here the worker
lifts that gate and nothing else, so that all that follows (sharding, saving, loading, ours and theirs) runs as on GPUs.

The file is its own worker: `python test_fsdp.py RANK FOLDER PORT PART`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import state as accelerate_state
from safetensors.torch import load_file

from synpo.config import Config, ConfigError, build
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.train.checkpoint import fault
from synpo.train.run import train
from synpo.train.trainer import SynPOTrainer
from workers import free_port, run_workers

CASES: dict[str, dict[str, Any]] = {
    "whole": {"lora": None, "loss_type": "dpo", "state": "FULL_STATE_DICT"},
    "adapter": {"lora": {"r": 4}, "loss_type": "simpo", "state": "SHARDED_STATE_DICT"},
}
EPOCHS, PAIRS, HELD_OUT = 2, 12, 4


class Killed(BaseException):
    pass


def config(folder: Path, lora: Any, loss_type: str, state: str) -> Config:
    """4 steps: every second is saved and evaluated, with answers generated."""
    values = {"loss_type": loss_type, "learning_rate": 1e-2, "num_train_epochs": EPOCHS, "disable_tqdm": True}
    values |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_strategy": "steps"}
    values |= {"save_steps": 2, "held_out": HELD_OUT, "samples": 1, "sample_tokens": 6}
    values |= {"fsdp": "full_shard", "fsdp_config": {"state_dict_type": state, "version": 2}}
    return build(Config, {"model": {"path": str(folder / "model"), "device": "cpu"}, "lora": lora, "train": values})


def shard_on_cpus() -> None:
    real = accelerate_state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, accelerate_state.DistributedType.FSDP
            accelerate_state.PartialState._shared_state["distributed_type"] = self.distributed_type

    accelerate_state.AcceleratorState.__init__ = init


def die_at(step: int, how: Any) -> Any:
    """Patch training so that it calls `how` before step `step` + 1; returns what undoes it."""
    real = SynPOTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            how()
        return real(self, *args, **kwargs)

    SynPOTrainer.training_step = training_step  # type: ignore[method-assign]
    return lambda: setattr(SynPOTrainer, "training_step", real)


def leave() -> None:
    raise Killed


def work(rank: int, folder: Path, port: str, part: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    try:
        if part == "first":
            with pytest.raises(ConfigError) as refused:
                train(config(folder, **CASES["whole"]), None, folder / "pairs.jsonl", folder / "refused")
            (folder / f"refused-{rank}.txt").write_text(str(refused.value))
        shard_on_cpus()
        if part == "first":
            for name, case in CASES.items():
                train(config(folder, **case), None, folder / "pairs.jsonl", folder / name)
            undo = die_at(3, leave)
            with pytest.raises(Killed):
                train(config(folder, **CASES["adapter"]), None, folder / "pairs.jsonl", folder / "adapter-killed")
            undo()
            die_at(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
            train(config(folder, **CASES["whole"]), None, folder / "pairs.jsonl", folder / "whole-killed")
        for name, case in CASES.items():
            train(config(folder, **case), None, folder / "pairs.jsonl", folder / f"{name}-killed")
    except BaseException:
        (folder / f"error-{part}-{rank}.txt").write_text(traceback.format_exc())
    os._exit(0)  # without the farewell of a process group whose other half may be gone


def start(folder: Path, part: str) -> list[int]:
    """Exit codes of both processes."""
    return run_workers(__file__, range(2), str(folder), free_port(), part, timeout=280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case left alone (NAME) and killed at step 3 and gone on with (NAME-killed)."""
    root = tmp_path_factory.mktemp("fsdp")
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, root / "model")
    rows = [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": f"No{'.' * i}"} for i in range(PAIRS)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes = start(root, "first")
    for path in root.glob("error-*"):
        pytest.fail(path.read_text(), pytrace=False)
    assert codes == [-signal.SIGKILL] * 2
    for name in CASES:
        killed = root / f"{name}-killed"
        assert not (killed / "metrics.json").exists() and fault(killed / "checkpoint-2") is None
        (killed / "train_log.jsonl").rename(root / f"{name}-before.jsonl")
        (killed / "train_log.jsonl").write_bytes((root / f"{name}-before.jsonl").read_bytes())
    assert start(root, "again") == [0, 0]
    for path in root.glob("error-*"):
        pytest.fail(path.read_text(), pytrace=False)
    return root


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_as_if_it_had_not_been(name: str, folder: Path) -> None:
    whole, killed = (
        [json.loads(line) for line in (folder / run / "train_log.jsonl").read_text().splitlines()]
        for run in (name, f"{name}-killed")
    )
    before = (folder / f"{name}-before.jsonl").read_text().splitlines()
    assert max(json.loads(line)["step"] for line in before) == 3  # beyond the checkpoint of step 2
    assert [row["step"] for row in killed if "loss" in row] == [1, 2, 3, 4]
    for row, other in zip(killed, whole, strict=True):
        for key in ("step", "loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/margins"):
            assert row.get(key) == other.get(key), (row["step"], key)
        assert row.get("eval_synpo/repetition") == other.get("eval_synpo/repetition")
    file = {"whole": "model/model.safetensors", "adapter": "adapter/adapter_model.safetensors"}[name]
    ours, theirs = (load_file(folder / run / file) for run in (f"{name}-killed", name))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in theirs)
    saved = {p.name for p in (folder / name / "checkpoint-4").iterdir()}
    assert saved >= ({"pytorch_model_fsdp.bin"} if name == "whole" else {"pytorch_model_fsdp_0", "optimizer_0"})


def test_checkpoints_of_shards_that_are_cut_are_passed_over(folder: Path) -> None:
    whole, adapter = folder / "whole" / "checkpoint-4", folder / "adapter" / "checkpoint-4"
    assert fault(whole) is None and fault(adapter) is None
    content = (whole / "optimizer.bin").read_bytes()
    (whole / "optimizer.bin").write_bytes(content[: len(content) // 2])
    assert fault(whole) == "optimizer.bin is truncated or not readable"
    (adapter / "pytorch_model_fsdp_0" / ".metadata").unlink()
    assert fault(adapter) == "pytorch_model_fsdp_0 was not written to its end"


def test_where_accelerate_does_not_shard_it_is_said(folder: Path) -> None:
    """It would train as DDP."""
    for rank in range(2):
        said = (folder / f"refused-{rank}.txt").read_text()
        assert "train.fsdp: accelerate shards a model over GPUs only; on cpu it would train a whole copy" in said


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
