"""A CUDA device made of host memory: everything but speed can be tried on it, without a GPU.

    python -m host_gpu -m synpo train ...        or: python -m host_gpu script.py; cuda:0 and cuda:1 are there

Tensors are on `cuda`, in memory of its own account, new memory is full of NaN, and the CPU computes. Seen here as on a GPU:

    tensors on different devices in one operation: an error            torch.cuda.max_memory_allocated(): what tensors held
    waits of the host: `waits()`, torch.cuda.set_sync_debug_mode       branches that ask for CUDA are taken

Triton kernels run in Triton's interpreter, on the device's memory; drawing a token there takes a second, so the CPU's op, which
draws the same tokens, stands in for that kernel. Speed, compiled kernels, streams and races are not seen here.

For the CPU build of one torch (`MADE_FOR`): the device takes the place of CUDA in torch's dispatcher, before torch is imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent.parent
MADE_FOR = "2.13."


def why_not() -> str | None:
    """Why the device cannot be had here; None where it can."""
    import torch

    if not torch.__version__.startswith(MADE_FOR) or torch.version.cuda or torch.version.hip:
        return f"the device is made for CPU builds of torch {MADE_FOR}x, this is {torch.__version__}"
    if shutil.which("c++") is None:
        return "there is no C++ compiler (c++) to build the device with"
    return None


def library() -> Path:
    """Where `build` puts it."""
    return ROOT / "build" / "host_gpu" / "host_gpu_device.so"


def build() -> None:
    """Compile the device where its sources are newer (half a minute), in a process that does not keep it."""
    folder = library().parent
    folder.mkdir(parents=True, exist_ok=True)
    sources = [str(FOLDER / name) for name in ("device.cpp", "kernels.cpp")]
    code = (
        "from torch.utils.cpp_extension import load\n"
        f"load('host_gpu_device', {sources}, build_directory={str(folder)!r}, extra_cflags=['-O1'], is_python_module=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the device does not compile:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")


def environment() -> dict[str, str]:
    """For a process that runs `python -m host_gpu`."""
    paths = [str(FOLDER.parent), str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
