"""Every Triton kernel once on small, odd shapes and checked against float64: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench.sanitize

Exits with 1 where a result is wrong. Needs a CUDA device.
"""

from __future__ import annotations

import itertools
import os
import sys

os.environ.setdefault(
    "PYTORCH_NO_CUDA_MEMORY_CACHING", "1"
)  # each tensor its own allocation, so that its bounds are seen

import torch

from synpo_kernels import linear_logprobs
from synpo_kernels.reference import naive_logprobs

SHAPES = ((5, 37, 72), (130, 1000, 72))  # N, V, D: ragged in every tile; D is compiled in, so there is one
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def check(shape: tuple[int, int, int], dtype: torch.dtype, trained: bool, softcap: float | None, hard: bool) -> float:
    """Largest relative error among log-probabilities and gradients, over its tolerance; `hard` makes rows overflow."""
    rows, vocab, width = shape
    generator = torch.Generator("cuda").manual_seed(rows + vocab)
    x = torch.randn(rows, width, generator=generator, device="cuda").mul_(60.0 if hard else 3.0).to(dtype)
    w = torch.randn(vocab, width, generator=generator, device="cuda").mul_(width**-0.5).to(dtype)
    b = torch.randn(vocab, generator=generator, device="cuda").to(dtype) if softcap else None
    y = torch.randint(vocab, (rows,), generator=generator, device="cuda")
    y[::7] = -100
    g = torch.randn(rows, generator=generator, device="cuda")
    results: list[list[torch.Tensor]] = []
    for compute, kind in ((linear_logprobs, dtype), (naive_logprobs, torch.float64)):
        hidden, weight = x.to(kind).requires_grad_(), w.to(kind).requires_grad_(trained)
        logps = compute(hidden, weight, y, bias=None if b is None else b.to(kind), softcap=softcap)
        wanted = [hidden, weight] if trained else [hidden]
        results.append([logps.detach(), *torch.autograd.grad(logps, wanted, g.to(logps.dtype))])
    torch.cuda.synchronize()
    errors = [float((a.double() - e).norm() / e.norm().clamp(min=1e-30)) for a, e in zip(*results)]
    return max(error if error == error else float("inf") for error in errors) / TOLERANCE[dtype]


def main() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("compute-sanitizer watches GPUs: no CUDA device is here")
    torch.backends.cuda.matmul.allow_tf32 = False
    bad = 0
    for shape, dtype, trained, softcap, hard in itertools.product(
        SHAPES, TOLERANCE, (False, True), (None, 30.0), (False, True)
    ):
        off = check(shape, dtype, trained, softcap, hard)
        if not off < 1:
            bad += 1
            print(f"wrong by {off:.1f} tolerances: {shape} {dtype} trained={trained} softcap={softcap} overflow={hard}")
    print(f"{bad} of {len(SHAPES) * len(TOLERANCE) * 8} problems are wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
