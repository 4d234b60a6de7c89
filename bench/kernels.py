"""Which kernels one forward and backward of the loss runs, how long each takes, and how long the GPU waits for Python.

    python -m bench.kernels [--shape 8192x152064x3584] [--device cuda] [--out FILE.json]

`ms` is the median of five runs, `busy` the sum over all kernels of one more, `launches` their number: where `ms` is far above
`busy` the GPU waited. On a CPU the rows are torch's operations, by the time spent in each itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import measure  # before torch

import torch  # isort: skip
from torch.autograd import DeviceType  # isort: skip
from torch.profiler import ProfilerActivity, profile  # isort: skip

from bench import cases, loss, peers  # isort: skip
from bench.report import reason_of  # isort: skip

SHAPE = {"cuda": "8192x152064x3584", "cpu": "256x4096x256"}
UNCOUNTED = peers.Provider("synpo uncounted", partial(peers.mode, ignore_index=None), "where no label is ignored")
SHOWN = 12  # rows of a table; the file has them all


def kernels_of(run: Callable[[], object], device: torch.device) -> list[tuple[str, float, int]]:
    """(name, milliseconds, launches) of everything that one call of `run` had the device do, longest first."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in profiled.events():
        if on_gpu != (event.device_type == DeviceType.CUDA) or getattr(event, "is_user_annotation", False):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        ms, launches = found[event.name]
        found[event.name] = ms + microseconds / 1e3, launches + 1
    return sorted(((name, *values) for name, values in found.items()), key=lambda row: -row[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", help="NxVxD[:dtype] " + str(SHAPE))
    parser.add_argument("--providers", nargs="+", default=["synpo"], metavar="NAME", help="those whose names begin so")
    parser.add_argument("--out", type=Path, help="JSON to write, again after each table")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    (case,) = cases.parse(options.shape or SHAPE[device.type])
    facts, tables = measure.machine(device), []
    inputs = cases.make(case, device)
    for head in peers.HEADS:
        problem = inputs.with_head(head == "trained")
        for provider in [*peers.providers(), UNCOUNTED]:
            if head not in provider.heads or not provider.name.startswith(tuple(options.providers)):
                continue
            try:
                run = partial(loss.step, provider.load(device), problem)
                for _ in range(2):
                    run()
                took = measure.interleave({"run": run}, device=device, seconds=60.0, least=5, most=5)["run"]
                rows = kernels_of(run, device)
            except Exception as error:  # one that does not run here
                print(f"\n{provider.name}, {head} head: {reason_of(error)}", flush=True)
                continue
            busy, launches = sum(ms for _, ms, _ in rows), sum(count for _, _, count in rows)
            print(
                f"\n{provider.name}, {head} head, {case.name}: {took.p50:.2f} ms, busy {busy:.2f} ms, {launches} launches"
            )
            for name, ms, count in rows[:SHOWN]:
                print(f"{ms:12.3f} ms {count:6d}  {name[:110]}")
            print(end="", flush=True)
            table = [{"kernel": name, "ms": ms, "launches": count} for name, ms, count in rows]
            tables.append(
                {
                    "provider": provider.name,
                    "head": head,
                    "case": case.name,
                    "ms": took.p50,
                    "busy_ms": busy,
                    "kernels": table,
                }
            )
            if options.out:
                options.out.write_text(json.dumps({"machine": facts, "tables": tables}, indent=1) + "\n")
    return 0 if tables else 1


if __name__ == "__main__":
    sys.exit(main())
