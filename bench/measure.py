"""What every benchmark here measures with: time, memory, and the machine it ran on.

Time    providers take turns, in another order every round, so that a busy or a warming machine is so for all of them, and so
        is a chip at the limit of its power, which gives what the one before has left.
        CUDA events on a GPU, after a flush of its L2 cache; the wall clock on a CPU. Milliseconds, 20th/50th/80th percentile.
Memory  the peak of one call above what was held before it. GPU: torch's allocator. CPU (Linux): the kernel's own mark of
        the largest resident set, reset before the call, after the C heap gave its free pages back; that counts everything
        the process touches, a library's scratch too, but not what an earlier call already left resident (thread stacks, a
        library's cached buffers). Where that says more of malloc than of the work, the tensors alive are added up instead.

Import this module before torch: it decides an environment variable that must be set first.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

from synpo import onednn
from synpo.machine import cpu_name, instruction_sets

ROOT = Path(__file__).resolve().parent.parent

onednn.settle()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from tqdm import tqdm  # noqa: E402


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    p20: float
    p50: float
    p80: float
    runs: int

    @classmethod
    def of(cls, values: list[float]) -> Timing:
        ordered = sorted(values)

        def at(share: float) -> float:
            place = share * (len(ordered) - 1)
            low, high = math.floor(place), math.ceil(place)
            return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

        return cls(at(0.2), at(0.5), at(0.8), len(ordered))


class Stopwatch:
    """Milliseconds that one call takes on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda":
            size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        if self._flush is None:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        self._flush.zero_()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    seconds: float,
    least: int = 3,
    most: int = 100,
    title: str = "",
) -> dict[str, Timing]:
    """Time `runs` in turns; each has an equal share of `seconds`, at least `least` runs and at most `most`.

    So a slow one does not take the repetitions of the others; one that needs more than its share for `least` runs makes
    the whole last longer. Nothing is warmed up here: call each before.
    """
    watch = Stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    share, order = seconds / max(1, len(names)), random.Random(0)
    with tqdm(total=most, desc=title, unit="round", leave=False, disable=not sys.stderr.isatty()) as bar:
        for turn in range(most):
            due = [name for name in names if turn < least or sum(times[name]) < 1e3 * share]
            if not due:
                break
            for name in order.sample(due, len(due)):
                times[name].append(watch(runs[name]))
            bar.update()
    return {name: Timing.of(values) for name, values in times.items()}


def replayed(run: Callable[[], object], device: torch.device, *, seconds: float) -> Timing | None:
    """Time `run` as a CUDA graph: the GPU's share alone, without what Python and launches take. None where it cannot be captured.

    Call `run` once before. What draws from torch's own generator must not be tried: a capture that fails leaves it unusable.
    """
    if device.type != "cuda":
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
    except RuntimeError:
        return None
    timing = interleave({"graph": graph.replay}, device=device, seconds=seconds, least=5, most=1000)["graph"]
    del kept
    return timing


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Largest memory held during one call above what was held before it; None where the system does not say.

    Call `run` once before, so that what is compiled or cached on the first call is not counted.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    kept = run()
    after = _resident("VmHWM")
    del kept
    return after - before


def peak_tensor_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Largest sum of all tensors alive during one call above what was alive before it: on a CPU what CUDA's allocator reports.

    Resident memory also counts what malloc holds in pieces too small for the next tensor, which on a CPU can be as much again.
    What an extension allocates by itself is not in it. Call `run` once before.
    """
    if device.type == "cuda":
        return peak_bytes(run, device) or 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    alive = [e["args"]["Total Allocated"] for e in events]
    return max(alive) - (alive[0] - events[0]["args"]["Bytes"])


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def copy_rate(device: torch.device, *, seconds: float = 1.0) -> float:
    """Bytes read plus written per second by a large copy."""
    numbers = (1 << 31 if device.type == "cuda" else 1 << 27) // 4
    source = torch.rand(numbers, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    timing = interleave({"copy": lambda: target.copy_(source)}, device=device, seconds=seconds, most=20)["copy"]
    return 2 * source.nbytes / (1e-3 * timing.p50)


def product_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """Operations per second of one large product, 2 n³ of n × n matrices: what is to be had of the device in this dtype."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    run = {"product": lambda: a @ b}
    run["product"]()
    timing = interleave(run, device=device, seconds=seconds, most=20)["product"]
    return 2 * side**3 / (1e-3 * timing.p50)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    """Commit of the checkout ($SYNPO_COMMIT where the history is not at hand), marked where files differ from it."""
    if given := os.environ.get("SYNPO_COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load() -> float | None:
    """Processes that ran or waited for a core, on average over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine(device: torch.device) -> dict[str, str]:
    """Facts that every figure carries, in reading order."""
    from synpo_kernels import _ext

    facts = {
        "date": date.today().isoformat(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "simd": " ".join(instruction_sets()),
        "threads": str(torch.get_num_threads()),
        "load": "unknown" if load() is None else f"{load():.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "liger-kernel", "cut-cross-entropy", "trl")},
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "not set"),
        "extension": _ext.describe(),
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        chip = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        facts = {"gpu": chip, "cuda": str(torch.version.cuda), **facts}
    return facts


def chip_slug(device: torch.device) -> str:
    """The chip's name as part of a file name: 'nvidia-h200', 'amd-epyc'."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    return "-".join(word for word in words if word not in ("r", "tm", "cpu", "processor"))[:40]
