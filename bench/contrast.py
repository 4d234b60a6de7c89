"""Contrastive sampling: the op against the same step written in torch, on this machine.

    python bench/contrast.py [--shapes 8x32000 64x152064] [--dtype float32] [--seconds 20] [--json FILE]

Variants (all: alpha 0.5, temperature 0.5, top-k 32, top-p 0.9, one given uniform number a row):
    read       both inputs summed: what reading them costs here, the floor of an op without a cut-off
    op         synpo_kernels.contrastive_sample
    fallback   the same with backend="torch"
    plain      the usual sequence over the full vocabulary: mix, divide, softmax, top-k, renormalise, top-p
    lean       lerp, top-k on the raw logits, softmax over k
    warpers    Hugging Face logits processors, where transformers is installed
and `+p`: with a plausibility cut-off of 0.1. A time is printed only after every variant drew the op's tokens from the same
logits. Variants take turns, so that a busy machine is busy for all of them; medians with 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# A bf16 or fp16 op in oneDNN may pick AMX where a virtual machine advertises it and its host refuses it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

import torch
from torch import Tensor

from synpo_kernels import _ext
from synpo_kernels.contrast import contrastive_sample

ALPHA, TEMPERATURE, TOP_K, TOP_P, PLAUSIBILITY = 0.5, 0.5, 32, 0.9, 0.1
SHAPES = ("8x32000", "64x32000", "8x152064", "64x152064")


def draw(probs: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (B,) from probabilities (B, K) in descending order, by inverse CDF."""
    mass = probs.cumsum(-1)
    return ids.gather(1, (mass > uniform[:, None] * mass[:, -1:]).int().argmax(-1, keepdim=True))[:, 0]


def nucleus(probs: Tensor) -> Tensor:
    return torch.where(probs.cumsum(-1) - probs >= TOP_P, 0.0, probs)


def cut(logits: Tensor, expert: Tensor, plausibility: float) -> Tensor:
    if plausibility == 0:
        return logits
    return logits.masked_fill(expert < expert.amax(-1, keepdim=True) + math.log(plausibility), -math.inf)


def plain(expert: Tensor, amateur: Tensor, uniform: Tensor, plausibility: float) -> Tensor:
    mixed = cut((1 + ALPHA) * expert - ALPHA * amateur, expert, plausibility)
    probs = torch.softmax(mixed / TEMPERATURE, -1)
    kept, ids = probs.topk(TOP_K, -1)
    kept = nucleus(kept / kept.sum(-1, keepdim=True))
    return draw(kept / kept.sum(-1, keepdim=True), ids, uniform)


def lean(expert: Tensor, amateur: Tensor, uniform: Tensor, plausibility: float) -> Tensor:
    kept, ids = cut(torch.lerp(expert, amateur, -ALPHA), expert, plausibility).topk(TOP_K, -1)
    return draw(nucleus(torch.softmax(kept.double() / TEMPERATURE, -1)), ids, uniform)


def warpers(expert: Tensor, amateur: Tensor, uniform: Tensor, plausibility: float) -> Tensor:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    mixed = cut((1 + ALPHA) * expert - ALPHA * amateur, expert, plausibility).float()
    for warper in (TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P)):
        mixed = warper(None, mixed)
    kept, ids = torch.softmax(mixed, -1).topk(TOP_K, -1)
    return draw(kept, ids, uniform)


def op(expert: Tensor, amateur: Tensor, uniform: Tensor, plausibility: float, backend: str = "auto") -> Tensor:
    tokens, _ = contrastive_sample(
        expert,
        amateur,
        alpha=ALPHA,
        plausibility=plausibility,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        top_p=TOP_P,
        uniform=uniform,
        backend=backend,
    )
    return tokens


def variants(expert: Tensor, amateur: Tensor, uniform: Tensor) -> dict[str, Callable[[], Tensor]]:
    runs: dict[str, Callable[[], Tensor]] = {"read": lambda: expert.sum() + amateur.sum()}
    steps: dict[str, Callable[..., Tensor]] = {
        "op": op,
        "fallback": partial(op, backend="torch"),
        "plain": plain,
        "lean": lean,
    }
    try:
        import transformers  # noqa: F401

        steps["warpers"] = warpers
    except ImportError:
        print("transformers is not installed: no Hugging Face warpers in this run")
    for plausibility, suffix in ((0.0, ""), (PLAUSIBILITY, "+p")):
        for name, step in steps.items():
            runs[name + suffix] = partial(step, expert, amateur, uniform, plausibility)
    return runs


def check(runs: dict[str, Callable[[], Tensor]]) -> None:
    """Every variant draws the op's tokens. One in 200 may differ: the peers round in fp32, where a boundary can move."""
    for name, run in runs.items():
        if name == "read":
            continue
        expected = runs["op+p" if name.endswith("+p") else "op"]()
        wrong = int((run() != expected).sum())
        allowed = 0 if name.startswith(("op", "fallback")) else math.ceil(expected.numel() / 200)
        if wrong > allowed:
            raise SystemExit(f"{name} drew {wrong} of {expected.numel()} tokens differently: no times are printed")


def measure(runs: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call, variants interleaved, until `seconds` are over (at least 5 rounds)."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["op"]) < 5:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def machine() -> dict[str, str]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "extension": _ext.describe(),
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="BxV ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--only", nargs="+", help="measure these variants alone")
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    where = machine()
    for key, value in where.items():
        print(f"{key:10} {value}")
    rows = []
    for shape in args.shapes:
        batch, vocab = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        expert = 3 * torch.randn(batch, vocab, generator=generator)
        amateur = (expert + torch.randn(batch, vocab, generator=generator)).to(getattr(torch, args.dtype))
        expert = expert.to(amateur.dtype)
        uniform = torch.rand(batch, dtype=torch.float64, generator=generator)
        runs = variants(expert, amateur, uniform)
        check(runs)
        if args.only:
            runs = {name: run for name, run in runs.items() if name in {"read", "op", *args.only}}
        times = measure(runs, args.seconds)
        base = statistics.median(times["op"])
        print(f"\nB = {batch}, V = {vocab}, {args.dtype}")
        print(f"{'variant':12} {'median ms':>10} {'p20':>9} {'p80':>9} {'/ op':>7} {'runs':>5}")
        for name, values in times.items():
            low, *_, high = statistics.quantiles(values, n=5)
            median = statistics.median(values)
            rows.append({"batch": batch, "vocab": vocab, "dtype": args.dtype, "variant": name, "median_ms": median})
            rows[-1] |= {"p20_ms": low, "p80_ms": high, "runs": len(values)}
            print(f"{name:12} {median:10.3f} {low:9.3f} {high:9.3f} {median / base:7.1f} {len(values):5d}")
    if args.json:
        args.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
