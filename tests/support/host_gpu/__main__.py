"""python -m host_gpu (-m MODULE | FILE) [ARGUMENT...]: run it where torch sees CUDA devices made of host memory."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import runpy
import sys
from pathlib import Path

import host_gpu


def load() -> None:
    """Put the device into torch's dispatcher. Torch asks once whether there is CUDA: its libraries come first, then the device,
    then `import torch`."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None and "torch" not in sys.modules
    libraries = Path(found.origin).parent / "lib"
    for library in (libraries / "libtorch_cpu.so", libraries / "libtorch_python.so", host_gpu.library()):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        load()
        from host_gpu import patches

        patches.torch_cuda()
        patches.triton_interpreter()
        patches.attention()
        patches.sampling()
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
