"""What tests/test_host_gpu.py runs on the device: python -m host_gpu runs.py FUNCTION [ARGUMENT...] prints JSON at its end."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from host_gpu.patches import device
from synpo.config import Config, build


def checks() -> list[str]:
    """What the device refuses, in its words."""
    there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    torch.cuda.set_sync_debug_mode("error")
    refused: list[Callable[[], Any]] = [
        lambda: there + here,
        lambda: there + there.to("cuda:1"),
        lambda: torch.nn.functional.linear(there, here),
        lambda: there.sum().item(),
        lambda: there[there > 0],
        lambda: here.to("cuda"),
        lambda: there.cpu(),
        lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    ]
    said = []
    for attempt in refused:
        try:
            attempt()
        except RuntimeError as error:
            said.append(str(error).splitlines()[0])
    assert (
        bool(torch.empty(5, device="cuda").isnan().all().cpu)
        and here.pin_memory().to("cuda", non_blocking=True).is_cuda
    )
    return said


def train(values: str, videos: str, pairs: str, output: str) -> dict[str, Any]:
    """A training run: its losses, and in every micro-batch waits of the host, attention over runs and bytes at the peak."""
    from torch.nn.attention import varlen

    from synpo.train.run import train
    from synpo.train.trainer import SynPOTrainer

    step, waits, peaks, calls = SynPOTrainer.training_step, [], [], []
    kernel: Any = varlen.varlen_attn

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        before, called = device.waits(), kernel.calls
        torch.cuda.reset_peak_memory_stats()
        result = step(self, *args, **options)
        waits.append(device.waits() - before)
        peaks.append(torch.cuda.max_memory_allocated())
        calls.append(kernel.calls - called)
        return result

    SynPOTrainer.training_step = watched  # type: ignore[method-assign]
    config = build(Config, json.loads(values))
    train(config, Path(videos) if videos else None, Path(pairs), Path(output))
    log = [json.loads(line) for line in Path(output, "train_log.jsonl").read_text().splitlines()]
    return {"waits": waits, "peaks": peaks, "calls": calls, "losses": [row["loss"] for row in log if "loss" in row]}


def plan_and_train(values: str, pairs: str, output: str) -> dict[str, Any]:
    """As `train`; and `plan`: bytes that `synpo plan` expects of the configured layout, part by part."""
    from synpo.train.memory import RESERVE
    from synpo.train.plan import plan

    found = plan(build(Config, json.loads(values)), None, Path(pairs))
    (estimate,) = [e for e in found.estimates if e.configured]
    expected = dataclasses.asdict(estimate.memory) | {"total": estimate.total - RESERVE}
    return train(values, "", pairs, output) | {"plan": expected}


def settled(*tensors: torch.Tensor) -> int:
    """Bytes held once there is nothing but these; threads of autograd let go a moment after they have answered."""
    expected = sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)
    for _ in range(1000):
        if torch.cuda.memory_allocated() == expected:
            return expected
        time.sleep(0.01)
    raise AssertionError(f"{torch.cuda.memory_allocated()} bytes are held, {expected} by what should be there")


def loss_peaks() -> dict[str, list[int]]:
    """Bytes at the peak of a forward and a backward pass at full size, beyond inputs and the gradient of the hidden states,
    whose memory the forward pass takes already: it finds the gradient of each token's log-probability.

    What is held follows from shapes: the kernels and the products with W write nothing here.
    """
    from triton.runtime import interpreter

    from synpo_kernels import FusedLinearSynPOLoss

    interpreter.GridExecutor.__call__ = lambda self, *arguments, **options: None
    torch.mm = lambda a, b, *, out, out_dtype=None: out  # type: ignore[assignment]
    torch.addmm = lambda total, a, b, *, out_dtype, out: out  # type: ignore[assignment]
    peaks = {}
    for vocabulary in (152_064, 32_000):
        weight = torch.empty(vocabulary, 3584, dtype=torch.bfloat16, device="cuda")
        hidden = torch.zeros(8192, 3584, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        labels = torch.zeros(8192, dtype=torch.long, device="cuda")
        bounds = torch.arange(0, 8193, 1024, device="cuda")
        for memory in ("default", "low"):
            before = settled(weight, hidden, labels, bounds)
            torch.cuda.reset_peak_memory_stats()
            loss = FusedLinearSynPOLoss(memory=memory, ignore_index=None)(
                hidden, weight, labels, cu_seqlens=bounds
            ).loss
            forward = torch.cuda.max_memory_allocated() - before - hidden.nbytes
            torch.cuda.reset_peak_memory_stats()
            (gradient,) = torch.autograd.grad(loss, hidden)
            backward = torch.cuda.max_memory_allocated() - before - gradient.nbytes
            peaks[f"{memory} {vocabulary}"] = [forward, backward]
            del loss, gradient
    return peaks


if __name__ == "__main__":
    result = globals()[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(result))
