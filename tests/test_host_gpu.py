"""Training and captioning on a CUDA device made of host memory (tests/support/host_gpu): every tensor where it belongs, the same
results as on the CPU, the host waiting no more often than it says, and `synpo plan` against what tensors held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

import host_gpu
from made_videos import write_video
from synpo.config import Config, build
from synpo.model.tiny import byte_tokenizer, save
from synpo.records import Pair, write_records
from synpo.train.run import train

REASON = host_gpu.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

FRAMES = {"fps": 1, "minimum": 2, "maximum": 2}
TRAIN = {
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_liger_kernel": False,  # where it is installed, its kernels would take a minute in the interpreter
}


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    host_gpu.build()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """videos/ with two clips, and pairs.jsonl: six pairs about them."""
    (tmp_path / "videos").mkdir()
    for k in range(2):
        write_video(tmp_path / "videos" / f"{k}.mp4", 90 * k)
    pairs = [Pair(f"p{i}", f"{i % 2}.mp4", "Describe.", f"A bar falls {i}.", f"It rains {i} times.") for i in range(6)]
    write_records(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


def on_device(*command: str) -> str:
    """What `python -m host_gpu COMMAND` prints."""
    started = [sys.executable, "-m", "host_gpu", *command]
    done = subprocess.run(started, env=host_gpu.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def found(function: str, *arguments: Any) -> Any:
    """The result of a function of host_gpu/runs.py on the device."""
    given = [a if isinstance(a, str) else json.dumps(a) if isinstance(a, dict) else str(a) for a in arguments]
    return json.loads(on_device(str(host_gpu.FOLDER / "runs.py"), function, *given).splitlines()[-1])


def test_the_device_refuses_what_cuda_does() -> None:
    apart, wait = "Expected all tensors to be on the same device", "called a synchronizing CUDA operation"
    said = found("checks")
    assert len(said) == 8
    assert all(text.startswith(apart) for text in said[:3]) and all(text.startswith(wait) for text in said[3:7])
    assert said[7].startswith("Expected a 'cuda' device type for generator")


@pytest.mark.parametrize(
    ("extra", "waits"),
    [
        ({}, 2),  # are there as many features as placeholders; is the loss finite
        (
            {"loss_type": "dpo", "prefix_sharing": False, "bf16": True},
            7,
        ),  # the reference's forward, transformers' masks
        ({"lora": None, "activation_checkpointing": True}, 2),
        ({"dtype": "bfloat16"}, 2),  # on a GPU that is autocast
    ],
    ids=["synpo", "dpo", "whole", "half"],
)
def test_a_run_learns_what_it_learns_on_the_cpu(
    extra: dict[str, Any], waits: int, data: Path, tiny_captioner_path: Path
) -> None:
    extra = dict(extra)
    lora = extra.pop("lora", {"r": 4, "alpha": 8, "dropout": 0.0})
    model = {"path": str(tiny_captioner_path), "dtype": extra.pop("dtype", "auto")}
    values = {"model": model, "frames": FRAMES, "lora": lora, "train": TRAIN | extra}
    there = found("train", values, data / "videos", data / "pairs.jsonl", data / "there")
    half = model["dtype"] == "bfloat16"
    chosen = json.loads((data / "there" / "config.json").read_text())["chosen"]
    assert chosen["tf32"] and chosen.get("bf16", half) == half
    here = values | {"model": model | {"device": "cpu"}, "train": TRAIN | extra | ({"bf16": True} if half else {})}
    train(build(Config, here), data / "videos", data / "pairs.jsonl", data / "here")
    log = [json.loads(line) for line in (data / "here" / "train_log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert there["losses"] == pytest.approx(losses, rel=2e-2 if half or "bf16" in extra else 1e-4)
    assert len(losses) == 3 and losses[0] != losses[-1]
    assert there["waits"] == [waits] * 3
    assert there["calls"] == [2 if half else 0] * 3  # one a layer for both pairs of a row


def test_captions_are_those_of_the_cpu(data: Path, tiny_captioner_path: Path) -> None:
    """Of every stage of `synpo pairs`, second looks included, on the second device."""
    for device in ("cuda:1", "cpu"):
        out = data / device.replace(":", "") / "pairs.jsonl"
        common = ["--model", str(tiny_captioner_path), "--device", device, "--videos", str(data / "videos")]
        small = ["candidates=2", "batch_size=4", "clip_seconds=1", "margin=0.001", "clip_sampling.max_new_tokens=8"]
        small += ["candidate_sampling.max_new_tokens=8", "candidate_sampling.repetition_penalty=1.2"]
        flags = [flag for setting in small for flag in ("--set", f"pairs.{setting}")]
        on_device("-m", "synpo", "pairs", *common, "--pairs", str(out), *flags)
    for stage in ("clip_captions", "candidates"):
        there, here = (
            [
                json.loads(line)
                for line in (data / folder / "pairs.jsonl.work" / f"{stage}.jsonl").read_text().splitlines()
            ]
            for folder in ("cuda1", "cpu")
        )
        assert len(there) >= 4 and [row["text"] for row in there] == [row["text"] for row in here]
        for row, other in zip(there, here):
            assert row["logp"] == pytest.approx(other["logp"], rel=1e-4)


@pytest.mark.parametrize(
    ("vocabulary", "layers", "lora", "extra"),
    [
        (1000, 6, True, {"prefix_sharing": False, "bf16": True}),
        (1000, 6, True, {"activation_checkpointing": True}),
        (1000, 6, True, {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}),
        (20_000, 2, False, {"gradient_accumulation_steps": 2, "max_steps": 2}),
    ],
    ids=["padded", "shared", "offloaded", "whole"],
)
def test_the_plan_against_the_peak(
    vocabulary: int, layers: int, lora: bool, extra: dict[str, Any], tmp_path: Path
) -> None:
    """All pairs as long as the longest. Never less than what tensors held, and no more than 15 % above."""
    tokenizer = byte_tokenizer(["a"])
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2Config(vocab_size=vocabulary, num_hidden_layers=layers, max_position_embeddings=2048, **sizes, **ids)
    save(Qwen2ForCausalLM(config), tokenizer, tmp_path / "model")
    rows = [{"prompt": "b" * 50 * layers, "chosen": f"{i}" + "c" * 80, "rejected": "d" * 60} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model": {"path": str(tmp_path / "model")},
        "lora": {"r": 16, "alpha": 16, "dropout": 0.0} if lora else None,
        "train": TRAIN | {"loss_backend": "chunked"} | extra,  # the kernels are slow in the interpreter
    }
    told = found("plan_and_train", values, tmp_path / "pairs.jsonl", tmp_path / "run")
    held = max(told["peaks"])
    assert held <= told["plan"]["total"] <= 1.15 * held, told


def test_the_loss_at_full_size_holds_little() -> None:
    """8192 x {152064, 32000} x 3584 in bfloat16, frozen head: the workspace, whatever V is."""
    peaks = found("loss_peaks")
    assert len(peaks) == 4
    for name, (forward, backward) in peaks.items():
        workspace = 16 if name.startswith("low") else 128
        assert max(forward, backward) <= (workspace + 1) << 20, (name, forward, backward)
