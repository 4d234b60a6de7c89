"""Which tile of the exponential kernel is fastest on this GPU, and whether the library's product plus one pass beats it.

    python -m bench.tune --out tune.json          some two minutes on a GPU
    TRITON_INTERPRET=1 python -m bench.tune --device cpu --out tune.json      rehearsal on tiny shapes: no figure counts

One slice of the vocabulary at each shape, every candidate of `kernels/configs.py` and its neighbours: tiles through pointers
and through descriptors; and `library`: torch's product into fp32 logits, then one kernel that turns them into exponentials.
A candidate that does not compile, does not fit or is wrong is listed with the reason and does not count. Prints the entry
of `CHIPS` to paste for this chip.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

from bench.measure import interleave, machine  # before torch

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from synpo_kernels.head import Head
from synpo_kernels.kernels import exp_tile
from synpo_kernels.kernels.configs import TileConfig

SHAPES = ((8192, 152_064, 3584), (1024, 152_064, 3584), (1024, 32_000, 4096))  # N, V, D
TINY = ((33, 72, 48), (16, 32, 16))
POINTERS = (
    TileConfig(128, 128, 32, 8, 4, 4),
    TileConfig(128, 256, 32, 8, 8, 3),
    TileConfig(128, 128, 64, 8, 4, 3),
    TileConfig(128, 128, 64, 8, 8, 4),
    TileConfig(128, 256, 64, 8, 8, 3),
    TileConfig(128, 256, 64, 8, 8, 4),
)
DESCRIBED = (
    TileConfig(128, 256, 64, 8, 8, 4, descriptors=True, flatten=True),
    TileConfig(128, 256, 64, 16, 8, 4, descriptors=True, flatten=True),
    TileConfig(128, 256, 64, 8, 8, 3, descriptors=True, flatten=True),
    TileConfig(128, 128, 64, 8, 8, 5, descriptors=True, flatten=True),
    TileConfig(128, 128, 64, 8, 4, 4, descriptors=True, flatten=True),
    TileConfig(256, 128, 64, 8, 8, 4, descriptors=True, flatten=True),
)
REHEARSED = (
    TileConfig(16, 32, 16, 2, 1, 1),
    TileConfig(16, 32, 16, 2, 1, 1, descriptors=True, flatten=True),
    TileConfig(32, 16, 16, 4, 1, 1),
)
EXP_BLOCK = 1024


@triton.jit
def exponentials_kernel(logit_ptr, label_ptr, anchor_ptr, out_ptr, sum_ptr, V, tiles, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid: (N, tiles); a program turns BLOCK logits (N, V) fp32 of a row into exponentials and their sum."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logit_ptr + row * V + v, mask=v < V, other=float("-inf"))
    weights = tl.where(v == tl.load(label_ptr + row), 0.0, tl.exp(z - tl.load(anchor_ptr + row)))
    tl.store(sum_ptr + row * tiles + tl.program_id(1), tl.sum(weights, 0))
    tl.store(out_ptr + row * V + v, weights.to(out_ptr.dtype.element_ty), mask=v < V)


@dataclass
class Problem:
    """One slice: x (N, D), w (Vc, D), labels (N,), anchors (N,), out (N, Vc)."""

    x: Tensor
    w: Tensor
    labels: Tensor
    anchor: Tensor
    out: Tensor

    @classmethod
    def make(cls, shape: tuple[int, int, int], device: torch.device) -> Problem:
        n, vocab, d = shape
        width = min(vocab, (64 << 20) // 2 // n)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter's bf16 products are wrong
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(n, d, generator=generator, device=device).to(dtype)
        w = (torch.randn(width, d, generator=generator, device=device) * d**-0.5).to(dtype)
        labels = torch.randint(vocab, (n,), generator=generator, device=device)
        anchor = torch.randn(n, generator=generator, device=device)
        return cls(x, w, labels, anchor, torch.empty(n, width, dtype=dtype, device=device))

    def sums(self) -> Tensor:
        """(N,) what every candidate must find."""
        z = self.x.float() @ self.w.float().T
        inside = torch.arange(len(self.w), device=z.device) != self.labels[:, None]
        return ((z - self.anchor[:, None]).exp() * inside).sum(1)

    def tile(self, config: TileConfig) -> Callable[[], Tensor]:
        sums = torch.empty(-(-len(self.w) // config.block_v), len(self.x), device=self.x.device)
        inputs = (self.x, Head(self.w), self.labels, self.anchor, None, self.out, sums)
        launch = exp_tile.bind(*inputs, write=True, precision="ieee", config=config)
        (n, v), device = self.out.shape, self.x.device
        programs = triton.cdiv(n, config.block_n) * triton.cdiv(v, config.block_v)
        if config.flatten and device.type == "cuda":
            programs = min(programs, torch.cuda.get_device_properties(device).multi_processor_count)

        def run() -> Tensor:
            launch((programs,), N=n, V=v, first_x=0, first_row=0, first_column=0, add=0)
            return sums.sum(0)

        return run

    def library(self) -> Callable[[], Tensor]:
        n, v = self.out.shape
        tiles = triton.cdiv(v, EXP_BLOCK)
        sums = torch.empty(n, tiles, device=self.x.device)

        def run() -> Tensor:
            if self.x.is_cuda:
                logits = torch.mm(self.x, self.w.T, out_dtype=torch.float32)
            else:
                logits = self.x.float() @ self.w.float().T
            inputs = (logits, self.labels, self.anchor, self.out, sums, v, tiles)
            exponentials_kernel[(n, tiles)](*inputs, BLOCK=EXP_BLOCK, enable_fp_fusion=True)
            return sums.sum(1)

        return run


def name_of(config: TileConfig) -> str:
    return (
        f"{'descriptors' if config.descriptors else 'pointers'} {config.block_n}x{config.block_v}x{config.block_d} "
        + (f"group {config.group_n}, {config.num_warps} warps, {config.num_stages} stages")
    )


def measure(shape: tuple[int, int, int], configs: tuple[TileConfig, ...], device: torch.device, seconds: float) -> dict:
    """Times of every candidate that works, milliseconds, and the reasons of those that do not."""
    problem = Problem.make(shape, device)
    expected = problem.sums()
    candidates = {name_of(config): partial(problem.tile, config) for config in configs} | {"library": problem.library}
    runs, failed = {}, {}
    for name, made in candidates.items():
        problem.out.fill_(torch.nan)
        try:
            run = made()
            off = (run() - expected).abs() / expected  # waits for the device on the next line
            written = (problem.out.sum(1, dtype=torch.float32) - expected).abs() / expected
            worst, worst_written = float(off.max()), float(written.max())
        except Exception as error:  # whatever it is: it goes into the report, and the other candidates go on
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        if worst < 1e-3 and worst_written < 5e-3:  # bf16 rounds each exponential by 4e-3 at most
            runs[name] = run
        else:
            failed[name] = f"wrong: sums are off by {worst:.1e}, what was written by {worst_written:.1e}"
    times = interleave(runs, device=device, seconds=seconds, least=3, most=50) if runs else {}
    work = 2 * len(problem.x) * len(problem.w) * shape[2]
    return {
        "shape": shape,
        "slice": list(problem.out.shape),
        "ms": {name: [timing.p20, timing.p50, timing.p80] for name, timing in times.items()},
        "teraflops": {name: work / timing.p50 / 1e9 for name, timing in times.items()},
        "failed": failed,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=60, help="time to measure in all; compiling comes on top")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, again after each shape")
    options = parser.parse_args(arguments)
    device, start = torch.device(options.device), time.monotonic()
    if device.type == "cpu":
        shapes, configs, major = TINY, REHEARSED, None
        if not triton.knobs.runtime.interpret:
            parser.error("on a CPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1")
    elif not torch.cuda.is_available():
        parser.error("no CUDA device is here; --device cpu rehearses")
    else:
        major = torch.cuda.get_device_capability()[0]
        shapes, configs = SHAPES, POINTERS + (DESCRIBED if major in (9, 10) else ())
    results: list[dict] = []
    for shape in shapes:
        if results and time.monotonic() - start > 3 * options.seconds:
            print(f"{shape}: skipped, the time is spent")
            continue
        results.append(measure(shape, configs, device, options.seconds / len(shapes)))
        ranked = sorted(results[-1]["ms"].items(), key=lambda item: item[1][1])
        print(
            f"\nN x V x D {shape}, slice {results[-1]['slice']}\n{'candidate':<58}{'p20':>9}{'p50':>9}{'p80':>9}  TFLOP/s"
        )
        for name, (low, middle, high) in ranked:
            print(f"{name:<58}{low:>9.3f}{middle:>9.3f}{high:>9.3f}{results[-1]['teraflops'][name]:>9.1f}")
        for name, reason in results[-1]["failed"].items():
            print(f"{name:<58}  {reason}")
        best = {
            kind: next(
                (
                    config
                    for name, _ in ranked
                    for config in configs
                    if name_of(config) == name and config.descriptors == kind
                ),
                None,
            )
            for kind in (False, True)
        }
        if results[-1] is results[0] and ranked:
            results[0]["entry"] = {
                "half": best[False] and astuple(best[False]),
                "described": best[True] and astuple(best[True]),
            }
            first = ranked[0][0]
            print(
                f"for CHIPS[{major}]: half={best[False]}, described={best[True]}, descriptors={first.startswith('desc')}"
            )
            if first == "library":
                print("the library's product and one pass were faster than every tile here")
        options.out.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1) + "\n")
    return 0 if results and all(result["ms"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
