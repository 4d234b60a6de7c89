"""Two real processes (gloo) train as one does on the same global batch: DDP through the trainer and the command, FSDP2
around the objective.

The file is its own worker: `python test_distributed.py RANK FOLDER PORT` trains its half and saves what came of it. fp32
throughout, and sums in another order: losses agree to 1e-5, weights to 1e-5 of their change plus 3e-7 of their norm.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from synpo.config import Config, LoraSection
from synpo.config import build as build_config
from synpo.data.collate import PairCollator
from synpo.data.tokenize import EncodedPair
from synpo.model.adapter import CaptionModel
from synpo.model.tiny import byte_tokenizer, save, tiny_captioner, tiny_text_model
from synpo.model.vision import OneVision
from synpo.train.arguments import SynPOConfig
from synpo.train.lora import apply_lora
from synpo.train.objective import PairObjective
from synpo.train.run import train
from synpo.train.trainer import SynPOTrainer
from workers import free_port, run_workers

PROJECTIONS = r".*\.(q|v|down)_proj"
PAIRS, STEPS, RATE = 8, 2, 0.05

# name: (kind of model, what is trained, objective)
DDP = {
    "ddp-text-lora": ("text", "lora", "simpo"),
    "ddp-text-full": ("text", "full", "synpo"),
    "ddp-captioner-lora-dpo": ("captioner", "lora", "dpo"),
}
# FSDP2: the same, and which modules it gathers as one and frees after forward (`fully_sharded`)
FSDP = {
    "fsdp-text-lora": ("text", "lora", "simpo", "root-freed"),
    "fsdp-text-full": ("text", "full", "synpo", "root-kept"),
    "fsdp-text-full-freed": ("text", "full", "simpo", "root-freed"),
    "fsdp-text-full-tail": ("text", "full", "synpo", "tail-freed"),
    "fsdp-text-lora-on-head": ("text", "lora-head", "simpo", "root-kept"),
    "fsdp-captioner-lora-dpo": ("captioner", "lora", "dpo", "root-freed"),
    "fsdp-captioner-full": ("captioner", "full", "synpo", "tail-freed"),
}
Result = dict[str, Any]


def build(kind: str, trained: str) -> CaptionModel:
    tokenizer = byte_tokenizer()
    if kind == "text":
        lm = CaptionModel(tiny_text_model(tokenizer), tokenizer, None)
    else:
        model = tiny_captioner(tokenizer)
        lm = CaptionModel(model, tokenizer, OneVision(model, tokenizer, (0.5,) * 3, (0.5,) * 3))
    if trained == "full":
        lm.model.requires_grad_(True)
        return lm
    torch.manual_seed(0)
    targets = PROJECTIONS + ("|lm_head" if trained == "lora-head" else "")
    apply_lora(lm, LoraSection(r=4, alpha=8, dropout=0.0, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return lm


def pairs_of(lm: CaptionModel) -> list[EncodedPair]:
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for i in range(PAIRS):
        frames = torch.randint(0, 256, (1 + i % 3, 3, 48, 48), dtype=torch.uint8, generator=generator)
        prompt = lm.prompt("Describe." + " Please." * (i % 2), frames if lm.sees_video else None)
        chosen, rejected = lm.completion("A red circle" * (1 + i % 3)), lm.completion("Nothing" + "." * i)
        pairs.append(EncodedPair(f"pair-{i}", prompt.input_ids, chosen, rejected, prompt.vision))
    return pairs


def full(parameter: Any) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def weights(lm: CaptionModel) -> dict[str, Tensor]:
    return {n: full(p) for n, p in lm.model.named_parameters() if p.requires_grad}


def through_trainer(case: tuple[str, str, str], folder: Path, accumulation: int) -> Result:
    """Two epochs of one step each: all pairs, two at a time, so that every order of them is the same step."""
    kind, trained, loss_type = case
    lm = build(kind, trained)
    args = SynPOConfig(
        output_dir=str(folder),
        loss_type=loss_type,
        loss_backend="chunked",
        fused_lora=kind == "captioner",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="sgd",
        max_grad_norm=0.0,
        num_train_epochs=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SynPOTrainer(lm, args, pairs_of(lm))
    trainer.train()
    rows = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()][:STEPS]
    return {
        "weights": weights(lm),
        "losses": [row["loss"] for row in rows],
        "margins": [row["synpo/margin"] for row in rows],
    }


def through_command(folder: Path, accumulation: int) -> Result:
    """As `through_trainer`, by `synpo train`, with two pairs held out: what the adapter and metrics.json hold."""
    values = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "sgd"}
    values |= {"max_grad_norm": 0.0, "num_train_epochs": STEPS, "per_device_train_batch_size": 2}
    values |= {"gradient_accumulation_steps": accumulation, "disable_tqdm": True, "loss_type": "simpo"}
    values |= {"held_out": 2, "per_device_eval_batch_size": 1, "samples": 0}
    model = {"path": str(folder.parent / "model"), "device": "cpu"}
    config = build_config(Config, {"model": model, "lora": {"r": 4, "dropout": 0.0}, "train": values})
    result = train(config, None, folder.parent / "pairs.jsonl", folder)
    rows = [json.loads(line) for line in result.log.read_text().splitlines()]
    return {
        "weights": load_file(result.adapter / "adapter_model.safetensors"),
        "losses": [row["loss"] for row in rows if "loss" in row],
        "evaluations": [row["eval_synpo/margin"] for row in rows if "eval_loss" in row],
        "steps": [row["step"] for row in rows],
        "last": result.metrics["last"]["synpo/margin"],
        "warnings": len(result.warnings),
    }


def write_inputs(folder: Path) -> None:
    """The model and the pairs of `through_command`."""
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, folder / "model")
    rows = [{"prompt": f"Say {i}", "chosen": "A" * (1 + i), "rejected": "No."} for i in range(PAIRS + 2)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def around_objective(
    case: tuple[str, str, str, str], share: slice, shard: Callable[[CaptionModel], None] | None
) -> Result:
    """`STEPS` steps of gradient descent on `share` of the pairs, in two micro-batches; as a training loop would."""
    kind, trained, loss_type, _ = case
    lm = build(kind, trained)
    objective = PairObjective(lm, loss_type, {}, backend="chunked")
    batches = [PairCollator(lm.pad_token_id)(part) for part in halves(pairs_of(lm)[share])]
    if shard is not None:
        shard(lm)
    optimizer = torch.optim.SGD([p for p in lm.model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        total = torch.zeros(())
        for last, batch in enumerate(batches):
            if shard is not None:
                lm.model.set_requires_gradient_sync(bool(last))
            loss = objective(lm.model, batch).loss / len(batches)
            loss.backward()
            total += loss.detach()
        if shard is not None:
            torch.distributed.all_reduce(total)
            total /= torch.distributed.get_world_size()
        losses.append(float(total))
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(lm), "losses": losses}


def halves(pairs: list[EncodedPair]) -> list[list[EncodedPair]]:
    return [pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]]


def fully_sharded(units: str) -> Callable[[CaptionModel], None]:
    from torch.distributed.fsdp import fully_shard

    def shard(lm: CaptionModel) -> None:
        layers = [m for m in lm.model.modules() if type(m).__name__.endswith(("DecoderLayer", "EncoderLayer"))]
        assert len(layers) == (4 if lm.sees_video else 2)
        for layer in layers:
            fully_shard(layer)
        if units == "tail-freed":  # as accelerate has it, but for freeing the last unit
            fully_shard(lm.base.get_input_embeddings())
            fully_shard([lm.base.get_decoder().norm, lm.base.get_output_embeddings()], reshard_after_forward=True)
        fully_shard(lm.model, reshard_after_forward=units == "root-freed")

    return shard


def work(rank: int, folder: Path, port: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    results: dict[str, Any] = {}
    share = slice(0, PAIRS // 2) if rank == 0 else slice(PAIRS // 2, PAIRS)
    try:
        for name, case in DDP.items():
            results[name] = through_trainer(case, folder / name, accumulation=2)
        results["command"] = through_command(folder / "command", accumulation=2)
        for name, sharded in FSDP.items():
            results[name] = around_objective(sharded, share, fully_sharded(sharded[3]))
    except Exception:
        results["error"] = traceback.format_exc()
    torch.save(results, folder / f"rank-{rank}.pt")
    os._exit(0)  # without the farewell of a process group whose other half may be gone


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """Results of both processes by case. One start serves all."""
    folder = tmp_path_factory.mktemp("gloo")
    write_inputs(folder)
    run_workers(__file__, range(2), str(folder), free_port(), timeout=280)
    return [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in range(2)]


def compare(two: list[dict[str, Result]], name: str, one: Result, start: dict[str, Tensor]) -> None:
    for found in two:
        if name not in found:
            pytest.fail(found["error"], pytrace=False)
        result = found[name]
        for key in one.keys() - {"weights"}:
            assert result[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
        assert result["weights"].keys() == one["weights"].keys()
        for parameter, expected in one["weights"].items():
            moved = (expected - start[parameter]).norm()
            error = (result["weights"][parameter] - expected).norm()
            assert error <= 1e-5 * moved + 3e-7 * expected.norm() + 1e-10, (parameter, float(error), float(moved))
    assert any(not torch.equal(one["weights"][n], start[n]) for n in start)


@pytest.mark.parametrize("name", DDP)
def test_ddp_through_the_trainer(name: str, two: list[dict[str, Result]], tmp_path: Path) -> None:
    one = through_trainer(DDP[name], tmp_path, accumulation=4)
    compare(two, name, one, weights(build(*DDP[name][:2])))


def test_the_command_with_two_processes(two: list[dict[str, Result]], tmp_path: Path) -> None:
    """The first one writes the run's folder, and both return what it wrote."""
    write_inputs(tmp_path)
    one = through_command(tmp_path / "run", accumulation=4)
    compare(two, "command", one, dict.fromkeys(one["weights"], torch.zeros(())))


@pytest.mark.parametrize("name", FSDP)
def test_fsdp2_around_the_objective(name: str, two: list[dict[str, Result]]) -> None:
    one = around_objective(FSDP[name], slice(0, PAIRS), None)
    compare(two, name, one, weights(build(*FSDP[name][:2])))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
