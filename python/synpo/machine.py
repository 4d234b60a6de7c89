"""Which processor this is: its name, and the instruction sets that decide how fast a product is and how its sums are rounded.

Read from the system, without torch, so that it can be asked before torch loads; only `described` loads it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("synpo", "torch", "transformers", "peft", "av", "pycocoevalcap")  # that figures may depend on
INSTRUCTION_SETS = (  # flags of /proc/cpuinfo, x86 and then Arm, each from old to new
    *("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16"),
    *("asimd", "bf16", "sve", "svebf16", "sve2", "sme"),
)


@cache
def _facts() -> dict[str, str]:
    """What the system says of its first core; empty where it has no such file."""
    first = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0] if CPUINFO.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_name() -> str:
    """The model as the system names it, "AMD EPYC 9R14"."""
    return _facts().get("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Those of INSTRUCTION_SETS that this processor has, in that order; empty where the system does not say."""
    facts = _facts()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return [name for name in INSTRUCTION_SETS if name in flags]


def cpu() -> str:
    """One line for people: "AMD EPYC, 2 cores, avx2 avx512f avx512_bf16"."""
    return ", ".join(filter(None, [cpu_name(), f"{os.cpu_count()} cores", " ".join(instruction_sets())]))


def described() -> dict[str, str]:
    """What a report says of where it ran: device, CPU and what torch makes of it, system, versions."""
    import torch

    capped = os.environ.get("ONEDNN_MAX_CPU_ISA")
    used = f"torch uses {torch.backends.cpu.get_cpu_capability()}" + (
        f", oneDNN no more than {capped}" if capped else ""
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "CPU": f"{cpu()}; {used}; threads: {torch.get_num_threads()}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
