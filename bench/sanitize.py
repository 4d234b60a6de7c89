"""Every path of every backend once on small, odd shapes, checked against float64: a smoke test; compute-sanitizer watches it.

    python -m bench.sanitize [--device cuda] [--backends triton chunked] [--jobs 8] [--seconds 45]
    compute-sanitizer --tool memcheck python -m bench.sanitize --backends triton

Exits with 1 where a result is wrong; what no longer fits into --seconds is counted as left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, cast

os.environ.setdefault(
    "PYTORCH_NO_CUDA_MEMORY_CACHING", "1"
)  # each tensor its own allocation, so that its bounds are seen

import torch

from synpo_kernels import contrastive_sample, linear_logprobs, synpo_pairs
from synpo_kernels.backends import choice
from synpo_kernels.reference import naive_logprobs

# N, V, D: ragged in every tile; rows of 72 are read through descriptors where there are any, of 71 through pointers
SHAPES = ((5, 37, 72), (130, 1000, 72), (70, 300, 71))
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def check(
    device: str,
    backend: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    trained: bool,
    softcap: float | None,
    hard: bool,
) -> float:
    """Largest relative error among log-probabilities and gradients, over its tolerance; `hard` makes rows overflow."""
    rows, vocab, width = shape
    generator = torch.Generator(device).manual_seed(rows + vocab)
    x = torch.randn(rows, width, generator=generator, device=device).mul_(60.0 if hard else 3.0).to(dtype)
    w = torch.randn(vocab, width, generator=generator, device=device).mul_(width**-0.5).to(dtype)
    b = torch.randn(vocab, generator=generator, device=device).to(dtype) if softcap else None
    y = torch.randint(vocab, (rows,), generator=generator, device=device)
    y[::7] = -100
    g = torch.randn(rows, generator=generator, device=device)
    results: list[list[torch.Tensor]] = []
    for compute, kind in ((partial(linear_logprobs, backend=backend), dtype), (naive_logprobs, torch.float64)):
        hidden, weight = x.to(kind).requires_grad_(), w.to(kind).requires_grad_(trained)
        logps = compute(hidden, weight, y, bias=None if b is None else b.to(kind), softcap=softcap)
        wanted = [hidden, weight] if trained else [hidden]
        results.append([logps.detach(), *torch.autograd.grad(logps, wanted, g.to(logps.dtype))])
    errors = [float((a.double() - e).norm() / e.norm().clamp(min=1e-30)) for a, e in zip(*results)]
    return max(error if error == error else float("inf") for error in errors) / TOLERANCE[dtype]


def check_pairs(device: str, backend: str, packed: bool) -> float:
    """Relative error of the SynPO coefficients from the small kernels, over a tolerance of 1e-5."""
    generator = torch.Generator(device).manual_seed(0)
    logps = -torch.rand(6, 1500, generator=generator, device=device)
    labels = torch.randint(-1, 3, logps.shape, generator=generator, device=device) * 100
    bounds = None
    if packed:
        logps, labels = logps.flatten(), labels.flatten()
        bounds = torch.tensor([0, 7, 7, 3000, 3001, 8000, 9000], device=device)
    found, g = synpo_pairs(logps, labels, bounds, backend=backend)
    expected, exact = synpo_pairs(logps.double(), labels, bounds, backend="chunked")
    errors = ((g - exact).norm() / exact.norm(), (found.loss - expected.loss).abs() / expected.loss.abs())
    return max(float(error) for error in errors) / 1e-5


def check_draw(device: str, vocab: int, top_k: int, plausibility: float) -> float:
    """0 where the op of contrastive sampling draws what torch's do, else 2."""
    generator = torch.Generator(device).manual_seed(vocab)
    expert, amateur = (3 * torch.randn(5, vocab, generator=generator, device=device) for _ in range(2))
    uniform = torch.rand(5, generator=generator, device=device, dtype=torch.float64)
    history = torch.randint(-1, vocab, (5, 9), generator=generator, device=device)
    options = {"top_k": top_k, "plausibility": plausibility, "repetition_penalty": 1.2, "history": history}
    own = "triton" if expert.is_cuda else "auto"
    tokens, logps = contrastive_sample(expert, amateur, uniform=uniform, backend=own, **options)
    expected, exact = contrastive_sample(expert, amateur, uniform=uniform, backend="torch", **options)
    return 0.0 if torch.equal(tokens, expected) and torch.allclose(logps, exact, atol=1e-5) else 2.0


