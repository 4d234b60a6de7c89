"""Contrastive sampling: the op against the same step written in torch, on this machine.

    python -m bench.contrast [--device cpu] [--shapes 8x32000 64x152064] [--dtype float32] [--seconds 20] [--json FILE]

Variants (all: alpha 0.5, temperature 0.5, top-k 32, top-p 0.9, one given uniform number a row):
    read       both inputs summed: what reading them costs here, the floor of an op without a cut-off
    op         synpo_kernels.contrastive_sample
    fallback   the same with backend="torch"
    plain      the usual sequence over the full vocabulary: mix, divide, softmax, top-k, renormalise, top-p
    lean       lerp, top-k on the raw logits, softmax over k
    warpers    Hugging Face logits processors, where transformers is installed
    flashinfer mix and divide in torch, then top_k_top_p_sampling_from_logits; on a GPU, where it is installed
and `+p`: with a plausibility cut-off of 0.1. A variant is timed only after it drew the op's tokens from the same logits and
random numbers (flashinfer takes none, so its tokens are only checked to be among those that were left); else its reason is
printed. Where `fallback` draws other tokens nothing is.
How times are taken: bench/measure.py. Milliseconds, median with 20th and 80th percentile. On a GPU a small batch takes longer
to launch than to compute, so there each variant is timed once more as a CUDA graph (`graph`): what the GPU itself does. Beside
it `/ floor`, over the bytes of both inputs at the rate of a large copy (bytes read and written) in the same run, and `/ read`,
over the graph of `read`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench import measure  # before torch
from bench.report import reason_of

import torch  # isort: skip
from torch import Tensor  # isort: skip

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


def flashinfer(expert: Tensor, amateur: Tensor, uniform: Tensor, plausibility: float) -> Tensor:
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    mixed = cut((1 + ALPHA) * expert - ALPHA * amateur, expert, plausibility).float() / TEMPERATURE
    return top_k_top_p_sampling_from_logits(mixed, TOP_K, TOP_P, filter_apply_order="top_k_first").long()


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
    for name, step in (("warpers", warpers), ("flashinfer", flashinfer)):
        if name == "flashinfer" and expert.device.type != "cuda":
            continue
        package = "transformers" if name == "warpers" else name
        if importlib.util.find_spec(package) is None:
            print(f"{name}: absent, {package} is not installed")
        else:
            steps[name] = step
    for plausibility, suffix in ((0.0, ""), (PLAUSIBILITY, "+p")):
        for name, step in steps.items():
            runs[name + suffix] = partial(step, expert, amateur, uniform, plausibility)
    return runs


def check(runs: dict[str, Callable[[], Tensor]], expert: Tensor, amateur: Tensor) -> dict[str, str]:
    """Why a peer is not timed, by name: it failed, or drew other tokens than the op. Exits where ours did either.

    One token in 200 may differ: the peers round in fp32, where a boundary can move.
    """
    reasons: dict[str, str] = {}
    for name, run in runs.items():
        if name == "read":
            continue
        suffix = "+p" if name.endswith("+p") else ""
        ours = name.startswith(("op", "fallback"))
        try:
            found = run()
        except Exception as error:  # whatever a foreign package raises is its reason
            if ours:
                raise
            reasons[name] = reason_of(error)
            continue
        if name.startswith("flashinfer"):
            mixed = cut((1 + ALPHA) * expert - ALPHA * amateur, expert, PLAUSIBILITY if suffix else 0.0)
            kept, ids = mixed.topk(TOP_K, -1)
            wrong, allowed = int((~((ids == found[:, None]) & (kept > -math.inf)).any(1)).sum()), 0
        else:
            wrong = int((found != runs["op" + suffix]()).sum())
            allowed = 0 if ours else math.ceil(len(found) / 200)
        if wrong > allowed:
            reasons[name] = f"drew {wrong} of {len(found)} tokens differently"
        if ours and name in reasons:
            raise SystemExit(f"{name} {reasons[name]}: no times are printed")
    return reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="BxV ...")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--only", nargs="+", help="measure these variants alone")
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    where = measure.machine(device)
    rate = measure.copy_rate(device, seconds=0.5)
    where["copy"] = f"{rate / 1e9:.1f} GB/s, bytes read and written"
    for key, value in where.items():
        print(f"{key:20} {value}")
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        batch, vocab = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        expert = 3 * torch.randn(batch, vocab, generator=generator)
        amateur = (expert + torch.randn(batch, vocab, generator=generator)).to(getattr(torch, args.dtype))
        expert, amateur = expert.to(device, amateur.dtype), amateur.to(device)
        uniform = torch.rand(batch, dtype=torch.float64, generator=generator).to(device)
        runs = variants(expert, amateur, uniform)
        reasons = check(runs, expert, amateur)
        for name, reason in reasons.items():
            print(f"not timed: {name}: {reason}")
            rows.append({"batch": batch, "vocab": vocab, "dtype": args.dtype, "variant": name, "reason": reason})
            del runs[name]
        if args.only:
            runs = {name: run for name, run in runs.items() if name in {"read", "op", *args.only}}
        for run in runs.values():
            run()
        timings = measure.interleave(runs, device=device, seconds=args.seconds, least=5, most=10_000)
        base, floor = timings["op"].p50, 1e3 * (expert.nbytes + amateur.nbytes) / rate
        print(f"\nB = {batch}, V = {vocab}, {args.dtype}; floor {floor:.4f} ms")
        print(
            f"{'variant':12} {'p50 ms':>10} {'p20':>9} {'p80':>9} {'/ op':>7} {'runs':>5}"
            + (f" {'graph':>9} {'/ floor':>8} {'/ read':>7}" if device.type == "cuda" else "")
        )
        read: float | None = None
        for name, took in timings.items():
            row = {"batch": batch, "vocab": vocab, "dtype": args.dtype, "variant": name, **asdict(took)}
            print(
                f"{name:12} {took.p50:10.3f} {took.p20:9.3f} {took.p80:9.3f} {took.p50 / base:7.1f} {took.runs:5d}",
                end="",
            )
            if name.startswith("flashinfer"):  # draws from torch's generator
                graph = None
            else:
                graph = measure.replayed(runs[name], device, seconds=args.seconds / 50)
            row |= {"floor_ms": floor, "graph": graph and asdict(graph)}
            if graph:
                read = graph.p50 if name == "read" else read
                print(f" {graph.p50:9.4f} {graph.p50 / floor:8.2f} {graph.p50 / read:7.2f}" if read else "", end="")
            print(flush=True)
            rows.append(row)
            if args.json:
                args.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
