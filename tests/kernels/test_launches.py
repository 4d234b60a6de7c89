"""Every launch through triton's own binder and compiler, for a GPU that need not be there: what the interpreter passes over.

The interpreter takes any argument for any parameter and compiles nothing. Here the ops run on CPU tensors as they would on a
GPU, each launch as far as the finished kernel, which is not run; the numbers mean nothing. A driver that only names a chip
stands for the GPU, and as the interpreter is chosen when triton is first imported, a process of its own does the work.
The file is its own worker: `python test_launches.py` prints a line a launch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

ROOT = Path(__file__).resolve().parents[2]
ARCH, SHARED = 90, 227 << 10  # the chip, and the bytes of shared memory that a block of it may take


def stand_in() -> None:
    """Let the Triton path take CPU tensors as those of the chip, and compile what it launches."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from synpo_kernels import contrast
    from synpo_kernels.backends import choice, gpu
    from synpo_kernels.ops import logprobs

    chip = {"get_current_target": GPUTarget("cuda", ARCH, 32), "get_current_device": 0, "get_current_stream": 0}
    triton.runtime.driver.set_active(SimpleNamespace(**{k: lambda *_, v=v: v for k, v in chip.items()}))
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        assert all(isinstance(size, int) and size > 0 for size in grid) and max((*grid[1:], 1)) < 2**16, grid
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        assert kernel.metadata.shared <= SHARED, (self.__name__, kernel.metadata.shared)
        if self.__name__ == "partition_kernel":  # torch looks rows up by what it would have written
            options["order_ptr"].zero_()
        print(self.__name__, flush=True)

    JITFunction.run = compile_only
    for module in (choice, contrast):
        module.triton_takes = lambda dtype, device: (True, "")
    choice.BACKENDS["triton"] = (lambda hidden: (True, ""), choice._triton)
    gpu._major = lambda device: ARCH // 10
    logprobs._used = lambda labels, ignore_index: ignore_index  # as on a GPU, where the host does not see the labels


def launch_everything() -> None:
    from synpo_kernels import FusedLinearSynPOLoss, contrastive_sample, linear_logprobs

    for n, v, d, dtype in ((24, 300, 64, torch.bfloat16), (1, 1, 1, torch.float16)):
        x, w = torch.randn(n, d, dtype=dtype, requires_grad=True), torch.randn(v, d, dtype=dtype)
        labels, bias = torch.randint(v, (n,)), torch.randn(v, dtype=dtype)
        for trained in (False, True):
            weight = w.detach().requires_grad_(trained)
            wanted = [x, weight] if trained else [x]
            for options in ({"bias": bias, "softcap": 5.0}, {"ignore_index": None}):
                torch.autograd.grad(linear_logprobs(x, weight, labels, backend="triton", **options).sum(), wanted)
            if n % 4 == 0:
                loss = FusedLinearSynPOLoss(backend="triton")(x.view(4, -1, d), weight, labels.view(4, -1)).loss
                torch.autograd.grad(loss, wanted)
    history = torch.zeros(2, 3, dtype=torch.int64)
    for v, options in ((1, {"top_k": 1}), (600, {"top_k": 5, "alpha": 1, "plausibility": 0.1})):
        more = {"repetition_penalty": 2, "history": history, "temperature": 0.7, "top_p": 1, **options}
        contrastive_sample(torch.randn(2, v), torch.randn(2, v), backend="triton", **more)


@pytest.mark.slow
def test_every_launch_compiles() -> None:
    """Some forty kernels, half a second each; triton keeps them for the next time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == {
        "exp_tile_kernel",
        "exact_rows_kernel",
        "counted_product_kernel",
        "partition_kernel",
        "begin_rows_kernel",
        "finish_rows_kernel",
        "sequence_sums_kernel",
        "pair_loss_kernel",
        "scale_kernel",
        "scale_rows_kernel",
        "expert_peaks_kernel",
        "group_bests_kernel",
        "draw_kernel",
    }


if __name__ == "__main__":
    stand_in()
    launch_everything()
