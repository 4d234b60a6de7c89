"""`synpo doctor`: what this machine has, what will be used and why, and one piece of advice; also for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import warnings
from typing import Any

from rich.table import Table

from synpo import __version__, machine, onednn
from synpo.terminal import console

PACKAGES = ("torch", "transformers", "peft", "accelerate", "av")
OPTIONAL = {
    "triton": "kernels of the loss on a GPU; comes with torch for CUDA",
    "flash-attn": "attention on a GPU: pip install 'synpo[flash]'",
    "torchvision": "processors of video models other than LLaVA-OneVision",
    "bitsandbytes": "model.quantization: pip install 'synpo[qlora]'",
    "vllm": "--engine vllm: pip install 'synpo[vllm]'",
    "openai": "judge.kind=openai: pip install 'synpo[judge]'",
    "pycocoevalcap": "scores of captions: pip install 'synpo[eval]'",
    "wandb": "train.report_to=wandb: pip install 'synpo[wandb]'",
    "trackio": "train.report_to=trackio: pip install 'synpo[trackio]'",
    "tensorboard": "train.report_to=tensorboard: pip install 'synpo[tensorboard]'",
    "liger-kernel": "norms, gates and rotary positions while training on a GPU: pip install 'synpo[liger]'",
    "deepspeed": "train.deepspeed: pip install deepspeed",
}
"""Package → what it is for, and how it is had."""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, str]:
    """Name → finding, in reading order; the last is the advice."""
    import torch

    from synpo_kernels import _ext

    found = {
        "synpo": __version__,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "CPU": machine.cpu(),
        "memory": _memory(),
        "AMX": onednn.described(),
        **{name: _version(name) or "not installed: pip install 'synpo[all]'" for name in PACKAGES},
        **{name: _version(name) or f"not installed; for {use}" for name, use in OPTIONAL.items()},
        "Java": shutil.which("java") or "not installed; for METEOR, which is left out without it",
        "C++ extension": _ext.describe().removeprefix("synpo: "),
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            gigabytes = device.total_memory / 2**30
            found[f"cuda:{i}"] = f"{device.name}, sm_{device.major}{device.minor}, {gigabytes:.0f} GiB"
    else:
        found["cuda"] = f"no device that torch {torch.__version__} sees"
    found |= _used(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found["advice"] = advice(found)
    return found


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not Linux
        return "unknown"
    return f"{size / 2**30:.0f} GiB"


def _used(device: Any) -> dict[str, str]:
    """What training and captioning will run on."""
    import torch

    on_gpu = device.type == "cuda"
    flash = on_gpu and _version("flash-attn") is not None
    if on_gpu:
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = (
            f"bfloat16 weights {'under' if half else 'without (this GPU has no such products)'} bfloat16 autocast, "
            "float32 weights with TF32 products; train.bf16, train.tf32 and train.fp16 say otherwise"
        )
    else:
        precision = "that of the weights; train.bf16 says otherwise"
    return {
        "models run on": str(device),
        "loss in bfloat16": _loss(device, torch.bfloat16),
        "loss in float32": _loss(device, torch.float32),
        "attention": "flash-attn for bfloat16 and float16 weights" if flash else "torch's own kernels (sdpa)",
        "precision of training": precision,
    }


def _loss(device: Any, dtype: Any) -> str:
    """The backend that `auto` takes for hidden states of that kind, and why."""
    import torch

    from synpo_kernels.backends.choice import BACKENDS, choose

    hidden = torch.empty(0, 8, dtype=dtype, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = choose("auto", hidden).name
    best = "triton" if hidden.is_cuda else "cpu"
    served, reason = BACKENDS[best][0](hidden)
    reason = reason.partition("; use backend=")[0]
    if chosen == best:
        return f"{chosen}: {reason}"
    return f"{chosen}: plain torch, as " + (f"its own products are faster on this {best.upper()}" if served else reason)


def advice(found: dict[str, str]) -> str:
    """The one thing that would help most on this machine."""
    gpu, extension = found.get("cuda:0"), found["C++ extension"]
    if gpu is None and shutil.which("nvidia-smi"):
        return f"there is an NVIDIA GPU here, but torch {found['torch']} does not see it: install torch for its CUDA version"
    if gpu is None and not extension.startswith("C++ extension version"):
        return f"the loss runs on plain torch: {extension}"
    if "dies" in found["AMX"]:
        return "this virtual machine shows an AMX that it does not grant: one with it multiplies bfloat16 several times as fast"
    if gpu is None:
        return "no GPU: small models, the demo and text pairs train here; `synpo plan --gpu 24GB` says what a GPU would hold"
    if found["triton"].startswith("not installed"):
        return "pip install triton: without it the loss runs on plain torch"
    if float(gpu.split(", ")[-1].split()[0]) < 30:
        return "`synpo plan` says what fits this GPU; --set model.quantization=nf4 (QLoRA) holds its weights in 4 bits"
    if found["attention"].startswith("torch"):
        return "flash-attn would be used where it is installed (pip install 'synpo[flash]'); nothing needs it"
    return "nothing is missing; `synpo plan` says what fits, `python -m bench.loss` what the kernels do here"


def report() -> None:
    """Print the findings as a table, the advice below it."""
    found = facts()
    said = found.pop("advice")
    table = Table("what", "found", title="synpo doctor")
    for name, value in found.items():
        table.add_row(name, value)
    console().print(table)
    console().print(f"advice: {said}")
