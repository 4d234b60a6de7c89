"""Whether oneDNN may use AMX: asked of the processor once, in a process of its own, before torch loads.

Some virtual machines advertise AMX and do not grant it: a product in bfloat16 then dies with SIGILL. There oneDNN is capped
below it (ONEDNN_MAX_CPU_ISA). Elsewhere it must not be: with AMX such a product takes an eighth of the time.

    no AMX, or ONEDNN_MAX_CPU_ISA set by whoever started this        nothing is done
    AMX, seen to work or to die with this torch before               the answer on disk counts ($XDG_CACHE_HOME/synpo)
    AMX, not tried yet                                               a child process multiplies, and the answer is kept
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from synpo import machine

VARIABLE, CAP = "ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16"
PRODUCT = "import torch; x = torch.ones(512, 512, dtype=torch.bfloat16); print(float((x @ x)[0, 0]))"
SECONDS = 120  # that the child process may take, most of them to load torch

_tried: str | None = None


def settle() -> None:
    """Cap oneDNN for this process and its children where AMX is advertised and dies. Call it before torch is imported."""
    global _tried
    if VARIABLE in os.environ or "amx_tile" not in machine.instruction_sets():
        return
    works = _remembered()
    if works is None:
        works = _try()
        if works is not None:
            _remember(works)
    _tried = "not tried: torch could not be loaded" if works is None else "works" if works else "dies"
    if works is False:
        os.environ[VARIABLE] = CAP


def described() -> str:
    """What is known of AMX here, in words."""
    if "amx_tile" not in machine.instruction_sets():
        return "this CPU has none"
    if _tried == "dies":
        return f"advertised, but a bfloat16 product dies: oneDNN is held to {CAP}"
    if _tried == "works":
        return "works: a bfloat16 product was tried"
    if VARIABLE in os.environ:
        return f"not tried: {VARIABLE}={os.environ[VARIABLE]} is set"
    return _tried or "not tried"


def _try() -> bool | None:
    """Whether the product comes out; None where the child did not get as far as that."""
    try:
        done = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return done.stdout.split()[-1:] == ["512.0"]
    return False if done.returncode < 0 else None  # ended by a signal, SIGILL; or with an error of Python's


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "synpo" / "amx.json"


def _key() -> str:
    """What the answer may depend on: the processor as this machine presents it, its kernel, and torch."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    return "; ".join([machine.cpu_name(), " ".join(machine.instruction_sets()), platform.release(), f"torch {torch}"])


def _known() -> dict[str, bool]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):  # none, no home, or not ours
        return {}
    return found if isinstance(found, dict) else {}


def _remembered() -> bool | None:
    found = _known().get(_key())
    return found if isinstance(found, bool) else None


def _remember(works: bool) -> None:
    """Keep the answer, all at once; a disk that takes none costs a trial at the next start."""
    from synpo.records import write_json

    try:
        write_json(_file(), _known() | {_key(): works})
    except (OSError, RuntimeError):
        return
