"""`synpo doctor`: what this machine has and what will be used, in one table to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from rich.table import Table

from synpo.terminal import console

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "flash-attn",
    "av",
    "openai",
    "pycocoevalcap",
    "torchvision",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str]:
    """Name → finding, in reading order."""
    import torch

    from synpo import __version__
    from synpo_kernels._ext import describe
    from synpo_kernels.backends.choice import BACKENDS

    found = {
        "synpo": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        **{name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            found[f"cuda:{i}"] = (
                f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
            )
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        found["precision of training"] = (
            f"bfloat16 weights {'under' if half else 'without (this GPU has no such products)'} bfloat16 autocast, "
            "float32 weights with TF32 products; train.bf16, train.tf32 and train.fp16 say otherwise"
        )
    else:
        found["cuda"] = "no device"
        found["precision of training"] = "that of the weights; train.bf16 says otherwise"
    found["C++ extension"] = describe()
    here = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    for name, (supports, _) in BACKENDS.items():
        usable, reason = supports(here)
        found[f"loss backend {name}"] = f"{'yes' if usable else 'no'}: {reason}"
    return found


def report() -> None:
    table = Table("what", "found", title="synpo doctor")
    for name, value in facts().items():
        table.add_row(name, value)
    console().print(table)