def problems(device: str, backends: Sequence[str]) -> dict[str, Callable[[], float]]:
    """Name → check, those that share kernels next to each other."""
    found: dict[str, Callable[[], float]] = {}
    for backend in backends:
        for dtype, trained, softcap, shape, hard in itertools.product(
            TOLERANCE, (False, True), (None, 30.0), SHAPES, (False, True)
        ):
            name = f"{backend} {shape} {dtype} trained={trained} softcap={softcap} overflow={hard}"
            found[name] = partial(check, device, backend, shape, dtype, trained, softcap, hard)
        for packed in (False, True):
            found[f"{backend} pairs packed={packed}"] = partial(check_pairs, device, backend, packed)
    for vocab, top_k, plausibility in ((1, 1, 0.0), (5003, 32, 0.0), (5003, 32, 0.1)):
        name = f"draw V={vocab} k={top_k} plausibility={plausibility}"
        found[name] = partial(check_draw, device, vocab, top_k, plausibility)
    return found


def solve(problem: Callable[[], float]) -> float:
    """How far off a problem is, over its tolerance; infinite where that is no number."""
    torch.backends.cuda.matmul.allow_tf32 = False
    off = problem()
    return off if off == off else math.inf


def _work(pipe: Connection) -> None:
    """Solve problems as they come; after a fault in a kernel a process has no GPU any more, and ends."""
    while True:
        problem = pipe.recv()
        try:
            pipe.send(solve(problem))
        except Exception as error:  # whatever it is belongs to the problem
            pipe.send(f"{type(error).__name__}: {error}".splitlines()[0][:160])
            return


def solved(todo: dict[str, Callable[[], float]], jobs: int) -> Iterator[tuple[str, float | str]]:
    """(name, how far off or why it failed) of every problem, in processes side by side; one that dies costs its problem alone."""
    context = get_context("spawn")
    waiting = list(reversed(todo.items()))
    busy: dict[Connection, tuple[str, Any]] = {}
    idle: list[tuple[Connection, Any]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                if not idle:
                    own, other = context.Pipe()
                    process = context.Process(target=_work, args=(other,), daemon=True)
                    process.start()
                    other.close()
                    idle.append((own, process))
                pipe, process = idle.pop()
                name, problem = waiting.pop()
                pipe.send(problem)
                busy[pipe] = name, process
            for ready in wait(list(busy)):
                pipe = cast(Connection, ready)
                name, process = busy.pop(pipe)
                try:
                    found = pipe.recv()
                except EOFError:
                    process.join()
                    found = f"the process died with exit code {process.exitcode}"
                if isinstance(found, float):
                    idle.append((pipe, process))
                yield name, found
    finally:
        for _, process in [*idle, *busy.values()]:
            process.terminate()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--backends", nargs="+", choices=list(choice.BACKENDS), help="(all that serve the device)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, to compile side by side (1: this one)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no problem after so long")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --device cpu checks the backends of CPUs")
    there = torch.empty(0, device=options.device)
    serving = [name for name, (serves, _) in choice.BACKENDS.items() if serves(there)[0]]
    backends = options.backends or serving[::-1]  # kernels first, plain torch last
    todo = problems(options.device, backends)
    end, done, bad = time.monotonic() + options.seconds, 0, 0
    found: Iterable[tuple[str, float | str]] = ((name, solve(problem)) for name, problem in todo.items())
    with closing(solved(todo, options.jobs)) if options.jobs > 1 else nullcontext(found) as results:
        for name, off in results:
            right = isinstance(off, float) and off < 1
            done, bad = done + 1, bad + (not right)
            said = f"{off:8.3f} tolerances" if isinstance(off, float) else off
            print(f"{'ok   ' if right else 'WRONG'} {said}  {name}", flush=True)
            if time.monotonic() > end:
                break
    print(f"{bad} of {done} problems are wrong; {len(todo) - done} left out for want of time")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
